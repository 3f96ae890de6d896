"""`abliterate collect` and `abliterate measure`: single stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from abliterate.commands.common import Model, source_of
from abliterate.commands.options import Given, Output, command
from abliterate.common.errors import AbliterateError
from abliterate.common.files import check_file, write_text
from abliterate.settings.run import RunSettings


@command(
    "behaviour prompts -prompts.validation_prompts -prompts.test_prompts collect -collect.projected measure.judge load "
    "workers ray seed config",
    "abliterate collect ./model --out acts.safetensors --target bundled --baseline bundled",
)
def collect(
    model: Model,
    *,
    out: Annotated[Path, "File to write."],
    keep_vectors: Annotated[bool, "Keep every prompt's activations too."] = False,
    given: Given[RunSettings],
    io: Output,
) -> None:
    """Save the statistics of the residual stream on both sides' prompts, for `run --activations`."""
    with io.reported() as terminal:
        settings = given.settings()
        check_file(out, overwrite=io.overwrite)
        from abliterate.run.pipeline import collect_to_file

        summary = collect_to_file(source_of(model), out, settings, keep_vectors=keep_vectors, reporter=terminal)
    io.result(summary, f"activations: {out}")


@command(
    "behaviour prompts -prompts.train_prompts -prompts.validation_prompts measure beside load workers ray seed config",
    "abliterate measure ./edited --original ./model --target bundled --baseline bundled",
)
def measure(
    model: Model,
    *,
    original: Annotated[str | None, "The model to compare with; gives the divergence."] = None,
    recipe: Annotated[Path | None, "Recipe to attach live to the model, compared with the model without it."] = None,
    out: Annotated[Path | None, "Write the result to this file as JSON."] = None,
    given: Given[RunSettings],
    io: Output,
) -> None:
    """Count refusals, over-refusals and degenerate answers on held-out prompts, and the divergence from an original."""
    with io.reported() as terminal:
        settings = given.settings()
        if out is not None:
            check_file(out, overwrite=io.overwrite)
        from abliterate.commands.terminal import measurement_table
        from abliterate.edit.recipe import load_recipe
        from abliterate.run.measuring import measure_models

        if recipe and original:
            raise AbliterateError("--recipe compares the model with itself; leave --original out")
        first = source_of(original) if original else source_of(model) if recipe else None
        stored = load_recipe(recipe) if recipe else None
        document = measure_models(source_of(model), first, settings, recipe=stored, reporter=terminal)
        if out is not None:
            write_text(out, json.dumps(document, indent=2) + "\n")
    io.result(document, measurement_table(document))
