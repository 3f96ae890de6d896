"""An edit as a PEFT LoRA: what is taken out of a weight, left^T (right W), already is a product of low rank.

    delta W = -left^T (right W)        B = -left^T,  A = right W        rank = number of directions

Linear layers and embeddings are held by LoRA layers, fused experts (and their biases) by PEFT's `target_parameters`,
biases of linear layers by `lora_bias`. PEFT allows `lora_bias` for all modules of an adapter or none, and not beside
embeddings or parameters; what can't be a LoRA for that reason is held by an edited copy of its module
(`modules_to_save`), which is as exact and as reversible, and larger.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.apply.norms import removed_keeping_norms
from abliterate.apply.parameters import Parameters, open_parameters
from abliterate.apply.removal import removed
from abliterate.apply.shifts import check_shifts, multiple, total
from abliterate.cards.others import adapter_card
from abliterate.common.errors import AbliterateError, NonFiniteError, WriterError, shorten
from abliterate.common.files import check_folder, whole_folder
from abliterate.common.names import is_local, public_name
from abliterate.edit.algebra import Factors, factors
from abliterate.edit.recipe import check_model
from abliterate.models.outputs import adding, block_output, changed
from abliterate.models.pretrained import with_adapter
from abliterate.models.writers import Writer, layout

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions
    from abliterate.common.reporting import Reporter
    from abliterate.edit.recipe import Recipe
    from abliterate.models.handle import Handle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = 2**16  # rows of a weight widened to float64 at once


class LowRank(NamedTuple):
    """A change of a parameter: left @ right, [..., rows, k] and [..., k, columns], float32."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return int(self.left.shape[-1])


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


def apply_adapter(recipe: Recipe, model: str, out: Path, options: ApplyOptions, reporter: Reporter) -> dict[str, Any]:
    """Write a recipe's edit of a model as a PEFT LoRA folder.

    `PeftModel.from_pretrained(base, out)` attaches it, `merge_and_unload()` gives the weights that baking gives,
    `disable_adapter()` and `unload()` give the base back. The weights are read one at a time; a model in a
    safetensors folder is not loaded. `merged` merges into a model whose head is tied to the embedding.

    Args:
        recipe: its edit is applied as it is.
        model: folder, Hub id or GGUF file.
        out: folder to write.
        options: see `forms.ApplyOptions`; `dtype` is that of the factors, float32 by default.
        reporter: told how it goes.

    Returns:
        `form`, `out`, `bytes`, `writers`, `seconds`, `notes`, and `rank`, `skipped` (writer, why),
        `approximation` (relative Frobenius error, mean and worst; None where the adapter is exact), `plan`.

    Raises:
        WriterError: when the edit is for another model, or the adapter can't hold some of it; the text names the
            writers. `options.skip_unsupported` leaves those out instead.
        RecipeError: when the recipe was made for a model of another config, unless `options.force`.
        AbliterateError: on options that have no meaning for an adapter.
    """
    started = time.monotonic()
    _check_options(options)
    if not options.plan:
        check_folder(out, overwrite=options.overwrite)
    reporter.say(f"looking at {model}")
    source = open_parameters(model, options.revision)
    check_model(recipe, source.handle.config_hash, force=options.force)
    plan = make_plan(source, recipe)
    if plan.skipped and not options.skip_unsupported:
        raise WriterError(_unsupported(plan.skipped))
    if not (plan.modules or plan.parameters or plan.copies):
        raise AbliterateError("nothing of the edit is left for an adapter to hold, so none was written")
    summary: dict[str, Any] = {
        "form": "adapter",
        "out": str(out),
        "bytes": 0,
        "writers": len(plan.writers),
        "seconds": 0.0,
        "notes": plan.notes,
        "rank": max(plan.ranks.values(), default=0),
        "skipped": [{"writer": name, "why": why} for name, why in plan.skipped],
        "approximation": None,
        "plan": options.plan,
    }
    dtype = DTYPES[options.dtype or "float32"]
    if options.plan:
        summary["bytes"] = _planned_bytes(source.handle, plan, dtype)
    else:
        base = _base_name(recipe, model)
        tied = source.handle.tied and _name_of(source.handle, source.handle.embedding) in plan.modules
        with whole_folder(out, overwrite=options.overwrite) as temporary:
            errors = _write(temporary, source, plan, base, dtype, options.norm_preserving, reporter)
            summary["approximation"] = _approximation(errors)
            plan.notes += _closing_notes(plan, errors)
            as_measured = options.strength == 1 and not (options.norm_preserving or plan.skipped)
            text = adapter_card(recipe, base, plan.notes, summary["rank"], tied=tied, as_measured=as_measured)
            (temporary / "README.md").write_text(text, encoding="utf-8")
        summary["bytes"] = sum(file.stat().st_size for file in out.iterdir())
    summary["seconds"] = round(time.monotonic() - started, 3)
    return summary


