"""Stored tensors: what save_pretrained writes is what is said to be written, and editing it is editing the model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.apply.removal import removed
from abliterate.common.errors import ModelError, RecipeError
from abliterate.edit.algebra import factors
from abliterate.edit.edit import Edit, normalised
from abliterate.edit.recipe import Recipe, load_recipe
from abliterate.edit.stored_tensor import StoredGain, StoredTensor
from abliterate.models.handle import Handle
from abliterate.models.packed import checkpoint_shapes
from abliterate.models.recipes import recipe_for, tensors_for
from abliterate.models.stored import (
    _saved,
    names_in,
    skeleton,
    stored_names,
    stored_tensors,
)
from abliterate.models.writers import find_writers
from models import FAMILIES, handle_of, save_tiny, tiny, tiny_llama

D = 32


_SIZES = {
    "num_hidden_layers": 2, "hidden_size": D, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
EXPERTS = {
    "mixtral": (dict(_SIZES, num_local_experts=12), "model.layers.1.mlp.experts.down_proj"),
    "qwen3_moe": (dict(_SIZES, num_experts=12, moe_intermediate_size=24), "model.layers.1.mlp.experts.down_proj"),
    "gpt_oss": (dict(_SIZES, num_local_experts=12), "model.layers.1.mlp.experts.down_proj"),
    "gpt_oss bias": (dict(_SIZES, num_local_experts=12), "model.layers.1.mlp.experts.down_proj_bias"),
}


WITH_EXPERTS = FAMILIES | {
    case: lambda case=case: tiny(case, **EXPERTS[case][0])
    for case in EXPERTS
    if " " not in case and case not in FAMILIES
}


def direction() -> torch.Tensor:
    return torch.from_numpy(normalised(torch.randn(D, generator=torch.Generator().manual_seed(0))))


def saved(model, folder) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def gain_of(tensor: StoredTensor, checkpoint: dict[str, torch.Tensor]) -> torch.Tensor | None:
    return None if tensor.gain is None else checkpoint[tensor.gain.name].float() + tensor.gain.plus


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_editing_the_stored_tensors_is_editing_the_model_and_saving_it(family, tmp_path):
    handle = handle_of(WITH_EXPERTS[family]())
    edit = Edit.uniform(find_writers(handle), direction(), 0.7)
    tensors, head = stored_tensors(handle), stored_names(handle)["head"]
    checkpoint = saved(handle.model, tmp_path / "before")
    edit.bake(handle)
    expected = saved(handle.model, tmp_path / "after")
    touched = {t.name: (t, part) for writer, part in edit.parts.items() for t in tensors[writer]}
    assert set(touched) <= set(checkpoint)
    for name, tensor in checkpoint.items():
        if name not in touched:
            assert torch.equal(tensor, expected[name]), name
            continue
        stored, part = touched[name]
        assert tuple(tensor.shape) == stored.shape
        change = factors(part, gain_of(stored, checkpoint), bool(stored.gain and stored.gain.centred))
        torch.testing.assert_close(removed(tensor, change, stored.axis), expected[name], atol=1e-5, rtol=1e-4)
        assert not torch.equal(tensor, expected[name])
    assert set(expected) - set(checkpoint) <= {head}  # what untying added is where it was said to be


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_a_skeleton_tells_what_the_model_tells(family, tmp_path):
    handle = handle_of(WITH_EXPERTS[family]())
    handle.model.save_pretrained(tmp_path)
    bare = skeleton(tmp_path)
    sources = names_in(bare.model, checkpoint_shapes(tmp_path))
    assert stored_tensors(bare, sources) == stored_tensors(handle)
    assert stored_names(bare, sources) == stored_names(handle)
    assert bare.config_hash == handle.config_hash


@pytest.mark.parametrize("case", EXPERTS)
def test_fused_experts_are_found_where_they_are_stored(case, tmp_path):
    fields, name = EXPERTS[case]
    model = tiny(case.split()[0], **fields)
    parameter = model.get_parameter(name)
    [axis] = [a for a, size in enumerate(parameter.shape) if size == D]
    checkpoint = saved(model, tmp_path)
    parts = _saved(handle_of(model), name, tuple(parameter.shape), axis, {})
    assert {part.name: part.shape for part in parts}.items() <= {
        n: tuple(t.shape) for n, t in checkpoint.items()
    }.items()
    slices = parameter.unbind(0) if len(parts) > 1 else [parameter]
    assert len(parts) in (1, 12)
    for part, expected in zip(parts, slices, strict=True):  # in the experts' order, 10 after 9
        stored = checkpoint[part.name].movedim(part.axis, -1)
        whole = expected.movedim(axis if len(parts) == 1 else axis - 1, -1)
        torch.testing.assert_close(stored.reshape(-1, D), whole.reshape(-1, D), atol=0, rtol=0)


def test_nothing_is_left_on_the_model():
    handle = handle_of(tiny("mixtral", **EXPERTS["mixtral"][0]))
    _saved(handle, "model.embed_tokens.weight", (400, D), 1, {})
    stored_names(handle)
    assert not hasattr(handle.model, "_weight_conversions")


def test_a_skeleton_of_a_large_model_holds_one_matrix(tmp_path):
    config = tiny_llama().config.to_dict() | {
        "num_hidden_layers": 12, "hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 60_000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    handle = skeleton(tmp_path)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in handle.model.parameters()}
    largest = 1024 * 2048 * 4  # of a block; the embedding's is 30 times that
    assert sum(storages.values()) < 1.5 * largest
    assert sum(p.numel() * 4 for p in handle.model.parameters()) > 60 * largest
    assert len(stored_tensors(handle)) == 25


@pytest.fixture
def folder(tmp_path):
    """A community checkpoint: odd names in config.json, tensors too many, no generation config."""
    place = save_tiny(tmp_path / "odd")
    (place / "generation_config.json").unlink()
    config = json.loads((place / "config.json").read_text())
    config |= {
        "_name_or_path": "/home/somebody/merge",
        "architectures": ["LlamaForCausalLM"],
        "merged_by": [1],
        "x": None,
    }
    (place / "config.json").write_text(json.dumps(config))
    tensors = load_file(place / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_saving_for_a_folder_says_which_tensors(folder, tmp_path):
    Edit.from_names({DOWN: 0.5, "model.embed_tokens.weight": 1.0}, direction()).save(tmp_path / "r", model=folder)
    recipe = load_recipe(tmp_path / "r")
    assert recipe.tensors[DOWN] == (StoredTensor(DOWN, (32, 64), 0),)
    assert recipe.tensors["model.embed_tokens.weight"][0].axis == 1
    assert recipe.model["source"] == "odd"  # no path of this machine
    assert recipe.model["tied"] is True and recipe.model["head"] == "lm_head.weight"
    assert recipe.model["layers"] == 4 and recipe.model["class"] == "LlamaForCausalLM"


def test_saving_for_a_handle_says_the_same(folder, tmp_path):
    import abliterate as ab

    edit = Edit.from_names({DOWN: 0.5}, direction())
    edit.save(tmp_path / "folder", model=folder)
    edit.save(tmp_path / "handle", model=ab.load(folder, dtype="float32"))
    assert (tmp_path / "folder").read_bytes() == (tmp_path / "handle").read_bytes()


def test_a_folder_without_its_weights_will_do(folder, tmp_path):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    recipe = recipe_for(Edit.from_names({DOWN: 1.0}, direction()), folder)
    assert recipe.tensors[DOWN][0].shape == (32, 64)
    assert tensors_for(recipe, folder) == recipe.tensors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.down_prj.weight", f"near it: {DOWN}".replace(".", r"\.")),
        ("model.layers.1.mlp.gate_proj.weight", "doesn't write to the stream of"),
        ("nonsense", "abliterate inspect"),
    ],
)
def test_a_name_that_is_no_writer_is_an_error_that_helps(folder, tmp_path, name, message):
    with pytest.raises(RecipeError, match=message):
        Edit.from_names({DOWN: 1.0, name: 1.0}, direction()).save(tmp_path / "r", model=folder)
    assert not (tmp_path / "r").exists()


def test_an_edit_of_another_width_or_depth_is_refused(folder):
    with pytest.raises(RecipeError, match=r"16 entries.*d_model 32"):
        recipe_for(Edit.from_names({DOWN: 1.0}, torch.ones(16)), folder)
    with pytest.raises(RecipeError, match=r"layer 4.*layers 0 to 3"):
        recipe_for(Edit.shifting(4, direction(), 1.0), folder)


@pytest.fixture
def gpt2(tmp_path):
    """GPT-2 as on the Hub: its tensors have no prefix there."""
    place = save_tiny(tmp_path / "gpt2", FAMILIES["gpt2"]())
    tensors = load_file(place / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, place / "model.safetensors", metadata={"format": "pt"})
    return place


def test_checkpoint_names_may_be_given_and_become_parameter_names(gpt2):
    recipe = recipe_for(Edit.from_names({"h.2.mlp.c_proj.weight": 0.5}, direction()), gpt2)
    assert recipe.edit.writers == ("transformer.h.2.mlp.c_proj.weight",)
    weight, bias = recipe.tensors["transformer.h.2.mlp.c_proj.weight"]
    assert (weight.name, weight.shape, weight.axis, weight.bias) == ("h.2.mlp.c_proj.weight", (128, 32), 1, False)
    assert (bias.name, bias.shape, bias.axis, bias.bias) == ("h.2.mlp.c_proj.bias", (32,), 0, True)


def test_naming_a_bias_or_a_writer_twice_is_refused(gpt2):
    with pytest.raises(RecipeError, match=r"is the bias of transformer.h.2"):
        recipe_for(Edit.from_names({"h.2.mlp.c_proj.bias": 0.5}, direction()), gpt2)
    with pytest.raises(RecipeError, match="a writer twice"):
        twice = {"h.2.mlp.c_proj.weight": 0.5, "transformer.h.2.mlp.c_proj.weight": 0.5}
        recipe_for(Edit.from_names(twice, direction()), gpt2)


def test_a_recipe_with_other_names_finds_the_folders(gpt2, tmp_path):
    name = "transformer.h.2.mlp.c_proj.weight"
    handle = handle_of(FAMILIES["gpt2"]())
    recipe = Recipe(Edit.from_names({name: 1.0}, direction()), {}, {}, {name: stored_tensors(handle)[name]})
    assert recipe.tensors[name][0].name == name
    assert [t.name for t in tensors_for(recipe, gpt2)[name]] == ["h.2.mlp.c_proj.weight", "h.2.mlp.c_proj.bias"]


def test_a_recipe_without_tensors_gets_them_from_the_folder(folder):
    recipe = Recipe(Edit.from_names({DOWN: 1.0}, direction()))
    assert tensors_for(recipe, folder) == {DOWN: (StoredTensor(DOWN, (32, 64), 0),)}


def test_a_recipe_that_doesnt_fit_the_folder_is_refused(folder):
    with pytest.raises(RecipeError, match=r"no tensor|doesn't write"):
        tensors_for(Recipe(Edit.from_names({DOWN.replace("1", "9"): 1.0}, direction())), folder)
    with pytest.raises(RecipeError, match=r"16 entries.*d_model 32"):
        tensors_for(Recipe(Edit.from_names({DOWN: 1.0}, torch.ones(16))), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != DOWN}, folder / "model.safetensors")
    with pytest.raises(RecipeError, match=f"has no tensor {DOWN}"):
        tensors_for(Recipe(Edit.from_names({DOWN: 1.0}, direction())), folder)
    save_file(tensors | {DOWN: torch.ones(32, 65)}, folder / "model.safetensors")
    with pytest.raises(RecipeError, match=r"is \[32, 65\], not \[32, 64\]"):
        tensors_for(Recipe(Edit.from_names({DOWN: 1.0}, direction())), folder)


def test_all_the_experts_named_alike_are_their_writer(tmp_path, monkeypatch):
    name, (fields, _) = "model.layers.1.mlp.experts.down_proj", EXPERTS["mixtral"]
    handle = handle_of(tiny("mixtral", **fields))
    parts = tuple(_saved(handle, name, (12, D, 48), 1, {}))
    monkeypatch.setattr("abliterate.models.stored.stored_tensors", lambda *_: {name: parts})
    whole = recipe_for(Edit.from_names({part.name: 0.5 for part in parts}, direction()), handle)
    assert whole.edit.writers == (name,) and whole.edit.strengths.tolist() == [[0.5]]
    assert whole.tensors == {name: parts}
    with pytest.raises(RecipeError, match=f"one of the 12 tensors of {name}"):
        recipe_for(Edit.from_names({parts[3].name: 0.5}, direction()), handle)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_refused(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=missing if missing == "config.json" else r"no \*.safetensors"):
        recipe_for(Edit.from_names({DOWN: 1.0}, direction()), folder)


@pytest.mark.parametrize("what", ["config", "index", "header"])
def test_a_damaged_folder_is_refused(folder, what):
    file = {"config": "config.json", "index": "model.safetensors.index.json", "header": "model.safetensors"}[what]
    (folder / file).write_bytes(b"\x09\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ModelError, match=r"config.json can't be used|is damaged"):
        recipe_for(Edit.from_names({DOWN: 1.0}, direction()), folder)


GOOD = {"name": "w", "shape": [4, 2], "axis": 0, "bias": False, "gain": None}


def test_a_stored_tensor_survives_json():
    tensor = StoredTensor("w", (4, 2), 0, True, StoredGain("n", 1.0, True))
    assert StoredTensor.from_json(json.loads(json.dumps(tensor.to_json()))) == tensor
    assert StoredTensor.from_json(GOOD) == StoredTensor("w", (4, 2), 0)


@pytest.mark.parametrize(
    "change",
    [
        {"name": 1}, {"shape": "4"}, {"shape": []}, {"shape": [4, -2]}, {"shape": [4, True]}, {"axis": 2}, {"axis": -1},
        {"axis": True}, {"bias": 0}, {"gain": []}, {"gain": {"name": "n"}}, {"more": 1},
        {"gain": {"name": "n", "plus": 2, "centred": False}}, {"gain": {"name": "n", "plus": 1, "centred": "no"}},
    ],
)  # fmt: skip
def test_a_stored_tensor_with_another_field_or_type_is_refused(change):
    with pytest.raises(ValueError):
        StoredTensor.from_json(GOOD | change)


def test_a_handle_of_a_skeleton_is_a_handle(folder):
    assert isinstance(skeleton(folder), Handle)
