"""The main job on a model whose weights can hold no edit: its stream itself is edited, live, and a recipe is saved."""

from __future__ import annotations

import json

import numpy as np
import pytest

from abliterate.common.errors import RecipeError, WriterError
from abliterate.edit.recipe import load_recipe
from abliterate.models.recipes import tensors_for
from abliterate.run import opening
from abliterate.run.measuring import measure_models
from abliterate.run.pipeline import run
from abliterate.settings.run import RunSettings
from documents import check_document
from models import _sizes, save_tiny, tiny
from planted import Parity


def settings(at_stream, method="article"):
    return RunSettings.model_validate({
        "prompts": {
            "target": "bundled", "baseline": "bundled", "train_prompts": 8, "validation_prompts": 8, "test_prompts": 8,
        },
        "search": {"method": method, "candidates": 1, "steps": 2}, "collect": {"filter": False},
        "measure": {"max_new_tokens": 8}, "beside": {"also_prompts": 0, "obligations": 0, "second_turn": 0},
        "load": {"at_stream": at_stream, "dtype": "float32"},
    })  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("scaled") / "model", tiny("doge", **_sizes(layers=3)))


def test_without_it_the_run_stops_before_the_work_and_names_it(folder, tmp_path):
    with pytest.raises(WriterError, match=r"every feature of it is scaled by a factor of its own.*--at-stream"):
        run(str(folder), tmp_path / "out", settings(False))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["article", pytest.param("fit", marks=pytest.mark.slow)])
def test_a_run_writes_a_recipe_that_measures_the_same_live_and_no_model(method, folder, tmp_path, monkeypatch):
    if method == "fit":
        monkeypatch.setattr(opening, "make_judge", lambda *args, **kwargs: Parity())
    out, chosen = tmp_path / "out", settings(True, method)
    run(str(folder), out, chosen)
    assert not (out / "model").exists()
    document = json.loads((out / "results.json").read_text())
    check_document(out / "results.json")
    recipe = load_recipe(out / "recipe.safetensors")
    assert recipe.edit.writers
    assert all(name.startswith("stream.") for name in recipe.edit.writers)
    assert document["recipe"]["proof"]["writers"]["component"] < 1e-5
    again = measure_models(str(folder), str(folder), chosen, recipe=recipe)
    for state in ("original", "edited"):
        assert again[state]["refusal"] == document[state]["refusal"]
    assert again["edited"]["divergence"]["first_token"] == pytest.approx(
        document["edited"]["divergence"]["first_token"], abs=1e-5
    )
    assert again["edited"]["divergence"]["first_token"] > 0


def test_a_recipe_of_the_stream_fits_no_checkpoint(tiny_folder):
    from abliterate.edit.edit import Edit
    from abliterate.edit.recipe import Recipe

    recipe = Recipe(Edit.uniform(["stream.0.post"], np.eye(32)[0]))
    with pytest.raises(RecipeError, match=r"stream\.0\.post is the stream itself, which no weight holds"):
        tensors_for(recipe, tiny_folder)
