"""How an adapter holds an edit: what goes into LoRA layers, into parameters, into biases, and into edited copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from abliterate.apply.parameters import Parameters
from abliterate.apply.removal import removed
from abliterate.apply.shifts import check_shifts, multiple, total
from abliterate.common.errors import shorten
from abliterate.edit.algebra import Factors, factors
from abliterate.models.outputs import adding, block_output, changed
from abliterate.models.writers import Writer, layout

if TYPE_CHECKING:
    from abliterate.edit.recipe import Recipe
    from abliterate.models.handle import Handle


@dataclass
class Plan:
    """How an adapter holds an edit.

    Attributes:
        modules: module name -> its writer and change, held by a LoRA layer.
        parameters: the same by name of the parameter, held by `target_parameters`: fused experts, their biases.
        biases: module name -> what is added to its bias, [d_model] float32, held by `lora_bias`.
        copies: module name -> changes of its parameters, held by an edited copy (`modules_to_save`).
        skipped: (writer, why) of what the adapter doesn't hold.
        notes: what a user should know.
    """

    modules: dict[str, tuple[Writer | None, Factors]] = field(default_factory=dict)
    parameters: dict[str, tuple[Writer, Factors]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, list[tuple[Writer, Factors]]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> dict[str, int]:
        """Module or parameter name -> rank of its factors."""
        return {name: max(1, len(change.left)) for name, _, change in self.changes()}

    @property
    def writers(self) -> set[str]:
        """The names of the writers that it holds."""
        copied = [writer.name for changes in self.copies.values() for writer, _ in changes]
        return {*copied, *(writer.name for _, writer, _ in self.changes() if writer is not None)}

    def changes(self) -> Iterator[tuple[str, Writer | None, Factors]]:
        """(module or parameter name, writer, change) of all that LoRA factors hold."""
        for name, (writer, change) in self.modules.items():
            yield name, writer, change
        for name, (owner, change) in self.parameters.items():
            yield name, owner, change


def make_plan(source: Parameters, recipe: Recipe) -> Plan:
    """Decide how each part of an edit is held; of the values only gains and biases are read.

    Raises:
        WriterError: when the edit is for another model.
    """
    handle, edit = source.handle, recipe.edit
    handle.check_width(edit.d_model, "the edit's directions")
    plan = Plan()
    modules = dict(handle.model.named_modules())
    biases: dict[str, Tensor] = {}
    parts = edit.parts
    for name, writer in source.named(list(parts)).items():
        change = factors(parts[name], source.gain(writer), writer.centred)
        module = modules[writer.module]
        why = _refused(handle, writer, module)
        if why:
            plan.skipped.append((writer.name, why))
        elif len(change.left) == 0:
            plan.notes.append(f"{writer.name}: the norm behind it lets nothing of the direction through")
        elif len(writer.shape) == 1 or (isinstance(module, nn.Embedding) and not _looks_up(module)):
            plan.copies.setdefault(writer.module, []).append((writer, change))
        elif len(writer.shape) == 2:
            plan.modules[writer.module] = (writer, change)
        else:
            plan.parameters[writer.name] = (writer, change)
        bias = source.bias(writer) if writer.name not in dict(plan.skipped) else None
        if bias is not None and len(change.left):
            difference = removed(bias.float(), change, writer.bias_axis) - bias.float()
            if bias.ndim > 1:
                plan.parameters[str(writer.bias)] = (writer, change)
            elif bool(difference.any()):
                biases[writer.module] = difference
    shifts = _shift_biases(handle, recipe, plan)
    _place_biases(plan, modules, biases, shifts)
    plan.notes += [f"left out: {name} ({why})" for name, why in plan.skipped]
    return plan


def _place_biases(
    plan: Plan, modules: Mapping[str, nn.Module], biases: Mapping[str, Tensor], shifts: Mapping[str, Tensor]
) -> None:
    """By `lora_bias` where every LoRA layer has a bias or a shift asks for it, else by copies of the biased layers."""
    if shifts and plan.parameters:
        plan.skipped += [(f"shift at {name}", "PEFT holds no bias beside fused experts") for name in shifts]
        shifts = {}
    embeddings = [name for name in plan.modules if isinstance(modules[name], nn.Embedding)]
    linear = [name for name in plan.modules if name not in embeddings]
    all_biased = all(getattr(modules[name], "bias", None) is not None for name in linear)
    if not shifts and not (biases and all_biased and not plan.parameters):
        for name in biases:
            _copy_instead(plan, name)
        return
    for name in embeddings:
        _copy_instead(plan, name)
    plan.biases = dict(biases)
    for name, vector in shifts.items():
        plan.biases[name] = plan.biases.get(name, torch.zeros_like(vector)) + vector
        nothing = Factors(np.zeros((0, len(vector)), np.float32), np.zeros((0, len(vector)), np.float32))
        plan.modules.setdefault(name, (None, nothing))
    if any(getattr(modules[name], "bias", None) is None for name in plan.modules):
        plan.notes.append(
            "it can be attached, not merged: it adds to what layers without a bias write, and PEFT gives them none"
        )


def _copy_instead(plan: Plan, name: str) -> None:
    writer, change = plan.modules.pop(name)
    assert writer is not None
    plan.copies.setdefault(name, []).append((writer, change))


def _refused(handle: Handle, writer: Writer, module: nn.Module) -> str:
    """Why PEFT won't hold a writer; empty if it will."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    # PEFT knows that Mamba's kernels read this weight past the module that holds it
    check = getattr(LoraModel, "_check_target_module_compatiblity", None)
    if check is not None:
        try:
            check(None, LoraConfig(), handle.model, writer.module.rpartition(".")[2])
        except ValueError as error:
            return f"PEFT refuses it: {shorten(str(error), 90)}"
    if len(writer.shape) > 3:
        return f"it has {len(writer.shape)} dimensions"
    if len(writer.shape) == 2 and not (isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)):
        return f"PEFT has no LoRA for {type(module).__name__}"
    return ""


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _looks_up(module: nn.Module) -> bool:
    """Whether an embedding looks up the ids it is given, as PEFT's does; OPT's positions are counted from a mask."""
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")


def _shift_biases(handle: Handle, recipe: Recipe, plan: Plan) -> dict[str, Tensor]:
    """Module name -> what its output needs added so that its block's output is shifted as the edit says."""
    shifts = recipe.edit.shifts
    check_shifts(handle, shifts)
    found: dict[str, Tensor] = {}
    for layer in sorted({shift.layer for shift in shifts}):
        vector = total(shifts, layer)
        module, scale = _writes_as_it_is(handle, layer)
        if module is None:
            plan.skipped.append((f"shift at block {layer}", "no linear layer's output reaches its output as it is"))
        else:
            found[module] = vector / scale
    return found


def _writes_as_it_is(handle: Handle, layer: int) -> tuple[str | None, float]:
    """A block's last linear layer to whose output v can be added so that the block's output moves by scale * v at
    every token, and the scale. Found by trying: not one behind a norm, nor one whose sum an MLP reads."""
    before = block_output(handle, layer)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(handle.d_model, generator=generator)
    vector *= before.norm(dim=-1).mean() / vector.norm()
    modules = dict(handle.model.named_modules())
    for writer in reversed([w for w in layout(handle).writers if w.layer == layer and len(w.shape) == 2]):
        if _refused(handle, writer, modules[writer.module]):
            continue
        with changed([(modules[writer.module], adding(vector))]):
            moved = block_output(handle, layer) - before
        scale = multiple(moved, vector, before, handle.dtype)
        if scale is not None:
            return writer.module, scale
    return None, 0.0
