"""A run of a tiny model and what a search that gives a frontier would add to it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from abliterate.directions.means import Place
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe, load_recipe, save_recipe
from abliterate.measure.rates import Rate
from abliterate.run.pipeline import run
from abliterate.settings.run import RunSettings

PROMPTS = {
    "target": "bundled", "baseline": "bundled", "train_prompts": 12, "validation_prompts": 10, "test_prompts": 9,
}  # fmt: skip
SETTINGS = {
    "prompts": PROMPTS, "collect": {"filter": False, "positions": 2}, "measure": {"max_new_tokens": 8},
    "search": {"method": "sweep"},
}  # fmt: skip


@pytest.fixture(scope="session")
def done(tiny_folder, tmp_path_factory):
    """The folder of a run, report and all; read only."""
    out = tmp_path_factory.mktemp("report") / "out"
    run(str(tiny_folder), out, RunSettings.model_validate(SETTINGS))
    return out


@pytest.fixture(scope="session")
def shown(tiny_folder, tmp_path_factory):
    """The folder of a run that kept answers to target prompts; read only."""
    out = tmp_path_factory.mktemp("shown") / "out"
    short = {**SETTINGS, "search": {"method": "article", "candidates": 1}}
    run(str(tiny_folder), out, RunSettings.model_validate(short), show_completions=True)
    return out


@pytest.fixture
def copy(done, tmp_path):
    """A copy of the run's small files, to change."""
    out = tmp_path / "copy"
    out.mkdir()
    for name in ("results.json", "report-data.json", "recipe.safetensors"):
        shutil.copy(done / name, out / name)
    return out


@pytest.fixture(scope="session")
def frontier(done, tmp_path_factory):
    """The same run as a search with a direction per layer and a frontier would leave it, and healed; read only."""
    out = tmp_path_factory.mktemp("frontier") / "out"
    (out / "frontier").mkdir(parents=True)
    shutil.copy(done / "report-data.json", out / "report-data.json")
    results = json.loads((done / "results.json").read_text())
    recipe = load_recipe(done / "recipe.safetensors")
    torch.manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(4, recipe.edit.directions.shape[1]), dim=1)
    results["frontier"] = []
    for number, refused in enumerate((9, 4, 1, 0)):
        strengths = torch.zeros(len(recipe.edit.writers), 4)
        for row in range(len(recipe.edit.writers)):
            strengths[row, row % 4] = 0.25 * (number + 1) + 0.02 * row
        name = f"frontier/{number:02}.safetensors"
        save_recipe(Recipe(Edit(recipe.edit.writers, directions, strengths), recipe.model), out / name)
        rate = Rate(refused, 10).to_json("refused")
        results["frontier"].append({"refusal": rate, "divergence": 0.01 * 3**number, "recipe": name})
    shutil.copy(out / "frontier" / "02.safetensors", out / "recipe.safetensors")
    results["healed"] = {**results["edited"], "refusal": Rate(2, 9).to_json("refused")}
    (out / "results.json").write_text(json.dumps(results))
    return out


@pytest.fixture
def place(done):
    """Where the run's direction was found."""
    found = json.loads((done / "report-data.json").read_text())["place"]
    return Place(found["layer"], found["site"], found["position"])