def merged(model: Any, folder: str | Path) -> Any:
    """A transformers model with an adapter merged into its weights, and a head tied to the embedding left as it was.

    Plain `PeftModel.merge_and_unload` changes a tied head along with the embedding; here it is untied first.

    Args:
        model: the base model, as transformers loads it; it is changed.
        folder: the adapter.
    """
    from abliterate.apply.weights import untie
    from abliterate.models.handle import Handle

    handle = Handle(model, None, str(folder))
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    if handle.tied and _name_of(handle, handle.embedding) in (config.get("target_modules") or []):
        untie(handle)
    return with_adapter(model, folder).merge_and_unload()


def _check_options(options: ApplyOptions) -> None:
    if options.in_place:
        raise AbliterateError("an adapter leaves the model's own files alone; leave --in-place out")
    if options.keep_tied:
        raise AbliterateError(
            "an attached adapter leaves a tied head alone; leave --keep-tied out (merging the adapter without "
            "untying first edits embedding and head together)"
        )
    if options.dtype and options.dtype not in DTYPES:
        raise AbliterateError(f"unknown dtype '{options.dtype}'; choose {', '.join(DTYPES)}")


def _unsupported(skipped: Sequence[tuple[str, str]]) -> str:
    shown = "; ".join(f"{name} ({why})" for name, why in skipped[:4])
    more = f"; and {len(skipped) - 4} more" if len(skipped) > 4 else ""
    return (
        f"an adapter can't hold all of this edit: {shown}{more}. Pass --skip-unsupported to leave these out, or use "
        "another form (checkpoint, gguf)"
    )


def make_plan(source: Parameters, recipe: Recipe) -> Plan:
    """Decide how each part of an edit is held; of the values only gains and biases are read.

    Raises:
        WriterError: when the edit is for another model.
    """
    handle, edit = source.handle, recipe.edit
    if edit.d_model != handle.d_model:
        raise WriterError(
            f"the edit's directions have {edit.d_model} entries, {handle.source} has d_model {handle.d_model}; "
            "is it for another model?"
        )
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
    if len(writer.shape) == 2 and not (isinstance(module, nn.Linear | nn.Embedding) or _is_conv1d(module)):
        return f"PEFT has no LoRA for {type(module).__name__}"
    return ""


def _is_conv1d(module: nn.Module) -> bool:
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


def low_rank(weight: Float[Tensor, ...], change: Factors, axis: int) -> LowRank:
    """The change -left^T (right W) of a weight as a product; arithmetic in float64.

    Args:
        weight: 2-D, or 3-D with the experts first; size d_model along `axis`.
        change: from `algebra.factors`.
        axis: dimension that runs along d_model.
    """
    left, right = (torch.from_numpy(factor).double() for factor in change)
    wide = weight.detach().movedim(axis, -1)
    rows = wide.reshape(-1, wide.shape[-1])
    read = torch.cat([block.double() @ right.T for block in rows.split(ROWS)])  # right W, transposed
    read = read.view(*wide.shape[:-1], len(right))
    experts = weight.shape[:-2]
    if axis == weight.ndim - 1:
        return LowRank((-read).float(), left.expand(*experts, *left.shape).float())
    return LowRank((-left.T).expand(*experts, *left.T.shape).float(), read.transpose(-1, -2).float())


def truncated(weight: Float[Tensor, ...], change: Factors, axis: int) -> tuple[LowRank, float]:
    """The best approximation, of the change's rank, of a norm-preserving change of a weight; and its relative error.

    Keeping the norms scales every column by a factor of its own, so the change has full rank. Its singular value
    decomposition cut off after k values is the nearest of rank k (Eckart and Young 1936).

    Returns:
        The factors, and |change - product| / |change| in the Frobenius norm, over all experts.
    """
    wide = weight.detach().double()
    difference = removed_keeping_norms(wide, change, axis) - wide
    k = len(change.left)
    u, s, v = torch.linalg.svd(difference, full_matrices=False)
    root = s[..., :k].sqrt()
    low = LowRank((u[..., :k] * root[..., None, :]).float(), (root[..., :, None] * v[..., :k, :]).float())
    total = s.square().sum()
    error = float((s[..., k:].square().sum() / total).sqrt()) if total > 0 else 0.0
    return low, error


