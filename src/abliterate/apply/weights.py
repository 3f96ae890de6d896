"""An edit baked into the weights in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abliterate.apply.biases import give_biases, take_biases
from abliterate.apply.norms import removed_keeping_norms
from abliterate.apply.removal import removed, weight_factors
from abliterate.apply.shifts import bias_additions, check_shifts
from abliterate.common.errors import ModelError, NonFiniteError
from abliterate.edit.edit import Edit
from abliterate.models.handle import Handle


@torch.no_grad()
def bake(handle: Handle, edit: Edit, *, keep_tied: bool = False, norm_preserving: bool = False) -> None:
    """W <- W - a r (r^T W), b <- b - a r (r^T b) at every writer of the edit; arithmetic in float32.

    A tied embedding that the edit touches is untied first, so that the head, and with it the logits, stay
    what they are with the edit attached live; `keep_tied` edits embedding and head together instead.
    A shift goes into a bias of its block that reaches the stream as it is; where a switch in the model's config gives
    its class such biases, the model is given them (`apply.biases`).
    `norm_preserving` gives each vector along d_model of a weight its former norm (`apply.norms`).
    All new values are computed and checked before the first is written.

    Raises:
        ModelError: when the model is quantised, so that its weights can't be changed.
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
    except BaseException:
        take_biases(handle, given)
        raise
    embedding = getattr(handle.embedding, "weight", None)
    if handle.tied and not keep_tied and any(p is embedding for p, _ in changes):
        untie(handle)
    for parameter, new in changes:
        parameter.copy_(new)


def _changes(handle: Handle, edit: Edit, norm_preserving: bool) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter that an edit changes and its new values, checked."""
    parameters = dict(handle.model.named_parameters())
    changes: list[tuple[nn.Parameter, Tensor]] = []
    for writer, change in weight_factors(handle, edit.parts):
        weight = parameters[writer.name]
        take_out = removed_keeping_norms if norm_preserving and weight.ndim > 1 else removed
        changes.append((weight, take_out(weight, change, writer.axis)))
        if writer.bias:
            bias = parameters[writer.bias]
            changes.append((bias, removed(bias, change, writer.bias_axis)))
        if not all(bool(new.isfinite().all()) for _, new in changes[-2:]):
            raise NonFiniteError(f"baking {writer.name} gives NaN or infinite values; try --dtype float32")
    done = {id(parameter): new for parameter, new in changes}
    for parameter, addition in bias_additions(handle, edit.shifts):
        edited = done.get(id(parameter), parameter).float() + addition
        changes.append((parameter, edited.to(parameter.dtype)))
    return changes


def untie(handle: Handle) -> None:
    """Give the head a weight of its own, equal to the embedding's, and say so in the config."""
    head = handle.model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    config = handle.model.config
    for level in {id(c): c for c in (config, getattr(config, "get_text_config", lambda: config)())}.values():
        if hasattr(level, "tie_word_embeddings"):
            level.tie_word_embeddings = False
