"""A folder to serve: a tiny model, recipes for it, and a run with a frontier."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from abliterate.edit.edit import Edit
from abliterate.edit.recipe import load_recipe, save_recipe
from abliterate.models.loading import load
from abliterate.models.recipes import recipe_for
from abliterate.models.writers import find_writers
from abliterate.run.pipeline import run
from abliterate.settings.run import RunSettings

SETTINGS = {
    "prompts": {
        "target": "bundled", "baseline": "bundled", "train_prompts": 8, "validation_prompts": 8, "test_prompts": 8,
    },
    "collect": {"filter": False, "positions": 1}, "measure": {"max_new_tokens": 8}, "search": {"method": "sweep"},
}  # fmt: skip


@pytest.fixture(scope="session")
def handle(tiny_folder):
    """The tiny model, loaded from its folder; read only."""
    return load(str(tiny_folder))


@pytest.fixture(scope="session")
def edit(handle):
    """An edit that changes what the tiny model says."""
    direction = torch.randn(handle.d_model, generator=torch.Generator().manual_seed(3))
    return Edit.uniform(find_writers(handle), direction)


@pytest.fixture(scope="session")
def template(tiny_folder, handle, edit, tmp_path_factory):
    """model/, recipe.safetensors, prompts.txt and out/ with a frontier of two points; read only."""
    folder = tmp_path_factory.mktemp("studio") / "folder"
    shutil.copytree(tiny_folder, folder / "model")
    save_recipe(recipe_for(edit, handle), folder / "recipe.safetensors")
    (folder / "prompts.txt").write_text("Name a river.\nName a colour.\n")
    out = folder / "out"
    run(str(folder / "model"), out, RunSettings.model_validate(SETTINGS))
    results = json.loads((out / "results.json").read_text())
    (out / "frontier").mkdir()
    results["frontier"] = []
    for number, (refused, strength) in enumerate(((1, 1.0), (4, 0.5))):
        name = f"frontier/{number:02}.safetensors"
        whole = load_recipe(folder / "recipe.safetensors")
        whole.edit = whole.edit * strength
        save_recipe(whole, out / name)
        rate = {"refused": refused, "total": 8, "rate": refused / 8, "ci95": [0, 1]}
        results["frontier"].append(
            {"refusal": rate, "divergence": 0.2 * strength, "recipe": name, "chosen": not number}
        )
    (out / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def served(template, tmp_path):
    """A copy of it, to write in."""
    return shutil.copytree(template, tmp_path / "folder")