def _edited_copy(
    source: Parameters, module: nn.Module, changes: Sequence[tuple[Writer, Factors]], norm_preserving: bool
) -> dict[str, Tensor]:
    """A module's parameters after the edit, in their own dtype."""
    (writer, _), *_ = changes
    names = [name for name, _ in module.named_parameters(recurse=False)]
    copy = {name: source.sibling(writer, name) for name in names}
    for writer, change in changes:
        name = writer.name.rpartition(".")[2]
        take_out = removed_keeping_norms if norm_preserving and copy[name].ndim > 1 else removed
        copy[name] = take_out(copy[name], change, writer.axis)
        if writer.bias:
            bias = writer.bias.rpartition(".")[2]
            copy[bias] = removed(copy[bias], change, writer.bias_axis)
    return copy


def _planned_bytes(handle: Handle, plan: Plan, dtype: torch.dtype) -> int:
    """About how large adapter_model.safetensors will be."""
    size = torch.finfo(dtype).bits // 8
    shapes = {name: handle.model.get_parameter(name).shape for name in plan.parameters}
    for name in plan.modules:
        weight = handle.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        shapes[name] = weight.shape
    factors_ = sum(plan.ranks[n] * (s[-1] + s[-2]) * (s[0] if len(s) == 3 else 1) for n, s in shapes.items())
    copies = sum(p.numel() for name in plan.copies for p in handle.model.get_submodule(name).parameters(recurse=False))
    return size * (factors_ + sum(len(b) for b in plan.biases.values())) + 2 * copies


