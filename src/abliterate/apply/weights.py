"""An edit baked into the weights in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from abliterate.apply.biases import give_biases, take_biases
from abliterate.apply.removal import removed, weight_factors
from abliterate.apply.shifts import bias_additions, check_shifts
from abliterate.common.errors import ModelError, NonFiniteError, WriterError
from abliterate.edit.edit import Edit
from abliterate.models.handle import Handle
from abliterate.models.placement import offloaded, sharded
from abliterate.models.pretrained import text_config
from abliterate.models.quantised import is_plain
from abliterate.models.writers import NO_WEIGHT


@torch.no_grad()
def bake(handle: Handle, edit: Edit, *, keep_tied: bool = False, norm_preserving: bool = False) -> None:
    """W <- W - a r (r^T W), b <- b - a r (r^T b) at every writer of the edit; arithmetic in float32.

    A tied embedding that the edit touches is untied first, so that the head, and with it the logits, stay
    what they are with the edit attached live; `keep_tied` edits embedding and head together instead.
    A shift goes into a bias of its block that reaches the stream as it is; where a switch in the model's config gives
    its class such biases, the model is given them (`apply.biases`).
    `norm_preserving` gives each vector along d_model of a weight its former norm (`removal.removed`).
    All new values are computed and checked before the first is written, a parameter at a time: once to be checked, and
    once to be written.

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
        handle.workers = None  # their replicas have the weights of before
        for name, _, new in changes:
            if not bool(new().isfinite().all()):
                raise NonFiniteError(f"baking {name} gives NaN or infinite values; try --dtype float32")
    except BaseException:
        take_biases(handle, given)
        raise
    embedding = getattr(handle.embedding, "weight", None)
    if handle.tied and not keep_tied and any(parameter is embedding for _, parameter, _ in changes):
        untie(handle)
    for _, parameter, new in changes:
        parameter.copy_(new())


def _changes(
    handle: Handle, edit: Edit, norm_preserving: bool
) -> list[tuple[str, nn.Parameter, Callable[[], Tensor]]]:  # fmt: skip
    """Each parameter that an edit changes, by name, and what gives its new values."""
    parameters = dict(handle.model.named_parameters())
    changes: dict[str, Callable[[], Tensor]] = {}
    elsewhere = "kept on disk or CPU" if offloaded(handle.model) else ""
    for writer, change in weight_factors(handle, edit.parts):
        if writer.at:
            raise WriterError(f"{writer.name} {NO_WEIGHT}")
        weight = parameters[writer.name]
        away = "spread over processes" if sharded(weight) else elsewhere
        if away or not is_plain(weight):
            kind = f"{type(weight.data).__name__} of {str(weight.dtype).removeprefix('torch.')}"
            what = away or f"no plain float weight ({kind})"
            raise ModelError(
                f"{handle.source}: {writer.name} is {what} and can't be changed in memory; apply the recipe to the "
                "model's files (--as checkpoint)"
            )
        keep = norm_preserving and weight.ndim > 1
        changes[writer.name] = partial(removed, weight, change, writer.axis, keep_norms=keep)
        if writer.bias:
            changes[writer.bias] = partial(removed, parameters[writer.bias], change, writer.bias_axis)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for parameter, addition in bias_additions(handle, edit.shifts):
        before = changes.get(names[id(parameter)], parameter.detach)
        changes[names[id(parameter)]] = partial(_added, before, addition)
    return [(name, parameters[name], new) for name, new in changes.items()]


def _added(before: Callable[[], Tensor], addition: Tensor) -> Tensor:
    values = before()
    return (values.float() + addition).to(values.dtype)


def untie(handle: Handle) -> None:
    """Give the head a weight of its own, equal to the embedding's, and say so in the config."""
    head = handle.model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    config = handle.model.config
    for level in {id(c): c for c in (config, text_config(config))}.values():
        if hasattr(level, "tie_word_embeddings"):
            level.tie_word_embeddings = False
