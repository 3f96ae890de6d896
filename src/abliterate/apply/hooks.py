"""An edit applied live: forward hooks on the writers, gone when the context ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from abliterate.apply.removal import removed, weight_factors
from abliterate.apply.shifts import check_shifts
from abliterate.edit.edit import Edit
from abliterate.models.handle import Handle
from abliterate.models.outputs import Change, adding, changed, taking_out
from abliterate.models.placement import device_of, replaced, value


class Attachment:
    """An edit made ready for a model once; inside a `with`, which may be entered again and again, it is in force.

    Since the output of a writer is W x + b, taking r out of the output is taking it out of W and b, so the
    stream is the same at every site as with the edit baked, up to rounding. The output of fused experts is a
    sum of such outputs, so the same holds for it. A writer without a module to hook is swapped for its baked
    copy meanwhile.
    """

    def __init__(self, handle: Handle, edit: Edit) -> None:
        modules = {name: module for module, name in handle.module_names.items()}
        parameters = dict(handle.model.named_parameters())
        check_shifts(handle, edit.shifts)
        self._changes: list[tuple[nn.Module, Change]] = []
        self._entering: list[tuple[nn.Module, Change]] = []
        self._handle, self._edit = handle, edit
        self._model, self._swaps = handle.model, list[tuple[str, Tensor, bool]]()
        self._undo = contextlib.ExitStack()
        for writer, change in weight_factors(handle, edit.parts):
            if writer.at:
                taken = taking_out(*(torch.from_numpy(factor).to(handle.dtype) for factor in change))
                place = self._entering if writer.at == "input" else self._changes
                place.append((modules[writer.module], taken))
                continue
            parameter = parameters[writer.name]
            if not writer.module:
                tied = handle.tied and parameter is handle.embedding.weight
                edited = removed(value(handle.model, writer.name), change, writer.axis)
                self._swaps.append((writer.name, edited, tied))
                continue
            dtype = parameter.dtype if parameter.is_floating_point() else handle.dtype
            module = modules[writer.module]
            left, right = (torch.from_numpy(factor).to(device_of(module), dtype) for factor in change)
            if parameter.ndim == 1:  # a norm's bias adds the same to every token
                taken = adding(-left.T @ (right @ value(handle.model, writer.name).to(right)))
            else:
                taken = taking_out(left, right)
            self._changes.append((module, taken))
        for shift in edit.shifts:
            self._changes.append((handle.blocks[shift.layer], adding(torch.from_numpy(shift.vector))))

    def __enter__(self) -> None:
        with contextlib.ExitStack() as undo:
            for name, edited, tied in self._swaps:
                swap = _for_itself if tied else replaced
                undo.enter_context(swap(self._model, name, edited))
            undo.enter_context(changed(self._changes, self._entering))
            self._handle.edits.append(self._edit)
            undo.callback(self._handle.edits.pop)
            self._undo = undo.pop_all()

    def __exit__(self, *_: object) -> None:
        self._undo.close()


@contextlib.contextmanager
def _for_itself(model: nn.Module, name: str, new: Tensor) -> Iterator[None]:
    """Other values in a module's parameter, while a head that is tied to it keeps its own."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    before = getattr(module, last)
    setattr(module, last, nn.Parameter(new, requires_grad=False))
    try:
        yield
    finally:
        setattr(module, last, before)


@contextlib.contextmanager
def attached(handle: Handle, edit: Edit) -> Iterator[Handle]:
    """Take an edit's directions out of what each writer gives, and add its shifts, for as long as the context lasts."""
    with Attachment(handle, edit):
        yield handle