def _write(
    folder: Path, source: Parameters, plan: Plan, base: str, dtype: torch.dtype, norm_preserving: bool,
    reporter: Reporter,
) -> dict[str, float]:  # fmt: skip
    """Write config and tensors; returns the relative error of each weight that is only approximated."""
    from safetensors.torch import save_file

    modules = dict(source.handle.model.named_modules())
    tick = reporter.progress("factors of weights", len(plan.ranks) + len(plan.copies))
    lows: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    for name, writer, change in plan.changes():
        if writer is None:
            lows[name] = _nothing(modules[name])
        else:
            lows[name], error = _computed(source, name, writer, change, norm_preserving)
            if error is not None:
                errors[name] = error
        tick(1)
    tensors: dict[str, Tensor] = {}
    for name, changes in plan.copies.items():
        copy = _edited_copy(source, modules[name], changes, norm_preserving)
        tensors.update({f"base_model.model.{name}.{parameter}": value for parameter, value in copy.items()})
        tick(1)
    config, layers, expected = _installed(source.handle, plan, base)
    for name, low in lows.items():
        place, layer = layers[name] if name in layers else layers[f"{name}.weight"]
        placed = _as_lora(place, layer, low, plan.biases.get(name), bool(plan.biases))
        tensors.update({key: tensor.to(dtype) for key, tensor in placed.items()})
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(f"the adapter's {name} would hold NaN or infinite values; try --dtype float32")
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise AbliterateError(f"PEFT would not find {odd[0]} in this adapter ({len(odd)} such names); please report it")
    ready = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(ready, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return errors


def _installed(handle: Handle, plan: Plan, base: str) -> tuple[Any, dict[str, tuple[str, Any]], set[str]]:
    """Let PEFT put its layers into the model: they say what their tensors are called and which way they lie.

    PEFT takes some modules of mixtures for experts by the ends of their names (`down_proj` of a dense block beside
    them); such ones are then named by their weight, which it leaves as it is.

    Returns:
        The config, module or parameter name -> (place, PEFT's layer), and the names of all tensors it will look for.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    modules = dict(handle.model.named_modules())
    by_weight: set[str] = set()
    for _ in range(2):
        config = _config(plan, modules, base, by_weight)
        try:
            with _quiet():
                adapted = get_peft_model(handle.model, config, low_cpu_mem_usage=True)
                expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        except ValueError as error:
            raise WriterError(f"{handle.source}: PEFT can't hold this edit: {shorten(str(error), 200)}") from error
        layers = _layers(adapted)
        wanted = set(plan.ranks) - by_weight | {f"{name}.weight" for name in by_weight}
        if set(layers) == wanted:
            # as asked for: what PEFT made of it here, it makes of it again when it is loaded
            return _config(plan, modules, base, by_weight), layers, expected
        by_weight |= {name for name in plan.modules if name not in layers}
        adapted.unload()
    odd = sorted(set(layers) ^ wanted)
    raise WriterError(f"{handle.source}: PEFT can't be told to hold {odd[0]} and the others of this edit alone")


def _computed(
    source: Parameters, name: str, writer: Writer, change: Factors, norm_preserving: bool
) -> tuple[LowRank, float | None]:
    """The change of a weight, or of a bias that each expert has one of; and its error where it is approximated."""
    if name == writer.bias:
        bias = source.bias(writer)
        assert bias is not None
        return low_rank(bias, change, writer.bias_axis), None
    weight = source.value(writer)
    if not bool(weight.isfinite().all()):
        raise NonFiniteError(f"{source.handle.source}: {writer.name} holds NaN or infinite values; get it again")
    if norm_preserving:
        return truncated(weight, change, writer.axis)
    return low_rank(weight, change, writer.axis), None


def _nothing(module: nn.Module) -> LowRank:
    """Factors that change nothing, for a layer of which only the bias counts."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return LowRank(torch.zeros(weight.shape[0], 1), torch.zeros(1, weight.shape[1]))


def _config(plan: Plan, modules: Mapping[str, nn.Module], base: str, by_weight: Set[str]) -> Any:
    """PEFT's config; the modules in `by_weight` are named by their weight, a parameter."""
    from peft import LoraConfig, TaskType

    ranks = {f"{name}.weight" if name in by_weight else name: rank for name, rank in plan.ranks.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    unusual = {re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        r=usual,
        lora_alpha=usual,  # alpha / r is what a LoRA layer multiplies by
        rank_pattern=unusual,
        alpha_pattern=dict(unusual),
        target_modules=_targets(sorted(set(plan.modules) - by_weight), modules),
        target_parameters=sorted({*plan.parameters, *(f"{name}.weight" for name in by_weight)}) or None,
        modules_to_save=sorted(plan.copies) or None,
        lora_bias=bool(plan.biases),
        fan_in_fan_out=any(_is_conv1d(modules[name]) for name in plan.modules),
        init_lora_weights=False,
        base_model_name_or_path=base,
    )


def _targets(names: list[str], modules: Mapping[str, nn.Module]) -> list[str] | str:
    """The LoRA layers' full names: PEFT takes a name in a list for the end of one as well, so where the model has
    another that ends so, they go as a pattern."""
    ends = tuple(f".{name}" for name in names)
    if any(name.endswith(ends) for name in modules):
        return "|".join(re.escape(name) for name in names)
    return names


def _layers(adapted: Any) -> dict[str, tuple[str, Any]]:
    """Module or parameter name -> the name and the layer that PEFT put there."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for place, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            name = place.removeprefix("base_model.model.")
            parameter = getattr(layer, "parameter_name", None)
            name = name.replace(".base_layer", "")  # several parameters of one module are wrapped one in the other
            found[f"{name}.{parameter}" if parameter else name] = (place, layer)
    return found


def _as_lora(place: str, layer: Any, low: LowRank, bias: Tensor | None, biased: bool) -> dict[str, Tensor]:
    """A change as the tensors of a PEFT layer: its B and A, whichever way its weight lies."""
    left, right = low
    if hasattr(layer, "parameter_name") and left.ndim == 3:
        experts, _, rank = left.shape
        turned = not layer._did_swap_in_out_features  # PEFT then reads [experts, in, out]
        b, a = (right.transpose(1, 2), left.transpose(1, 2)) if turned else (left, right)
        return {
            f"{place}.lora_A.weight": a.reshape(experts * rank, -1),
            f"{place}.lora_B.weight": b.permute(1, 2, 0).reshape(-1, rank * experts),
        }
    if isinstance(layer.get_base_layer(), nn.Embedding):
        return {f"{place}.lora_embedding_A": left.T, f"{place}.lora_embedding_B": right.T}
    if _is_conv1d(layer.get_base_layer()):
        left, right = right.T, left.T
    tensors = {f"{place}.lora_A.weight": right, f"{place}.lora_B.weight": left}
    if biased:
        tensors[f"{place}.lora_B.bias"] = torch.zeros(len(left)) if bias is None else bias
    return tensors


def _approximation(errors: Mapping[str, float]) -> dict[str, float] | None:
    """How far the weights are from what was asked, where low rank only approximates it."""
    if not errors:
        return None
    return {"mean_error": sum(errors.values()) / len(errors), "worst_error": max(errors.values())}


def _closing_notes(plan: Plan, errors: Mapping[str, float]) -> list[str]:
    notes = []
    found = _approximation(errors)
    if found is not None:
        rank = max(plan.ranks.values())
        notes.append(
            f"norm-preserving, approximated at rank {rank}: the relative Frobenius error of the change is "
            f"{found['mean_error']:.1%} on average, {found['worst_error']:.1%} at worst"
        )
    if plan.copies:
        names = sorted(plan.copies)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notes.append(
            f"held by edited copies of the modules, since PEFT has no LoRA for what changes there: "
            f"{', '.join(names[:3])}{more}; `delete_adapter` gives the base back, `unload` alone keeps the copies"
        )
    return notes


def _base_name(recipe: Recipe, model: str) -> str:
    """The base model as others know it: a Hub id where one is known, never a path of this machine."""
    known = str(recipe.model.get("source") or "")
    name = public_name(model)
    if is_local(model) and known and not is_local(known):
        return known
    return name


def _name_of(handle: Handle, module: nn.Module) -> str | None:
    return handle.module_names.get(module)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings about tied weights and biases, which the card answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
