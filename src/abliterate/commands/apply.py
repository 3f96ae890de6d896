"""`abliterate apply`: a recipe into a checkpoint, an adapter, a GGUF file or a control vector."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from abliterate.commands.common import source_of
from abliterate.commands.options import Given, Output, command
from abliterate.common.errors import AbliterateError
from abliterate.settings.run import RunSettings

EXAMPLES = {
    "checkpoint": "abliterate apply recipe.safetensors Qwen/Qwen3-0.6B --out edited",
    "checkpoint, in place": "abliterate apply recipe.safetensors ./model --in-place",
    "checkpoint, planned": "abliterate apply recipe.safetensors ./llama-70b --plan",
    "adapter": "abliterate apply recipe.safetensors Qwen/Qwen3-0.6B --as adapter --out lora",
    "gguf": "abliterate apply recipe.safetensors model.Q4_K_M.gguf --as gguf --out edited.gguf",
    "gguf-adapter": "abliterate apply recipe.safetensors model.Q4_K_M.gguf --as gguf-adapter --out lora.gguf",
    "control-vector": "abliterate apply shift.safetensors model.gguf --as control-vector --out vector.gguf",
}
# Said here and not in apply/forms.py, which --help need not import.
FORMS_HELP = (
    "checkpoint: a copy of the folder with the edit in its weights; adapter: a PEFT LoRA folder; gguf: a copy of the "
    "GGUF file with the edit in its tensors; gguf-adapter: a llama.cpp LoRA (--lora); control-vector: for llama.cpp's "
    "--control-vector. Live, without a file: abliterate chat."
)
WRITING_PANEL = "How it is written"


@command("load.revision", *(f"Example ({form}): {example}" for form, example in EXAMPLES.items()))
def apply(
    recipe: Annotated[Path, "recipe.safetensors, or the folder that `run` wrote."],
    model: Annotated[str, "Model folder or Hub id; for the GGUF forms a GGUF file."],
    *,
    form: Annotated[str, typer.Option("--as", metavar="FORM", help=FORMS_HELP)] = "checkpoint",
    out: Annotated[Path | None, "Folder or file to write."] = None,
    strength: Annotated[float, "Factor on the recipe's strengths; negative strengthens."] = 1.0,
    plan: Annotated[bool, "Say what it would read, write, take and need; needs no weights."] = False,
    norm_preserving: Annotated[bool, "Keep the norms of weights' columns.", WRITING_PANEL] = False,
    keep_tied: Annotated[bool, "Edit a tied embedding and head together instead of untying.", WRITING_PANEL] = False,
    skip_unsupported: Annotated[bool, "Leave out, and list, writers that the form can't hold.", WRITING_PANEL] = False,
    in_place: Annotated[bool, "Change the model's own files; all or none, also when killed.", WRITING_PANEL] = False,
    dtype: Annotated[str | None, "bfloat16, float16 or float32, where the form can choose.", WRITING_PANEL] = None,
    force: Annotated[bool, "Apply although the recipe was made for a model of another config."] = False,
    given: Given[RunSettings],
    io: Output,
) -> None:  # fmt: skip
    """Apply a recipe to a model: no prompts, no forward pass, no training.

    Outputs appear only when whole. After a kill, run the same command again.
    """
    if form == "checkpoint":
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its pieces are dealt to two threads already
    with io.reported() as terminal:
        from abliterate.apply.forms import ApplyOptions, apply_recipe
        from abliterate.edit.recipe import load_recipe, recipe_file

        target = _target(form, model, out, in_place, plan)
        file = recipe_file(recipe)
        loaded = load_recipe(file)
        if io.overwrite and file.resolve().is_relative_to(target.resolve()):
            raise AbliterateError(f"recipe {file} lies in {target}, which --overwrite would replace; move it first")
        options = ApplyOptions(
            strength=strength, skip_unsupported=skip_unsupported, norm_preserving=norm_preserving,
            overwrite=io.overwrite, in_place=in_place, keep_tied=keep_tied, force=force, dtype=dtype, plan=plan,
            revision=given.flags.get("load.revision"),
        )  # fmt: skip
        summary = apply_recipe(loaded, source_of(model), target, form, options, terminal)
    io.result(summary, _planned(summary) if plan else _told(summary))


def _target(form: str, model: str, out: Path | None, in_place: bool, plan: bool) -> Path:
    """Where the output goes.

    Raises:
        AbliterateError: when it isn't said, or the form can't do what is asked.
    """
    from abliterate.apply.forms import FORMS, form_named

    if form not in FORMS:
        form_named(form)  # raises, and says what there is
    if (in_place or plan) and form != "checkpoint":
        raise AbliterateError(f"{'--in-place' if in_place else '--plan'} is for the form checkpoint, not {form}")
    if out is not None:
        return out
    if in_place:
        return Path(model).expanduser()
    if plan:
        return Path("edited")
    raise AbliterateError("say where the output goes with --out")


def _told(summary: dict[str, Any]) -> str:
    """The summary for people."""
    lines = [f"{summary['form']}: {summary['out']}"]
    counts = [f"{_size(summary['bytes'])}"] if summary.get("bytes") is not None else []
    if summary.get("writers") is not None:
        counts.append(f"{summary['writers']} writers edited")
    if summary.get("seconds") is not None:
        counts.append(f"{summary['seconds']:.1f} s")
    lines.append(", ".join(counts))
    lines += [f"note: {note}" for note in summary.get("notes", ())]
    return "\n".join(line for line in lines if line)


def _planned(plan: dict[str, Any]) -> str:
    rows = [
        ("read", _size(plan["bytes_read"])),
        ("write", f"{_size(plan['bytes_written'])}, {plan['files']} shards; {_size(plan['free_bytes'])} are free"),
        ("edit", f"{plan['tensors']} tensors of {plan['writers']} writers, {_size(plan['bytes_edited'])}"),
        ("time", f"about {_duration(plan['seconds'])}"),
        ("memory", f"about {_size(plan['memory_bytes'])} at most"),
    ]  # fmt: skip
    return "\n".join([*(f"{name:<8}{value}" for name, value in rows), *(f"note: {note}" for note in plan["notes"])])


def _size(nbytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} bytes"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
