"""The biases of a checkpoint that hold an edit's shifts, found on a skeleton of its model. This is the part that needs
torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from abliterate.apply.biases import Switch, find_switch, lacking, with_biases
from abliterate.apply.checkpoint.blocks import FLOATS
from abliterate.apply.shifts import bias_additions, check_shifts
from abliterate.common.errors import WriterError
from abliterate.edit.edit import Shift
from abliterate.models.handle import Handle
from abliterate.models.shards import Checkpoint, NewTensor
from abliterate.models.stored import names_in, skeleton, skeleton_of, stored_tensors
from abliterate.models.writers import layout


class HeldShifts(NamedTuple):
    """How a checkpoint holds an edit's shifts.

    Attributes:
        additions: stored bias -> what is added to it, float32, in rows of d_model.
        tensors: biases that the checkpoint lacks; file: the shard that these go into.
        switch: the field of config.json that has to be true for them to be read; empty without any.
        shifted: how many of them are not zero.
    """

    additions: dict[str, np.ndarray[Any, Any]]
    tensors: Sequence[NewTensor] = ()
    file: str = ""
    switch: str = ""
    shifted: int = 0


def held_shifts(shifts: Sequence[Shift], checkpoint: Checkpoint) -> HeldShifts:
    """The biases that hold an edit's shifts: the checkpoint's own, or ones that a switch in its config gives its class.

    Raises:
        WriterError: when a block has no bias that can hold its shift; says which forms can.
    """
    handle = skeleton(checkpoint.folder)
    check_shifts(handle, shifts)
    layers = sorted({shift.layer for shift in shifts})
    switch = find_switch(handle.model.config, handle.source, layers) if lacking(handle, layers) else None
    if switch is None:
        return HeldShifts(_shift_additions(handle, shifts, checkpoint))
    return _with_new_biases(handle, switch, shifts, checkpoint)


def _shift_additions(
    handle: Handle, shifts: Sequence[Shift], checkpoint: Checkpoint
) -> dict[str, np.ndarray[Any, Any]]:  # fmt: skip
    """Stored bias -> what is added to its rows, so that it holds the shifts."""
    owners = {id(p): name for name, p in handle.model.named_parameters()}
    known = stored_tensors(handle, names_in(handle.model, checkpoint.files))
    additions = {}
    for parameter, addition in bias_additions(handle, shifts):
        name = owners[id(parameter)]
        writer = next(w for w in layout(handle).writers if name in (w.name, w.bias))
        entries = [t for t in known[writer.name] if t.bias or name == writer.name]
        if len(entries) != 1 or entries[0].shape != tuple(addition.shape):
            raise WriterError(
                f"{name}, which would hold the shift, is stored as {len(entries)} tensors in {checkpoint.folder}; "
                "these forms can hold it: adapter (with lora_bias), control-vector, hooks"
            )
        additions[entries[0].name] = addition.float().reshape(-1, addition.shape[-1]).numpy()
    return additions


def _with_new_biases(
    handle: Handle, switch: Switch, shifts: Sequence[Shift], checkpoint: Checkpoint
) -> HeldShifts:  # fmt: skip
    """All biases that a switch gives a class: zeros, but for those that hold the shifts."""
    switched = skeleton_of(with_biases(handle.model.config, switch.field), handle.source)
    owners = {id(p): name for name, p in switched.model.named_parameters()}
    values = {owners[id(p)]: addition for p, addition in bias_additions(switched, shifts)}
    sources = names_in(handle.model, checkpoint.files)
    tensors, file = [], ""
    for name, shape in switch.biases.items():
        weights = sources.get(f"{name.removesuffix('bias')}weight", [])
        dtype = checkpoint.tensor(weights[0]).dtype if len(weights) == 1 else ""
        if dtype not in FLOATS or not weights[0].endswith("weight"):
            raise WriterError(
                f"{checkpoint.folder}: the weight that {name} would stand beside is not one tensor of 16 bits or more, "
                "so the checkpoint can't hold the shift; these forms can: adapter (with lora_bias), control-vector, "
                "hooks"
            )
        value = values[name].numpy() if name in values else np.zeros(shape, np.float32)
        stored = f"{weights[0].removesuffix('weight')}bias"
        tensors.append(NewTensor(stored, dtype, tuple(shape), value.astype(FLOATS[dtype]).tobytes()))
        file = checkpoint.files[weights[0]] if name in values else file
    return HeldShifts({}, tensors, file, switch.field, len(values))
