"""`abliterate show` and `abliterate diff`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from abliterate.edit.compare import place_of
from abliterate.edit.edit import Edit, Shift, normalised
from abliterate.edit.recipe import Recipe, save_recipe
from abliterate.edit.stored_tensor import StoredTensor
from command import abliterate, succeeds

D, LAYERS = 16, 6


def unit(seed: int) -> torch.Tensor:
    return torch.from_numpy(normalised(torch.randn(D, generator=torch.Generator().manual_seed(seed))))


def attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.o_proj.weight"


def mlp(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj.weight"


RATE = {"refused": 98, "count": 3, "total": 100, "rate": 0.98, "ci95": [0.93, 0.994]}
NUMBERS = {
    "refusal": RATE, "over_refusal": RATE, "degenerate": RATE, "divergence": {"first_token": 0.132, "answer": 0.112},
    "loss": {"baseline_answers": 0.765},
}  # fmt: skip
PROVENANCE = {"found_at": {"layer": 3, "site": "pre"}, "settings": {"seed": 1}, "original": NUMBERS, "edited": NUMBERS}


def edit(factor: float = 1.0) -> Edit:
    """Rising over the layers in attention, falling in the MLP, which is left alone in the last and strengthened in
    the first."""
    strengths = {"model.embed_tokens.weight": 0.5}
    strengths |= {attention(layer): factor * (layer + 1) / LAYERS for layer in range(LAYERS)}
    strengths |= {mlp(layer): 1 - layer / (LAYERS - 1) for layer in range(1, LAYERS)} | {mlp(0): -0.25}
    return replace(Edit.from_names(strengths, unit(0)), shifts=(Shift(2, unit(1), -3.0),))


def written(path, of: Edit, **provenance):
    about = {"source": "x/Y", "layers": LAYERS, "d_model": D}
    tensors = {name: (StoredTensor(name, (D, 4), 0),) for name in of.writers}
    save_recipe(Recipe(of, about, PROVENANCE | provenance, tensors), path)
    return path


@pytest.fixture
def recipe(tmp_path):
    return written(tmp_path / "recipe.safetensors", edit())


def test_the_folder_of_a_run_stands_for_its_recipe(recipe):
    assert succeeds("show", recipe.parent).out == succeeds("show", recipe).out
    assert succeeds("diff", recipe.parent, recipe, "--json").json == succeeds("diff", recipe, recipe, "--json").json


def test_show_prints_what_the_recipe_does_and_where_it_comes_from(recipe):
    out = succeeds("show", recipe).out
    for text in ("source: x/Y", '"site": "pre"', "98 of 100 = 98.0% (93.0% to 99.4%)", "0.132"):
        assert text in out
    assert f"1 direction of {D} entries, 13 writers (13 checkpoint tensors), 1 shift" in " ".join(out.split())
    assert "shift at layer 2 by -3" in out


def test_show_draws_strengths_over_layers(recipe):
    drawing = succeeds("show", recipe).out.split("strengths over layers")[1].splitlines()
    lines = {line.split()[0]: line for line in drawing if line.split()}
    assert lines["embed_tokens"].split() == ["embed_tokens", "0.50"]
    assert lines["self_attn.o_proj"].split()[1:] == ["▂▃▅▆▇█", "0.17..1.00"]
    assert lines["mlp.down_proj"].split()[1:] == ["-▇▅▄▂.", "-0.25..0.80"]
    assert all(len(line) <= 80 for line in lines.values())


def test_many_layers_are_drawn_in_80_columns(tmp_path):
    names = {attention(layer): layer / 100 for layer in range(100)}
    save_recipe(Recipe(Edit.from_names(names, unit(0))), tmp_path / "r")
    drawing = succeeds("show", tmp_path / "r").out.split("strengths over layers")[1].splitlines()[1:]
    assert all(len(line) <= 80 for line in drawing)
    bars = [line.split()[1] for line in drawing if "o_proj" in line]
    assert [len(bar) for bar in bars] == [40, 40, 20]


def test_show_as_json_holds_everything_but_the_directions(recipe):
    document = succeeds("show", recipe, "--json").json
    assert document["model"]["source"] == "x/Y" and document["provenance"] == PROVENANCE
    assert document["directions"] == [{"writers": 12, "layers": [0, 5], "strength": {"min": -0.25, "max": 1.0}}]
    assert document["writers"][1] == {
        "name": attention(0), "layer": 0, "strengths": [pytest.approx(1 / 6)], "tensors": [attention(0)],
    }  # fmt: skip
    assert document["shifts"] == [{"layer": 2, "size": -3.0}]


def test_another_tools_provenance_is_shown_as_it_is(tmp_path):
    file = written(tmp_path / "r", edit(), original="as\x1b[31m good", edited=[1, 2])
    out = succeeds("show", file).out
    assert "original: as [31m good" in out and "edited: [1, 2]" in out
    assert "\x1b" not in out


def test_a_recipe_that_does_nothing_is_shown(tmp_path):
    save_recipe(Recipe(Edit((), torch.zeros(0, 4), torch.zeros(0, 0))), tmp_path / "r")
    assert "0 directions of 4 entries, 0 writers" in succeeds("show", tmp_path / "r").out


def test_what_is_no_recipe_is_an_error(tmp_path):
    (tmp_path / "r").write_text("no")
    for arguments in (("show", tmp_path / "r"), ("diff", tmp_path / "r", tmp_path / "r"), ("show", tmp_path / "none")):
        done = abliterate(*arguments)
        assert done.code == 2 and "recipe" in done.err and done.out == ""


def test_diff_of_a_recipe_with_itself(recipe):
    out = succeeds("diff", recipe, recipe).out
    assert "the edits are the same" in out and "differences" not in out
    document = succeeds("diff", recipe, recipe, "--json").json
    assert document["provenance"] == document["model"] == {}
    assert document["only_left"] == document["only_right"] == []


def test_diff_names_writers_in_one_only_strengths_cosines_and_provenance(recipe, tmp_path):
    angle = 0.6 * unit(0) + 0.8 * torch.from_numpy(normalised(unit(1) - (unit(1) @ unit(0)) * unit(0)))
    names = {attention(layer): 0.5 for layer in range(3)} | {"model.layers.0.mlp.other.weight": 1.0}
    other = written(
        tmp_path / "other", Edit.from_names(names, angle) + Edit.shifting(2, unit(1), 1.0), settings={"seed": 2}
    )
    document = succeeds("diff", recipe, other, "--json").json
    assert len(document["only_left"]) == 9 and document["only_right"] == ["model.layers.0.mlp.other.weight"]
    assert [w["name"] for w in document["writers"]] == [attention(layer) for layer in range(3)]
    for layer, pair in enumerate(document["writers"]):
        assert (pair["left"], pair["right"], pair["layer"]) == (pytest.approx((layer + 1) / 6), 0.5, layer)
        assert pair["cosine"] == pytest.approx(0.6, abs=1e-5)
    assert document["shifts"] == [
        {"layer": 2, "left": pytest.approx(3.0), "right": pytest.approx(1.0), "cosine": pytest.approx(-1.0)}
    ]
    assert document["provenance"] == {"settings.seed": [1, 2]}
    out = succeeds("diff", recipe, other).out
    for text in ("only left edits 9 writers", "mlp.other", "0.00..0.33", "0.60", "0: 0.60", "settings.seed: 1 | 2"):
        assert text in out


def test_taking_out_a_direction_is_taking_out_its_opposite(tmp_path):
    one, two = (written(tmp_path / str(i), Edit.from_names({mlp(0): 1.0}, i * unit(0))) for i in (1, -1))
    assert "the edits are the same" in succeeds("diff", one, two).out
    three = written(tmp_path / "3", Edit.from_names({mlp(0): 0.5}, unit(0)))
    assert "the edits are the same" not in succeeds("diff", one, three).out


def test_diff_of_spans_and_of_models_of_other_widths(tmp_path):
    plane = torch.stack([unit(0), unit(1)])
    one = written(tmp_path / "a", Edit.from_names({mlp(0): 1.0}, unit(1)))
    two = written(tmp_path / "b", Edit.from_names({mlp(0): 1.0}, plane))
    assert succeeds("diff", one, two, "--json").json["writers"][0]["cosine"] == pytest.approx(1.0, abs=1e-5)
    save_recipe(Recipe(Edit.from_names({mlp(0): 1.0}, torch.ones(4))), tmp_path / "c")
    assert succeeds("diff", one, tmp_path / "c", "--json").json["writers"][0]["cosine"] is None
    assert "-" in succeeds("diff", one, tmp_path / "c").out


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.mlp.down_proj.weight", ("mlp.down_proj", 12)),
        ("model.language_model.layers.3.mlp.experts.down_proj", ("mlp.experts.down_proj", 3)),
        ("transformer.h.0.attn.c_proj.weight", ("attn.c_proj", 0)),
        ("model.layers.3.experts.7.w2.weight", ("experts.7.w2", 3)),
        ("model.embed_tokens.weight", ("embed_tokens", None)),
        ("wte.weight", ("wte", None)),
        ("w", ("w", None)),
    ],
)
def test_a_writers_place_is_read_off_its_name(name, place):
    assert place_of(name) == place
