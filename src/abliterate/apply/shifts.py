"""Shifts, h <- h + c r at a block's output: live in a hook, or in a bias that reaches the stream as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.common.errors import WriterError
from abliterate.edit.edit import Shift, normalised
from abliterate.models.handle import Handle
from abliterate.models.outputs import block_output
from abliterate.models.placement import at_hand
from abliterate.models.writers import Writer, layout


class Holder(NamedTuple):
    """A bias that can hold a shift: adding v to it along `axis` adds scale * v to its block's output."""

    name: str
    axis: int
    scale: float


def check_shifts(handle: Handle, shifts: Sequence[Shift]) -> None:
    """Raise WriterError when a shift is beyond the model's blocks or of another width."""
    for shift in shifts:
        if shift.layer >= handle.layers:
            raise WriterError(
                f"the edit shifts at layer {shift.layer}, {handle.source} has layers 0 to {handle.layers - 1}; "
                "is it for another model?"
            )
        handle.check_width(len(shift.direction), "the edit's shifts")


def bias_holder(handle: Handle, layer: int) -> Holder:
    """The bias of a block that can hold a shift of its output, the block's last if there are several.

    Found by trying: a vector as large as the stream is added to the bias, and the block's output has to
    move by a multiple of it, the same at every token. That leaves out biases behind a norm, of an attention that an MLP
    reads after it, or of experts whose gates don't add up to the same for every token.

    Raises:
        WriterError: when the block has none.
    """
    before = block_output(handle, layer)
    generator = torch.Generator().manual_seed(0)
    vector = torch.from_numpy(normalised(torch.randn(handle.d_model, generator=generator))) * before.norm(dim=-1).mean()
    for writer in reversed([w for w in layout(handle).writers if w.layer == layer]):
        name, axis = _bias_of(writer)
        if name is None:
            continue
        owner, _, own = name.rpartition(".")
        module = handle.model.get_submodule(owner)
        with at_hand(module), _added(module.get_parameter(own), vector, axis):
            moved = block_output(handle, layer) - before
        scale = multiple(moved, vector, before, handle.dtype)
        if scale is not None:
            return Holder(name, axis, scale)
    raise WriterError(
        f"{type(handle.model).__name__} {handle.source}: block {layer} has no bias that reaches its output as it is, "
        "so its weights can't hold a shift; these forms can: adapter (with lora_bias), control-vector, hooks"
    )


def multiple(
    moved: Float[Tensor, "token d_model"], vector: Float[Tensor, " d_model"], before: Float[Tensor, "token d_model"],
    dtype: torch.dtype,
) -> float | None:  # fmt: skip
    """The number that a vector was multiplied by to move the stream so, at every token alike; None where there is none.

    Args:
        moved: by how much the stream moved.
        vector: what was added somewhere.
        before: the stream before, for what rounding in `dtype` explains.
        dtype: the model's.
    """
    scale, eps = float((moved @ vector).mean() / (vector @ vector)), torch.finfo(dtype).eps
    if abs(scale) <= 1e-3 or (moved - scale * vector).norm(dim=-1).max() > 32 * eps * before.norm(dim=-1).max():
        return None
    return 1.0 if abs(scale - 1) < 8 * eps else scale


def bias_additions(handle: Handle, shifts: Sequence[Shift]) -> list[tuple[nn.Parameter, Float[Tensor, ...]]]:
    """What to add to which bias, float32 and of its shape, so that the weights hold the shifts; one entry per bias.

    Raises:
        WriterError: when a shift is for another model, or a block has no bias that can hold it.
    """
    check_shifts(handle, shifts)
    additions = []
    for layer in sorted({shift.layer for shift in shifts}):
        vector = total(shifts, layer)
        name, axis, scale = bias_holder(handle, layer)
        parameter = handle.model.get_parameter(name)
        additions.append((parameter, _along(vector / scale, parameter, axis)))
    return additions


def total(shifts: Sequence[Shift], layer: int) -> Float[Tensor, " d_model"]:
    """What is added at a block's output in all, float32."""
    return torch.stack([torch.from_numpy(shift.vector) for shift in shifts if shift.layer == layer]).sum(0)


def _bias_of(writer: Writer) -> tuple[str | None, int]:
    """The parameter that adds the same to every token at this writer: its bias, or itself if it is a norm's bias."""
    return (writer.name, writer.axis) if len(writer.shape) == 1 else (writer.bias, writer.bias_axis)


def _along(vector: Tensor, parameter: Tensor, axis: int) -> Tensor:
    shape = [1] * parameter.ndim
    shape[axis] = len(vector)
    return vector.to(parameter.device).view(shape).expand(parameter.shape)


@contextlib.contextmanager
def _added(parameter: nn.Parameter, vector: Tensor, axis: int) -> Iterator[None]:
    """A vector added to a bias for as long as the context lasts; the bias is then what it was, bit for bit."""
    was = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(was.float() + _along(vector, parameter, axis))
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(was)
