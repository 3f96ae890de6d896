"""An edit baked into the weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.apply.biases import give_biases, take_biases
from abliterate.apply.removal import pieces, removed, weight_factors
from abliterate.apply.shifts import bias_additions, check_shifts
from abliterate.common.errors import ModelError, NonFiniteError, WriterError
from abliterate.edit.edit import Edit
from abliterate.models.handle import Handle
from abliterate.models.placement import offloaded, sharded
from abliterate.models.pretrained import text_config
from abliterate.models.quantised import is_plain
from abliterate.models.writers import NO_WEIGHT

Values = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # views of a parameter, and what is to be in them


@torch.no_grad()
def bake(handle: Handle, edit: Edit, *, keep_tied: bool = False, norm_preserving: bool = False) -> None:
    """W <- W - a r (r^T W), b <- b - a r (r^T b) at every writer of the edit; arithmetic in float32.

    A tied embedding that the edit touches is untied first, so that the head, and with it the logits, stay
    what they are with the edit attached live; `keep_tied` edits embedding and head together instead.
    A shift goes into a bias of its block that reaches the stream as it is; where a switch in the model's config gives
    its class such biases, the model is given them (`apply.biases`).
    `norm_preserving` gives each vector along d_model of a weight its former norm (`removal.removed`).
    All new values are computed twice, some rows of one writer at a time: once to be checked, all of them before the
    first is written, and once to be written. Memory: 100 MB or so, and the head's own weight where it is untied.

    Raises:
        ModelError: when a weight can't be changed: it is quantised, offloaded, or one of several processes' shards.
        NonFiniteError: when a result is not finite (half precision overflowed).
        WriterError: when the edit is for another model, or shifts a block that has no bias to hold it.
    """
    if handle.quantised:
        raise ModelError(
            f"{handle.source} is loaded in {handle.quantised} and its weights can't be changed; "
            "load it without --quantise"
        )
    check_shifts(handle, edit.shifts)
    given = give_biases(handle, edit.shifts)
    try:
        changes = _changes(handle, edit, norm_preserving)
        for name, new in changes.items():
            if not all(bool(values.isfinite().all()) for _, values in new()):
                raise NonFiniteError(f"baking {name} gives NaN or infinite values; try --dtype float32")
        embedding = getattr(handle.embedding, "weight", None)
        if handle.tied and not keep_tied and any(handle.model.get_parameter(name) is embedding for name in changes):
            untie(handle)
    except BaseException:
        take_biases(handle, given)
        raise
    handle.workers = None  # their replicas have the weights of before
    for new in changes.values():
        for view, values in new():
            view.copy_(values)


def _changes(handle: Handle, edit: Edit, norm_preserving: bool) -> dict[str, Values]:
    """Each parameter that an edit changes, by name, and what gives views of it with their new values."""
    parameters = dict(handle.model.named_parameters())
    taken: dict[str, dict[str, Any]] = {}
    for writer, change in weight_factors(handle, edit.parts):
        if writer.at:
            raise WriterError(f"{writer.name} {NO_WEIGHT}")
        keep = norm_preserving and len(writer.shape) > 1
        taken[writer.name] = {"change": change, "axis": writer.axis, "keep_norms": keep}
        if writer.bias:
            taken[writer.bias] = {"change": change, "axis": writer.bias_axis}
    for name in taken:
        _check_in_memory(handle, name, parameters[name])
    changes: dict[str, Values] = {name: partial(pieces, parameters[name], **how) for name, how in taken.items()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    for bias, addition in bias_additions(handle, edit.shifts):
        name = names[id(bias)]
        _check_in_memory(handle, name, bias)
        changes[name] = partial(_shifted, bias, taken.get(name), addition)
    return changes


def _shifted(bias: nn.Parameter, how: dict[str, Any] | None, addition: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A bias as a whole, with its values when something is taken out of it, or not, and something added."""
    before = removed(bias, **how) if how else bias.detach()
    yield bias.detach(), (before.float() + addition).to(before.dtype)


def _check_in_memory(handle: Handle, name: str, parameter: nn.Parameter) -> None:
    """Raise ModelError when a parameter's values can't be changed where they are."""
    away = "spread over processes" if sharded(parameter) else "kept on disk or CPU" if offloaded(handle.model) else ""
    if away or not is_plain(parameter):
        kind = f"{type(parameter.data).__name__} of {str(parameter.dtype).removeprefix('torch.')}"
        raise ModelError(
            f"{handle.source}: {name} is {away or f'no plain float weight ({kind})'} and can't be changed in memory; "
            "apply the recipe to the model's files (--as checkpoint)"
        )


def untie(handle: Handle) -> None:
    """Give the head a weight of its own, equal to the embedding's, and say so in the config."""
    head = handle.model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    config = handle.model.config
    for level in {id(c): c for c in (config, text_config(config))}.values():
        if hasattr(level, "tie_word_embeddings"):
            level.tie_word_embeddings = False
