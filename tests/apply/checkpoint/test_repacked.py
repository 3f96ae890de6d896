"""An edit in weights that a checkpoint holds packed: the direction is out, the rest is what it was, in its format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.apply.checkpoint import repacked
from abliterate.apply.forms import ApplyOptions, apply_recipe
from abliterate.apply.rounding import Account
from abliterate.common.errors import ModelError, NonFiniteError
from abliterate.common.reporting import Silent
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe
from abliterate.models.packed import packed_in
from abliterate.models.recipes import recipe_for
from abliterate.models.shards import open_checkpoint
from models import ARCHITECTURES, save_tiny, tiny_llama
from packing import FORMATS, fp8_blocks, fp8_tensor, gpt_oss, mxfp4, packed_folder

WRITERS = [f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")]


def values_in(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    return {
        name: torch.from_numpy(one.values({role: checkpoint.raw(part.name) for role, part in one.parts.items()}))
        for name, one in packed_in(checkpoint, config).items()
    }


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "m", tiny_llama(tied=False, d_model=128))


def applied(edit: Edit, folder: Path, **options) -> tuple[Path, dict]:
    out = folder.parent / "out"
    recipe = recipe_for(edit, folder)
    return out, apply_recipe(recipe, str(folder), out, "checkpoint", ApplyOptions(overwrite=True, **options), Silent())


def direction(width: int = 128) -> np.ndarray:
    r = np.random.default_rng(0).standard_normal(width)
    return r / np.linalg.norm(r)


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_weights_are_edited_in_their_format(llama, kind):
    pack, error = FORMATS[kind]
    if ("f4" in kind and "n" not in kind[1:]) or "nf4" in kind:
        pytest.importorskip("bitsandbytes")
    before = packed_folder(llama, pack, WRITERS)
    r = direction()
    for name, values in values_in(llama).items():
        torch.testing.assert_close(values, before[name], rtol=1e-6, atol=1e-7)
    out, summary = applied(Edit.from_names(dict.fromkeys(WRITERS, 1.0), r), llama)
    old, new = (load_file(folder / "model.safetensors") for folder in (llama, out))
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {n: (t.dtype, t.shape) for n, t in new.items()}
    touched = [n for n in old if not torch.equal(*(t[n].reshape(-1).view(torch.uint8) for t in (old, new)))]
    assert touched and all(n.startswith(tuple(w.removesuffix(".weight") for w in WRITERS)) for n in touched)
    assert not any(n.endswith((".input_scale", "quant_map")) for n in touched)
    unit, left, was = torch.from_numpy(r).float(), 0.0, 0.0
    for name, values in values_in(out).items():
        wanted = before[name] - torch.outer(unit, unit @ before[name])
        assert (values - wanted).norm() < error * wanted.norm(), name
        left, was = left + float((unit @ values).norm() ** 2), was + float((unit @ before[name]).norm() ** 2)
    assert (left / was) ** 0.5 < 0.35 * (1 if error > 0.05 else 0.2)
    assert any("packing the edited tensors as" in note and "%" in note for note in summary["notes"])
    assert json.loads((out / "config.json").read_text()) == json.loads((llama / "config.json").read_text())


@pytest.mark.parametrize("kind", FORMATS)
def test_values_of_shapes_that_no_block_divides_evenly(llama, kind):
    """384 blocks of 64 values, of which 256 share a nested scale; 6 blocks of 32 rows."""
    name = "model.layers.9.mlp.down_proj.weight"
    tensors = load_file(llama / "model.safetensors") | {name: torch.randn(128, 192)}
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    before = packed_folder(llama, FORMATS[kind][0], [name])
    torch.testing.assert_close(values_in(llama)[name], before[name], rtol=1e-6, atol=1e-7)


def test_packing_as_it_comes_leaves_more_of_it(llama, monkeypatch):
    packed_folder(llama, mxfp4, WRITERS)
    edit = Edit.from_names(dict.fromkeys(WRITERS, 1.0), direction())
    careful = applied(edit, llama)[1]["notes"]
    monkeypatch.setattr(repacked, "ROUNDS", 1)
    monkeypatch.setattr(Account, "check", lambda *_: None)
    share = [
        float(note.split("directions ")[1].split("%")[0])
        for note in (careful[-1], applied(edit, llama)[1]["notes"][-1])
    ]
    assert share[0] < 0.5 * share[1]


def test_experts_as_gpt_oss_has_them(tmp_path):
    folder = save_tiny(tmp_path / "m", ARCHITECTURES["gpt_oss"]())
    names = [n for n in load_file(folder / "model.safetensors") if n.endswith(("gate_up_proj", "experts.down_proj"))]
    before = packed_folder(folder, gpt_oss, names)
    writer = next(n for n in names if n.endswith("down_proj"))
    width = before[writer].shape[-1]
    r = direction(width)
    out, _ = applied(Edit.from_names({writer: 1.0}, r), folder)
    after, unit = values_in(out), torch.from_numpy(r).float()
    wanted = before[writer] - (before[writer] @ unit)[..., None] * unit
    assert (after[writer] - wanted).norm() < 0.16 * wanted.norm()
    assert (after[writer] @ unit).norm() < 0.35 * (before[writer] @ unit).norm()
    assert all(torch.equal(after[n], before[n]) for n in names if n != writer)


def test_in_place_and_at_strength_zero(llama):
    packed_folder(llama, fp8_blocks, WRITERS)
    original = (llama / "model.safetensors").read_bytes()
    out, _ = applied(Edit.from_names(dict.fromkeys(WRITERS, 0.0), direction()), llama)
    assert (out / "model.safetensors").read_bytes() == original
    recipe = recipe_for(Edit.from_names(dict.fromkeys(WRITERS, 1.0), direction()), llama)
    applied(recipe.edit, llama)
    apply_recipe(recipe, str(llama), llama, "checkpoint", ApplyOptions(in_place=True), Silent())
    assert (llama / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes() != original


def test_a_recipe_of_the_unpacked_model_fits_the_packed_one(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "full")
    recipe: Recipe = recipe_for(Edit.from_names(dict.fromkeys(WRITERS, 1.0), direction()), tmp_path / "full")
    packed_folder(llama, fp8_tensor, WRITERS)
    out, _ = applied(recipe.edit, llama)
    apply_recipe(recipe, str(llama), tmp_path / "again", "checkpoint", ApplyOptions(), Silent())
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_blocks_that_do_not_fill_the_last_one(tmp_path):
    folder = save_tiny(tmp_path / "m", tiny_llama(tied=False, d_model=96))
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}
    (folder / "config.json").write_text(json.dumps(config | quantised))
    names = ["model.layers.1.mlp.down_proj.weight"]
    before = packed_folder(folder, lambda w: fp8_blocks(w, 64), names)
    torch.testing.assert_close(values_in(folder)[names[0]], before[names[0]])


def test_scales_that_are_powers_of_two_stay_so(llama):
    def pack(weight):
        made, _ = fp8_blocks(weight)
        power = made[".weight_scale_inv"].log2().ceil().exp2()
        spread = power.repeat_interleave(32, 0).repeat_interleave(32, 1)
        codes = (weight / spread).to(torch.float8_e4m3fn)
        return {".weight": codes, ".weight_scale_inv": power}, codes.float() * spread

    packed_folder(llama, pack, WRITERS)
    out, _ = applied(Edit.from_names(dict.fromkeys(WRITERS, -40.0), direction()), llama)
    for folder in (llama, out):
        scales = [t for n, t in load_file(folder / "model.safetensors").items() if n.endswith("scale_inv")]
        assert all(bool((t.log2().frac() == 0).all()) for t in scales)
    assert not torch.equal(*(load_file(f / "model.safetensors")[WRITERS[1] + "_scale_inv"] for f in (llama, out)))


def test_what_cannot_be_held_stops(llama, monkeypatch):
    packed_folder(llama, mxfp4, WRITERS)
    monkeypatch.setattr("abliterate.apply.rounding.MOST_OFF", 1e-3)
    with pytest.raises(ModelError, match=r"as MXFP4 again undoes \d+% of the edit.*nothing was written: edit the unq"):
        applied(Edit.from_names(dict.fromkeys(WRITERS, 1.0), direction()), llama)
    assert not (llama.parent / "out").exists()
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.scale"].view(torch.uint8).fill_(255)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match="gives NaN or infinite values"):
        applied(Edit.from_names({WRITERS[3]: 1.0}, direction()), llama)


def test_the_adapter_is_made_of_the_values(llama, tmp_path):
    before = packed_folder(llama, fp8_tensor, WRITERS)
    name, r = WRITERS[1], torch.from_numpy(direction()).float()
    recipe = recipe_for(Edit.from_names({name: 1.0}, direction()), llama)
    apply_recipe(recipe, str(llama), tmp_path / "lora", "adapter", ApplyOptions(), Silent())
    held = load_file(tmp_path / "lora/adapter_model.safetensors")
    a, b = (next(t for n, t in held.items() if f"lora_{x}" in n).float() for x in "AB")
    torch.testing.assert_close(b @ a, -torch.outer(r, r @ before[name]), rtol=1e-3, atol=1e-5)
