"""Biases that a model's class can have and the model hasn't: found by its config's own switches, and given.

Llama, say, writes to the stream without biases; with `mlp_bias` in its config the class has them. A model given zero
biases that way computes what it did, loads in plain transformers, and can hold a shift. Which field does it is found by
trying: the class is built with each field set, without weights, and the block's output has to move by what is added
to one of the new biases.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from abliterate.apply.shifts import bias_holder
from abliterate.common.errors import WriterError
from abliterate.edit.edit import Shift
from abliterate.models.handle import Handle
from abliterate.models.pretrained import text_config
from abliterate.models.writers import layout


@dataclass(frozen=True)
class Switch:
    """A field of a config that gives the class biases.

    Attributes:
        field: its name in the (text) config; setting it to True gives them.
        biases: parameter name -> shape of all that it adds.
    """

    field: str
    biases: dict[str, tuple[int, ...]]


def find_switch(config: Any, source: str, layers: Sequence[int]) -> Switch | None:
    """The field of a config that gives the class biases which can hold a shift at each of these blocks' outputs.

    No table of classes: every field that is off and has "bias" in its name is tried on a skeleton of the model.
    It has to add biases and change no other parameter.

    Args:
        config: a transformers config; it is not changed.
        source: the model's name, for errors.
        layers: the blocks.

    Returns:
        None where no field does.
    """
    from abliterate.models.stored import skeleton_of

    fields = [name for name, value in vars(text_config(config)).items() if value is False and "bias" in name.lower()]
    if not fields:
        return None
    before = _shapes(skeleton_of(config, source))
    for field in sorted(fields, key=lambda name: "mlp" not in name):  # the MLP adds last
        try:
            handle = skeleton_of(with_biases(config, field), source)
            after = _shapes(handle)
            added = {name: shape for name, shape in after.items() if name not in before}
            same = all(after.get(name) == shape for name, shape in before.items())
            if same and added and all(n.endswith("bias") and len(s) == 1 for n, s in added.items()):
                for layer in layers:
                    bias_holder(handle, layer)
                return Switch(field, added)
        except (WriterError, ValueError, TypeError, RuntimeError):  # a class may refuse a field, or not run with it
            continue
    return None


def with_biases(config: Any, field: str) -> Any:
    """A copy of a config with a switch set."""
    changed = copy.deepcopy(config)
    setattr(text_config(changed), field, True)
    return changed


def give_biases(handle: Handle, shifts: Sequence[Shift]) -> Switch | None:
    """Give a loaded model zero biases, if that is what its blocks need to hold these shifts; its config says so then.

    Returns:
        What was switched on, for `take_biases`; None when every block has a bias already, or the class has none to give
        (`shifts.bias_additions` then says so).
    """
    layers = sorted({shift.layer for shift in shifts})
    if not layers or not lacking(handle, layers):
        return None
    switch = find_switch(handle.model.config, handle.source, layers)
    if switch is None:
        return None
    for name, shape in switch.biases.items():
        module, _, leaf = name.rpartition(".")
        owner = handle.model.get_submodule(module)
        weight = next(owner.parameters(recurse=False))
        zeros = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        owner.register_parameter(leaf, nn.Parameter(zeros, requires_grad=False))
    setattr(text_config(handle.model.config), switch.field, True)
    _note_biases(handle, switch, given=True)
    return switch


def take_biases(handle: Handle, switch: Switch | None) -> None:
    """Undo `give_biases`."""
    if switch is None:
        return
    for name in switch.biases:
        module, _, leaf = name.rpartition(".")
        setattr(handle.model.get_submodule(module), leaf, None)
    setattr(text_config(handle.model.config), switch.field, False)
    _note_biases(handle, switch, given=False)


def _note_biases(handle: Handle, switch: Switch, *, given: bool) -> None:
    """Let the handle's writers know of their biases, without another look at the model."""
    found = layout(handle)
    writers = []
    for writer in found.writers:
        name = f"{writer.module}.bias"
        mine = bool(writer.module) and name in switch.biases and len(writer.shape) == 2
        writers.append(replace(writer, bias=name if given else None) if mine else writer)
    handle.__dict__["_layout"] = found._replace(writers=tuple(writers))


def lacking(handle: Handle, layers: Sequence[int]) -> list[int]:
    """The blocks among these that have no bias that can hold a shift of their output."""
    found = []
    for layer in layers:
        try:
            bias_holder(handle, layer)
        except WriterError:
            found.append(layer)
    return found


def _shapes(handle: Handle) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in handle.model.named_parameters()}
