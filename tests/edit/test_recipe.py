"""Recipes: bit for bit, and strict."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from abliterate.common.errors import OutputError, RecipeError
from abliterate.edit import recipe as module
from abliterate.edit.edit import Edit, Shift, orthonormal
from abliterate.edit.recipe import KEY, Recipe, check_model, load_recipe, save_recipe
from abliterate.edit.stored_tensor import StoredGain, StoredTensor


@pytest.fixture
def recipe():
    edit = Edit(("a.weight", "b.weight", "c.weight"), orthonormal(torch.randn(2, 16)), torch.randn(3, 2))
    return Recipe(edit, {"source": "x/y", "d_model": 16}, {"seed": 1, "prompts": {"target": "ab"}, "text": "Grüße"})


def written(path, document, **tensors):
    tensors = {"directions": torch.eye(2, 4), "strengths": torch.ones(1, 2)} | tensors
    text = document if isinstance(document, str) else json.dumps(document)
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={KEY: text})
    return path


GOOD = {"schema": 1, "writers": ["w"], "model": {}, "provenance": {}}
SHIFTED = GOOD | {"shift_layers": [2]}
SHIFT = {"shift_directions": torch.eye(1, 4), "shift_sizes": torch.tensor([1.5])}
STORED = {"name": "w", "shape": [4, 2], "axis": 0, "bias": False, "gain": None}


def test_the_round_trip_is_bit_for_bit(recipe, tmp_path):
    save_recipe(recipe, tmp_path / "r.safetensors")
    again = load_recipe(tmp_path / "r.safetensors")
    assert again.edit.writers == recipe.edit.writers
    assert np.array_equal(again.edit.directions, recipe.edit.directions)
    assert np.array_equal(again.edit.strengths, recipe.edit.strengths)
    assert (again.model, again.provenance) == (recipe.model, recipe.provenance)
    save_recipe(again, tmp_path / "other name")
    assert (tmp_path / "other name").read_bytes() == (tmp_path / "r.safetensors").read_bytes()


def test_the_order_in_which_provenance_was_written_leaves_the_bytes_alone(tmp_path, recipe):
    save_recipe(recipe, tmp_path / "a")
    recipe.provenance = dict(reversed(recipe.provenance.items()))
    save_recipe(recipe, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_edit_that_does_nothing_survives(tmp_path):
    edit = 0 * Edit.uniform(["w"], torch.ones(4))
    save_recipe(Recipe(edit + edit), tmp_path / "r")
    assert load_recipe(tmp_path / "r").edit.parts == {}


def test_the_good_documents_are_good(tmp_path):
    assert load_recipe(written(tmp_path / "r", GOOD)).edit.writers == ("w",)
    assert load_recipe(written(tmp_path / "r", SHIFTED, **SHIFT)).edit.shifts[0].layer == 2
    stored = load_recipe(written(tmp_path / "r", GOOD | {"tensors": {"w": [STORED]}})).tensors
    assert stored == {"w": (StoredTensor("w", (4, 2), 0),)}
    about = dict.fromkeys(("source", "revision", "class", "config_hash", "embedding", "head"))  # null: not known
    assert load_recipe(written(tmp_path / "r", GOOD | {"model": about})).model == about


def test_shifts_and_stored_tensors_survive(tmp_path):
    shifts = (Shift(3, torch.eye(4)[1], -2.5), Shift(0, torch.eye(4)[0], 0.1))
    edit = replace(Edit.uniform(["w"], torch.ones(4)), shifts=shifts)
    tensors = {"w": (StoredTensor("w", (4, 2), 0, False, StoredGain("n", 1.0)), StoredTensor("b", (4,), 0, True))}
    save_recipe(Recipe(edit, tensors=tensors), tmp_path / "r")
    again = load_recipe(tmp_path / "r")
    assert again.tensors == tensors
    assert [(s.layer, s.size) for s in again.edit.shifts] == [(3, -2.5), (0, torch.tensor(0.1).item())]
    assert np.array_equal(again.edit.shifts[0].direction, shifts[0].direction)
    save_recipe(again, tmp_path / "s")
    assert (tmp_path / "r").read_bytes() == (tmp_path / "s").read_bytes()


def test_an_edit_saves_and_loads_itself(tmp_path):
    edit = Edit.from_names({"a": 0.5, "b": -1.0}, torch.ones(4)) + Edit.shifting(1, torch.ones(4), 2.0)
    edit.save(tmp_path / "r")
    again = Edit.load(tmp_path / "r")
    assert (again.writers, again.strengths.tolist()) == (("a", "b"), [[0.5], [-1.0]])
    assert np.array_equal(again.shifts[0].vector, edit.shifts[0].vector)
    assert load_recipe(tmp_path / "r").tensors == {} == load_recipe(tmp_path / "r").model


def test_a_recipe_for_another_model_needs_force():
    recipe = Recipe(Edit.uniform(["w"], torch.ones(4)), {"source": "x/y", "config_hash": "a" * 64})
    with pytest.raises(RecipeError, match=r"made for x/y with config hash aaaaaaaaaaaa.*bbbbbbbbbbbb.*--force"):
        check_model(recipe, "b" * 64)
    check_model(recipe, "b" * 64, force=True)
    check_model(recipe, "a" * 64)
    check_model(Recipe(recipe.edit), "b" * 64)  # says nothing of its model


def test_a_recipe_of_an_8b_model_with_a_direction_per_layer_is_small(tmp_path):
    layers, d_model = 32, 4096
    directions = torch.nn.functional.normalize(torch.randn(layers + 1, d_model), dim=1)
    names, strengths = ["model.embed_tokens.weight"], [torch.eye(layers + 1)[0]]
    tensors = {names[0]: (StoredTensor(names[0], (128_256, d_model), 1),)}
    for layer in range(layers):
        for kind, width in (("self_attn.o_proj", d_model), ("mlp.down_proj", 14_336)):
            name = f"model.layers.{layer}.{kind}.weight"
            names.append(name)
            strengths.append(torch.rand(1) * torch.eye(layers + 1)[layer + 1])
            bias = StoredTensor(name.replace("weight", "bias"), (d_model,), 0, True)
            tensors[name] = (StoredTensor(name, (d_model, width), 0), bias)
    assert len(names) == 65
    numbers = {"refusal": {"refused": 196, "total": 200, "rate": 0.98, "ci95": [0.95, 0.99]}, "seconds": 1.5}
    provenance = {
        "found_at": [
            {"layer": n, "site": "pre", "position": -1, "bypass": 0.123456789, "note": "x" * 80} for n in range(500)
        ],
        "prompts": {side: {part: {"count": 256, "sha256": "a" * 64} for part in "abc"} for side in "de"},
        "settings": {f"setting_{n}": n / 7 for n in range(200)},
        "original": numbers,
        "edited": numbers,
    }
    model = {"source": "x/Y-8B", "config_hash": "a" * 64, "layers": layers, "d_model": d_model}
    save_recipe(
        Recipe(Edit(tuple(names), directions, torch.stack(strengths)), model, provenance, tensors), tmp_path / "r"
    )
    assert (tmp_path / "r").stat().st_size <= 2 * 10**6
    assert load_recipe(tmp_path / "r").tensors == tensors


@pytest.mark.parametrize(
    ("document", "tensors", "message"),
    [
        (GOOD, {"strengths": None}, r"holds tensors \['directions'\]; rule 2"),
        (GOOD, {"more": torch.ones(1)}, "rule 2: exactly"),
        (GOOD, {"directions": torch.eye(2, 4).bfloat16()}, "rule 2: all tensors are float32, directions is not"),
        ("{", {}, "rule 3: .*not JSON"),
        ("[]", {}, "rule 3: schema is list"),
        (GOOD | {"schema": 2}, {}, "rule 3: schema is 2; this version reads schema 1"),
        (GOOD | {"schema": True}, {}, "rule 3: schema is True"),
        ("NaN", {}, "rule 3: schema is float"),
        ("[" * 100_000, {}, "rule 3: .*not JSON"),
        ('{"schema": 1, "writers": ["\\ud800"]}', {}, "rule 3: .*not JSON"),
        (GOOD | {"writers": "w"}, {}, "rule 3: writers"),
        (GOOD | {"writers": ["w\x1b[31m"]}, {}, "rule 3: writers"),
        (GOOD | {"writers": [1]}, {}, "rule 3: writers"),
        ({k: v for k, v in GOOD.items() if k != "writers"}, {}, "rule 3: writers"),
        (GOOD | {"model": None}, {}, "rule 3: model"),
        (GOOD | {"provenance": []}, {}, "rule 3: provenance"),
        (GOOD | {"model": {"source": 1}}, {}, "rule 3: model.source is a string"),
        (GOOD | {"model": {"layers": "12"}}, {}, "rule 3: model.layers is a positive integer"),
        (GOOD | {"model": {"layers": True}}, {}, "rule 3: model.layers is a positive integer"),
        (GOOD | {"model": {"d_model": None}}, {}, "rule 3: model.d_model is a positive integer"),
        (GOOD | {"model": {"tied": 0}}, {}, "rule 3: model.tied is true or false"),
        (GOOD | {"model": {"d_model": 5}}, {}, "rule 4: directions have 4 entries, model.d_model is 5"),
        (GOOD | {"tensors": []}, {}, "rule 3: tensors is an object"),
        (GOOD | {"tensors": {}}, {}, "rule 5: tensors has an entry for every writer"),
        (GOOD | {"tensors": {"w": [STORED], "v": [STORED]}}, {}, "rule 5: tensors has an entry for every writer"),
        (GOOD | {"tensors": {"w": []}}, {}, "rule 5: .*at least one"),
        (GOOD | {"tensors": {"w": [1]}}, {}, "rule 5: .*not an object"),
        (GOOD | {"tensors": {"w": [STORED, STORED]}}, {}, "rule 5: .*two writers"),
        (
            GOOD | {"tensors": {"w": [STORED | {"shape": [5, 4]}]}},
            {},
            r"rule 5: .*is \[5, 4\], not 4 along dimension 0",
        ),
        (GOOD | {"tensors": {"w": [STORED | {"axis": 1.0}]}}, {}, "rule 5: 'axis' of a stored tensor is 1.0"),
        (GOOD | {"shift_layers": [1]}, {}, r"rule 4: shifts .*don't fit 1 layers"),
        (GOOD | {"shift_layers": ["1"]}, SHIFT, "rule 3: shift_layers is a list of block indices"),
        (GOOD | {"shift_layers": [-1]}, SHIFT, "rule 3: shift_layers is a list of block indices"),
        (GOOD, SHIFT, "rule 4: shifts .*don't fit 0 layers"),
        (SHIFTED, SHIFT | {"shift_sizes": None}, "rule 2: exactly"),
        (SHIFTED, SHIFT | {"shift_sizes": torch.tensor([torch.inf])}, "rule 4: the size of a shift must be finite"),
        (SHIFTED, SHIFT | {"shift_sizes": torch.ones(2)}, "rule 4: shifts"),
        (SHIFTED, SHIFT | {"shift_directions": torch.ones(1, 4)}, "rule 4: .*unit"),
        (SHIFTED, SHIFT | {"shift_directions": torch.eye(1, 5)}, "rule 4: a shift of width 5"),
        (SHIFTED | {"model": {"layers": 2}}, SHIFT, "rule 4: a shift is beyond the model's 2 layers"),
        (GOOD | {"writers": ["w", "v"]}, {}, "rule 4:.*don't fit"),
        (GOOD | {"writers": ["w", "w"]}, {"strengths": torch.ones(2, 2)}, "rule 4:.*twice"),
        (GOOD, {"directions": 2 * torch.eye(2, 4)}, "rule 4:.*norm 2"),
        (GOOD, {"directions": torch.eye(4)[0].repeat(2, 1)}, "rule 4:.*orthogonal"),
        (GOOD, {"strengths": torch.tensor([[float("nan"), 1.0]])}, "rule 4:.*finite"),
    ],
)
def test_a_broken_rule_is_named(tmp_path, document, tensors, message):
    path = written(tmp_path / "r", document, **tensors)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_without_its_metadata_it_is_no_recipe(tmp_path):
    save_file({"directions": torch.eye(2, 4), "strengths": torch.ones(1, 2)}, tmp_path / "r")
    with pytest.raises(RecipeError, match=r"rule 3: it has no 'abliterate\.recipe'"):
        load_recipe(tmp_path / "r")


def test_files_that_are_missing_cut_off_or_no_safetensors(tmp_path, recipe):
    with pytest.raises(RecipeError, match="not found"):
        load_recipe(tmp_path / "r")
    save_recipe(recipe, tmp_path / "r")
    whole = (tmp_path / "r").read_bytes()
    for content in (whole[:-4], whole[:50], b"", b"PK\x03\x04 a pickle or so", struct.pack("<Q", 2**60) + whole[8:]):
        (tmp_path / "r").write_bytes(content)
        with pytest.raises(RecipeError, match="rule 1"):
            load_recipe(tmp_path / "r")


def test_a_huge_file_is_not_read(tmp_path, recipe, monkeypatch):
    save_recipe(recipe, tmp_path / "r")
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    with pytest.raises(RecipeError, match="rule 1: at most 100"):
        load_recipe(tmp_path / "r")


def test_nothing_half_written_is_left(tmp_path, recipe, monkeypatch):
    def fails(*_args, **_options):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", fails)
    with pytest.raises(OutputError, match="disk is full"):
        save_recipe(recipe, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def whole(document=None, **tensors):
    """The bytes of a valid recipe with shifts and stored tensors, or of one with another document."""
    good = SHIFTED | {"tensors": {"w": [STORED]}, "model": {"layers": 4, "d_model": 4, "source": "x"}}
    held = {"directions": torch.eye(2, 4), "strengths": torch.ones(1, 2)} | SHIFT | tensors
    return save(held, metadata={KEY: json.dumps(good if document is None else document)})


def reads_or_refuses(path, content):
    """Read bytes as a recipe; anything but a recipe or a RecipeError is raised."""
    path.write_bytes(content)
    try:
        return load_recipe(path)
    except RecipeError as error:
        assert "\n" not in str(error)
        return None


def test_what_is_mutated_below_is_valid(tmp_path):
    assert reads_or_refuses(tmp_path / "r", whole()) is not None


@FUZZ
@given(content=st.binary(max_size=400))
def test_random_bytes_are_refused(content, tmp_path):
    assert reads_or_refuses(tmp_path / "r", content) is None
    reads_or_refuses(tmp_path / "r", struct.pack("<Q", len(content)) + content)


@FUZZ
@given(data=st.data())
def test_a_valid_file_with_bytes_changed_put_in_or_cut_is_read_or_refused(data, tmp_path):
    content = bytearray(whole())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        kind = data.draw(st.sampled_from(["change", "insert", "cut", "end"]))
        if kind == "change" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 30))]
        else:
            del content[at:]
    reads_or_refuses(tmp_path / "r", bytes(content))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(2**70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def mutated(draw, value):
    """A JSON value with one thing in it replaced, left out or added."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 4)) == 0:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mutated(draw, value[key])}
    if isinstance(value, list) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], mutated(draw, value[at]), *value[at + draw(st.integers(0, 1)) :]]
    return draw(ANY)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_valid_file_with_another_document_is_read_or_refused(data, tmp_path):
    good = SHIFTED | {"tensors": {"w": [STORED | {"gain": {"name": "n", "plus": 1.0, "centred": False}}]}}
    recipe = reads_or_refuses(tmp_path / "r", whole(mutated(data.draw, good)))
    if recipe is not None:  # what is read is a recipe: it can be written again
        save_recipe(recipe, tmp_path / "s")


@FUZZ
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]),
    shape=st.lists(st.integers(0, 3), max_size=4),
    name=st.sampled_from(["directions", "strengths", "shift_directions", "shift_sizes", "more"]),
)
def test_a_valid_file_with_another_tensor_is_read_or_refused(dtype, shape, name, tmp_path):
    reads_or_refuses(tmp_path / "r", whole(**{name: torch.ones(shape, dtype=dtype)}))
