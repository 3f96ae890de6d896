"""A run again, from what it left: the same bytes, or what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from abliterate.common.errors import RecipeError
from abliterate.edit.recipe import load_recipe, save_recipe
from abliterate.run.reproduce import read_made
from command import SMALL, fails, succeeds


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    succeeds("run", tiny_folder, "--out", out, *SMALL, "--method", "article", "--no-filter", "--candidates", "2", "-q")
    return out


def test_the_recipe_names_its_model_by_config_and_weights(done: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from abliterate.models.recipes import weights_hash

    about = load_recipe(done / "recipe.safetensors").model
    assert about["weights_hash"] == weights_hash(tiny_folder)
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    assert weights_hash(other) == about["weights_hash"]
    (file,) = other.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert weights_hash(other) != about["weights_hash"]


@pytest.mark.slow
def test_a_run_comes_out_again_bit_for_bit(done: Path, tmp_path: Path) -> None:
    told = succeeds("reproduce", done, "--out", tmp_path / "again", "--json", "-q").json
    assert told["bit_for_bit"] and told["same_edit"] and not told["differs"]


@pytest.mark.slow
def test_what_differs_is_said(done: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """From a recipe alone, made elsewhere."""
    recipe = load_recipe(done / "recipe.safetensors")
    recipe.provenance["environment"]["torch"] = "1.0"
    save_recipe(recipe, tmp_path / "theirs.safetensors")
    out = succeeds("reproduce", tmp_path / "theirs.safetensors", tiny_folder, "--out", tmp_path / "again", "-q").out
    assert "the same edit" in out and "environment.torch: 1.0 before" in out


def test_another_model_or_no_settings(done: Path, tiny_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert "config hash" in fails(tmp_path / "no", "reproduce", done, other, "--out", tmp_path / "no" / "again")
    recipe = load_recipe(done / "recipe.safetensors")
    recipe.provenance.clear()
    save_recipe(recipe, tmp_path / "bare.safetensors")
    with pytest.raises(RecipeError, match="doesn't say how it was made"):
        read_made(tmp_path / "bare.safetensors")
