"""Devices that aren't there: tensors that say they lie on "lazy:0" or "lazy:1" and hold CPU data.

To mix two of them, or one with the CPU, is an error as on CUDA. Inside `devices()` factories and `.to` know them;
`spread` puts half of a model on each, with the hooks that accelerate gives a model spread over cards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import named_module_tensors
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from abliterate.models.handle import Handle

KIND = "lazy"  # a device type that torch can spell and no build has
MOVES = ("copy_", "to", "cpu", "_copy_from", "set_", "type_as")
INDEXES = ("__getitem__", "__setitem__", "index_put_", "index_put")  # CPU indices are allowed
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__len__", "__repr__", "__format__")


class OtherDeviceError(RuntimeError):
    """Tensors of different devices met."""


class Placed(torch.Tensor):
    """A CPU tensor that says it lies elsewhere."""

    lies: str

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> Any:
        return nn.Parameter(data, requires_grad)  # as accelerate makes one, of the class of the one before

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> Placed:
        return placed(_plain(self).clone(), self.lies)

    def numpy(self) -> Any:
        raise TypeError(f"can't convert a tensor on {self.lies} to numpy")


def placed(tensor: torch.Tensor, device: Any) -> Any:
    """A CPU tensor as one on a device that isn't there; itself for one that is."""
    if not _virtual(device):
        return _plain(tensor)
    found = _plain(tensor).as_subclass(Placed)
    device = torch.device(device)
    found.lies = f"{KIND}:{device.index or 0}"
    return found


class _Known(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _run(func, args, kwargs or {})


def devices() -> TorchFunctionMode:
    """A context in which such devices exist."""
    return _Known()


def _virtual(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == KIND


def _plain(value: Any) -> Any:
    if not isinstance(value, Placed):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(torch.Tensor)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "")
    found = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    wheres = list(dict.fromkeys(t.lies for t in found if isinstance(t, Placed)))
    if func == torch.Tensor.device.__get__ and wheres:
        return torch.device(wheres[0])
    if name == "to" or name == "cpu":
        return _moved(func, args, kwargs)
    device = kwargs.get("device")
    if not wheres and not _virtual(device):
        return func(*args, **kwargs)
    if name not in MOVES and name not in READS:
        _check(name, args, found)
    if device is not None:
        kwargs = {**kwargs, "device": "cpu" if _virtual(device) else device}
    target = device if device is not None else wheres[0]
    if name == "copy_" or name == "set_" or name == "__setitem__":
        target = getattr(args[0], "lies", "cpu")
    out = func(*args, **kwargs)
    if name.startswith("__set") or name in READS:
        return out

    def mark(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, Placed) or any(value is t for t in found):
            return value
        return placed(value, target)

    return tree_map(mark, out)


def _check(name: str, args: Any, found: list[torch.Tensor]) -> None:
    if name in INDEXES:
        own, rest = args[0], [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
        home = getattr(own, "lies", "cpu")
        wrong = [t.lies for t in rest if isinstance(t, Placed) and t.lies != home]
        if wrong:
            raise OtherDeviceError(f"{name}: indices on {wrong[0]} for a tensor on {home}")
        if name == "__setitem__":
            return  # what is put in is copied, from wherever it is
        found = [own, *(t for t in tree_leaves(args[2:]) if isinstance(t, torch.Tensor))]
    others = [getattr(t, "lies", "cpu") for t in found if t.ndim or isinstance(t, Placed)]
    if len(set(others)) > 1 and not name.startswith("__get"):
        raise OtherDeviceError(f"{name}: Expected all tensors to be on the same device, found {sorted(set(others))}")


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    own, rest = args[0], list(args[1:])
    device = kwargs.pop("device", "cpu" if func is torch.Tensor.cpu else None)
    if rest and isinstance(rest[0], torch.Tensor):
        other = rest.pop(0)
        device, rest = getattr(other, "lies", other.device), [other.dtype, *rest]
    elif rest and isinstance(rest[0], str | int | torch.device):
        device = rest.pop(0)
    target = getattr(own, "lies", None) if device is None else torch.device(device)
    if target is not None and torch.device(target).type == "meta":
        rest.insert(0, "meta")
    out = func(own, *rest, **kwargs)
    if out is own:
        if target is None or str(target) == getattr(own, "lies", str(own.device)):
            return own
        out = own.view_as(own)
    return placed(out, target or "cpu") if _virtual(target) else _plain(out)


def halves(handle: Handle, first: str, second: str) -> dict[str, str]:
    """A device map: embedding and the first half of the blocks in one place, the rest in another; a tied head with its
    embedding."""
    blocks, found = list(handle.blocks), dict[str, str]()
    inside = {module for block in blocks for module in block.modules()}
    for module, name in handle.module_names.items():
        if module in blocks:
            found[name] = second if blocks.index(module) >= len(blocks) // 2 else first
        elif module not in inside and next(named_module_tensors(module), None) is not None:
            found[name] = second if second in found.values() else first
    if handle.tied:
        found[handle.module_names[handle.model.get_output_embeddings()]] = first
    return found


@contextlib.contextmanager
def spread(handle: Handle, first: str, second: str, folder: Any = None) -> Iterator[None]:
    """A CPU model in two halves, hooked by accelerate; it stays so, and its devices exist inside.

    Args:
        handle: on a model in memory.
        first: "lazy:0", or "cpu" with a second half on disk.
        second: "lazy:1"; "cpu": kept there and brought to the first device for each pass; "disk": the same from disk.
        folder: for what is on disk.
    """
    with devices():
        put(handle, first, second, folder)
        yield


def put(handle: Handle, first: str, second: str, folder: Any = None) -> None:
    """The same where such devices exist already."""
    from accelerate import dispatch_model

    skipped = getattr(handle.model, "_skip_keys_device_placement", None)
    where = halves(handle, first, second)
    dispatch_model(handle.model, where, first, offload_dir=folder, skip_keys=skipped, force_hooks=True)
    handle.model.requires_grad_(False)
