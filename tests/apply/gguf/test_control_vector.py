"""Shifts as a llama.cpp control vector: what is in the file, what is refused, and llama.cpp's own reader and run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

import abliterate as ab
from abliterate.apply.gguf.control_vector import apply_control_vector
from abliterate.common.errors import AbliterateError, ModelError, RecipeError
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe
from gguf_files import OVERWRITE, SILENT, WIDTH, names, recipe_of, write_model
from llama_cpp import LlamaCpp, read_control_vector

SKIP = replace(OVERWRITE, skip_unsupported=True)


def shifts(*layers: int, width: int = WIDTH, size: float = 2.0) -> Edit:
    generator = torch.Generator().manual_seed(0)
    total = Edit.shifting(layers[0], torch.randn(width, generator=generator), size)
    for layer in layers[1:]:
        total = total + Edit.shifting(layer, torch.randn(width, generator=generator), size)
    return total


def test_the_file_holds_a_direction_a_block(tmp_path: Path) -> None:
    edit = shifts(1, 1, 3)
    out = tmp_path / "cv.gguf"
    summary = apply_control_vector(Recipe(edit, {"layers": 4, "class": "Some"}), "", out, OVERWRITE, SILENT)
    assert summary["layers"] == [1, 3] and summary["bytes"] == out.stat().st_size
    reader = GGUFReader(out)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "Some"
    assert reader.get_field("controlvector.layer_count").contents() == 3
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    assert list(tensors) == ["direction.1", "direction.3"]
    first, second, third = (s.vector for s in edit.shifts)
    assert np.allclose(tensors["direction.1"], first + second) and np.allclose(tensors["direction.3"], third)
    assert all(t.dtype == np.float32 and t.shape == (WIDTH,) for t in tensors.values())


def test_llama_cpps_own_reader_reads_it(tmp_path: Path) -> None:
    edit = shifts(1, 3)
    apply_control_vector(Recipe(edit), "", tmp_path / "cv.gguf", OVERWRITE, SILENT)
    rows = read_control_vector(tmp_path / "cv.gguf", 0.5).reshape(-1, WIDTH)
    assert len(rows) == 3 and not rows[1].any()
    for row, shift in zip((rows[0], rows[2]), edit.shifts, strict=True):
        assert np.allclose(row, 0.5 * shift.vector)


def test_what_a_control_vector_cant_hold_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "cv.gguf"
    removal = recipe_of(names())
    with pytest.raises(AbliterateError, match=r"5 writers, which a control vector can't.*--as gguf"):
        apply_control_vector(removal, "", out, OVERWRITE, SILENT)
    with pytest.raises(AbliterateError, match="no shifts"):
        apply_control_vector(removal, "", out, SKIP, SILENT)
    both = replace(removal, edit=removal.edit + shifts(1))
    summary = apply_control_vector(both, "", out, SKIP, SILENT)
    assert summary["skipped"] == names() and summary["layers"] == [1] and "left out" in summary["notes"][0]
    with pytest.raises(AbliterateError, match="block 0"):
        apply_control_vector(Recipe(shifts(0, 2)), "", out, OVERWRITE, SILENT)
    summary = apply_control_vector(Recipe(shifts(0, 2)), "", out, SKIP, SILENT)
    assert summary["layers"] == [2] and summary["skipped"] == ["shift at block 0"]
    with pytest.raises(AbliterateError, match="dtype"):
        apply_control_vector(Recipe(shifts(2)), "", out, replace(OVERWRITE, dtype="float16"), SILENT)


def test_the_model_named_is_checked_and_named_in_the_file(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf")
    out = tmp_path / "cv.gguf"
    apply_control_vector(Recipe(shifts(1)), str(model), out, OVERWRITE, SILENT)
    assert GGUFReader(out).get_field("controlvector.model_hint").contents() == "llama"
    with pytest.raises(RecipeError, match="block 5, the model's last is 1"):
        apply_control_vector(Recipe(shifts(5)), str(model), out, OVERWRITE, SILENT)
    with pytest.raises(RecipeError, match="48 d_model"):
        apply_control_vector(Recipe(shifts(1, width=48)), str(model), out, OVERWRITE, SILENT)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 9, "hidden_size": 48}))
    with pytest.raises(RecipeError, match="has 48"):
        apply_control_vector(Recipe(shifts(1)), str(folder), out, OVERWRITE, SILENT)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json"):
        apply_control_vector(Recipe(shifts(1)), str(folder), out, OVERWRITE, SILENT)


@pytest.mark.slow
def test_llama_cpp_run_with_it_gives_the_logits_of_the_shifts(tmp_path: Path, demo_gguf: Callable[[str], Path]) -> None:
    handle = ab.load(ab.demo_model(), dtype="float32")
    model, out = demo_gguf("F32"), tmp_path / "cv.gguf"
    edit = shifts(1, 7, 29, width=handle.d_model, size=12.0)
    apply_control_vector(Recipe(edit), str(model), out, OVERWRITE, SILENT)
    ids = handle.prompt_ids(["Name three kinds of apple."])[0]
    with torch.inference_mode(), edit.attached(handle):
        wanted = handle.model(torch.tensor([ids])).logits[0, -1].numpy()
    with LlamaCpp(model) as llama:
        plain = llama.next_logits(ids)
    with LlamaCpp(model, control=read_control_vector(out)) as llama:
        shifted = llama.next_logits(ids)
    moved = np.abs(wanted - plain).max()
    assert moved > 0.5
    assert np.abs(shifted - wanted).max() < 0.05 * moved
