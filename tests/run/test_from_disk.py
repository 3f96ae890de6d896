"""A run from the command line of a model that memory isn't allowed to hold is the run in memory."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest

from abliterate.edit.recipe import load_recipe
from abliterate.models import ahead
from abliterate.models.shards import open_checkpoint
from command import succeeds
from planted import save_planted

SIZES = ["--train-prompts", "12", "--validation-prompts", "6", "--test-prompts", "6", "--max-new-tokens", "6"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fit", "article"])
def test_it_finds_judges_and_saves_the_edit(method, tmp_path, monkeypatch):
    model, target, baseline = save_planted(tmp_path)
    read, plain = [], ahead._read
    monkeypatch.setattr(ahead, "_read", lambda stretches: read.append(len(stretches)) or plain(stretches))
    (tmp_path / "room").mkdir()
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    allowed = 62_000  # the embedding, the largest by itself, takes 51,456
    assert weights > 4 * allowed
    limits = ["--device-map", "auto", "--max-memory", f"cpu={allowed}B", "--offload-folder", tmp_path / "room"]
    found = {}
    for name, where in {"memory": [], "disk": limits}.items():
        out = tmp_path / name
        succeeds(
            "run", model, "--out", out, "--target", target, "--baseline", baseline, *SIZES, "--method", method,
            "--steps", "3", "--dtype", "float32", "--report-judge", "none", "--also-prompts", "0", "--quiet", *where,
        )  # fmt: skip
        assert bool(read) == (name == "disk")
        document = json.loads((out / "results.json").read_text())
        checkpoint = open_checkpoint(out / "model")
        found[name] = document, load_recipe(out / "recipe.safetensors"), checkpoint
    (document, recipe, checkpoint), (before, wanted, plainly) = found["disk"], found["memory"]
    assert document["original"]["refusal"] == before["original"]["refusal"]
    assert document["edited"]["refusal"] == before["edited"]["refusal"]
    assert document["edited"]["refusal"]["refused"] == 0 < document["original"]["refusal"]["refused"]
    assert recipe.edit.writers == wanted.edit.writers
    np.testing.assert_allclose(recipe.edit.directions, wanted.edit.directions, atol=1e-5)
    np.testing.assert_allclose(recipe.edit.strengths, wanted.edit.strengths, atol=1e-5)
    assert checkpoint.files.keys() == plainly.files.keys()
    gc.collect()  # else it goes with the process
    assert list((tmp_path / "room").iterdir()) == []
