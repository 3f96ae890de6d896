"""`abliterate reproduce`: a run again, with the settings that its recipe or results keep; whether it is the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.common.errors import AbliterateError, RecipeError, shorten
from abliterate.common.reporting import Reporter
from abliterate.edit.compare import difference, same
from abliterate.edit.recipe import Recipe, load_recipe, recipe_file
from abliterate.models.recipes import config_file
from abliterate.run.pipeline import run, run_induce
from abliterate.settings.run import RunSettings


@dataclass
class Made:
    """What was made, and how.

    Attributes:
        file: its recipe.
        recipe: what is in it.
        source: of its model; a recipe alone knows no path.
        settings: of its run.
        induced: whether `--induce` made it.
    """

    file: Path
    recipe: Recipe
    source: str
    settings: dict[str, Any]
    induced: bool


def read_made(what: str | Path) -> Made:
    """What a recipe, a results.json or a run's folder says of how it was made.

    Raises:
        RecipeError: when there is no recipe, or it doesn't say.
    """
    path = Path(what).expanduser()
    file = path.with_name("recipe.safetensors") if path.name == "results.json" else recipe_file(path)
    recipe = load_recipe(file)
    source, settings = recipe.model.get("source") or "", recipe.provenance.get("settings")
    results = file.with_name("results.json")
    if results.is_file():  # names prompts and model with their folders
        document = json.loads(results.read_text(encoding="utf-8"))
        source, settings = document["model"].get("source") or source, document.get("settings") or settings
    if not isinstance(settings, dict):
        raise RecipeError(f"recipe {file} doesn't say how it was made: it has no settings in its provenance")
    return Made(file, recipe, source, settings, "induced" in recipe.provenance)


def reproduce(
    made: Made, model: str, out: str | Path, reporter: Reporter, *, overwrite: bool = False, force: bool = False
) -> dict[str, Any]:
    """Run again, and compare.

    Args:
        made: what is to come out again.
        model: where its model is.
        out: folder of the new run.
        reporter: told how it goes.
        overwrite: replace what is there.
        force: also where the model at hand has another config.

    Returns:
        For JSON: `bit_for_bit`: the recipes' bytes are the same; `same_edit`: what they do is; `differs`: dotted name
        (environment.torch, prompts.target.test.sha256, model.weights_hash, edited.refusal.refused ...) -> before, now.

    Raises:
        RecipeError: when the model at hand isn't the recipe's.
        AbliterateError: as `run`.
    """
    wanted, here = made.recipe.model.get("config_file_hash"), config_file(model).get("config_file_hash")
    if wanted and here and wanted != here and not force:
        raise RecipeError(
            f"{model} has config hash {shorten(here, 13)}, the recipe's model {shorten(wanted, 13)}; give the model "
            "it was made of, or --force"
        )
    try:
        settings = RunSettings.model_validate({**made.settings, "resume": False})
    except ValueError as error:
        raise AbliterateError(
            f"this version doesn't know the settings of {made.file}: {shorten(str(error))}"
        ) from error
    again = run_induce if made.induced else run
    result = again(model, out, settings, overwrite=overwrite, reporter=reporter)
    file = result.out / "recipe.safetensors"
    found = difference(made.recipe, load_recipe(file))
    differs = {f"model.{name}": pair for name, pair in found["model"].items()} | found["provenance"]
    return {
        "schema": 1,
        "bit_for_bit": made.file.read_bytes() == file.read_bytes(),
        "same_edit": same(found),
        "differs": {name: list(pair) for name, pair in differs.items()},
        "out": str(result.out),
    }
