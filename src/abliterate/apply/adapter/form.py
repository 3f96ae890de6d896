"""An edit as a PEFT LoRA: what is taken out of a weight, left^T (right W), already is a product of low rank.

    delta W = -left^T (right W)        B = -left^T,  A = right W        rank = number of directions

Linear layers and embeddings are held by LoRA layers, fused experts (and their biases) by PEFT's `target_parameters`,
biases of linear layers by `lora_bias`. PEFT allows `lora_bias` for all modules of an adapter or none, and not beside
embeddings or parameters; what can't be a LoRA for that reason is held by an edited copy of its module
(`modules_to_save`), which is as exact and as reversible, and larger.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from abliterate.apply.parameters import Parameters
from abliterate.apply.removal import removed
from abliterate.cards.others import adapter_card
from abliterate.common.errors import AbliterateError, NonFiniteError, WriterError
from abliterate.common.files import check_folder, whole_folder
from abliterate.common.names import is_local, public_name
from abliterate.edit.algebra import Factors
from abliterate.edit.recipe import check_model
from abliterate.models.folders import model_folder
from abliterate.models.pretrained import with_adapter
from abliterate.models.writers import Writer

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions
    from abliterate.common.reporting import Reporter
    from abliterate.edit.recipe import Recipe
    from abliterate.models.handle import Handle
from abliterate.apply.adapter.layers import as_lora, installed
from abliterate.apply.adapter.low_rank import LowRank, low_rank, nothing, truncated
from abliterate.apply.adapter.plan import Plan, make_plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    source = Parameters(model_folder(model, options.revision))
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
        tied = source.handle.tied and source.handle.module_names.get(source.handle.embedding) in plan.modules
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
    if handle.tied and handle.module_names.get(handle.embedding) in (config.get("target_modules") or []):
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


def _edited_copy(
    source: Parameters, module: nn.Module, changes: Sequence[tuple[Writer, Factors]], norm_preserving: bool
) -> dict[str, Tensor]:
    """A module's parameters after the edit, in their own dtype."""
    (writer, _), *_ = changes
    names = [name for name, _ in module.named_parameters(recurse=False)]
    copy = {name: source.sibling(writer, name) for name in names}
    for writer, change in changes:
        name = writer.name.rpartition(".")[2]
        keep = norm_preserving and copy[name].ndim > 1
        copy[name] = removed(copy[name], change, writer.axis, keep_norms=keep)
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
            lows[name] = nothing(modules[name])
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
    config, layers, expected = installed(source.handle, plan, base)
    for name, low in lows.items():
        place, layer = layers[name] if name in layers else layers[f"{name}.weight"]
        placed = as_lora(place, layer, low, plan.biases.get(name), bool(plan.biases))
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
