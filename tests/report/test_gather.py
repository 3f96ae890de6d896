"""What a run keeps for its report is what the model does."""

from __future__ import annotations

import json

import pytest
import torch

from abliterate.directions.activations import collect
from abliterate.directions.means import Place, at, difference_of_means
from abliterate.edit.edit import Edit
from abliterate.models.writers import SITES, find_writers
from abliterate.prompts.sets import load_sides
from abliterate.report.gather import direction_by_layer, gather, stream_at
from models import FAMILIES, handle_of

PLACE = Place(2, "mid", -2)


@pytest.fixture(scope="module")
def sides():
    return load_sides("bundled", "bundled", limit_train=12, limit_validation=8, limit_test=4)


@pytest.fixture(scope="module")
def gathered(sides):
    """(what was gathered before and after a whole edit, the handle, the directions)."""
    handle = handle_of(FAMILIES["llama"]())
    acts = collect(handle, sides.target.train, sides.baseline.train, positions=3)
    directions = difference_of_means(acts)
    edit = Edit.uniform(find_writers(handle), at(directions, PLACE))
    found = gather(handle, edit, PLACE, directions, sides.target.validation.texts, sides.baseline.validation.texts)
    with edit.attached(handle):
        found.look_at_edited(handle)
    return found, handle, directions


def data(done) -> dict:
    return json.loads((done / "report-data.json").read_text())


def test_stream_is_that_of_collect(sides, tiny_handle):
    prompts = sides.target.validation.texts
    kept = collect(tiny_handle, prompts, prompts, positions=3, keep_vectors=True).target.vectors
    for position in (-1, -3):
        assert torch.allclose(
            stream_at(tiny_handle, prompts, position, batch_size=3), kept[:, :, :, position], atol=1e-4
        )


def test_ticks_count_prompts(sides, tiny_handle):
    ticks = []
    stream_at(tiny_handle, sides.target.validation.texts, -1, batch_size=3, tick=ticks.append)
    assert sum(ticks) == 8


def test_separation_is_of_the_validation_prompts(gathered, sides):
    found, handle, directions = gathered
    table = found.document["separation"]
    streams = [stream_at(handle, side.validation.texts, PLACE.position) for side in (sides.target, sides.baseline)]
    means = [s[:, 2, 1].double().mean(0) for s in streams]
    assert table["mid"]["cosine"][2] == pytest.approx(float(torch.cosine_similarity(*means, dim=0)), abs=1e-4)
    assert table["mid"]["target_norm"][2] == pytest.approx(float(streams[0][:, 2, 1].norm(dim=-1).mean()), rel=1e-3)
    along = [s[:, 2, 1] @ at(directions, PLACE) for s in streams]
    pairs = along[0][:, None] > along[1][None]
    assert table["mid"]["auc"][2] == pytest.approx(float(pairs.double().mean()), abs=1e-4)
    assert table["pre"]["separation"][3] == pytest.approx(float(directions.separation[3, 0, -2]), abs=1e-4)


def test_cosines_are_of_the_directions(gathered):
    found, _, directions = gathered
    for row, site in enumerate(SITES):
        rows = found.document["cosines"][site]
        if site == "pre":  # the embedding of the tokens after the instruction is every prompt's
            assert rows[0] == [None] * 4
            rows = [[0] * 4, *rows[1:]]
        table = torch.tensor([[0 if value is None else value for value in line] for line in rows])
        assert torch.allclose(table.diagonal()[1:], torch.ones(3), atol=2e-3)
        expected = directions.unit[1, row, -2] @ directions.unit[3, row, -2]
        assert float(table[1, 3]) == pytest.approx(float(expected), abs=2e-3)


def test_projection_has_a_point_per_prompt_and_layer(gathered, sides):
    found = gathered[0].document["projection"]
    assert found["site"] == "mid"
    for side in ("target", "baseline"):
        assert [len(plane) for plane in found[side]] == [8] * 4
        assert len(found["prompts"][side]) == 8
    centre = torch.tensor([found["target"][2], found["baseline"][2]]).mean((0, 1))
    assert centre.abs().max() < 1e-2


def test_tokens_show_the_direction_before_and_not_after(gathered, sides):
    found, handle, directions = gathered
    tokens = found.document["tokens"]
    assert [entry["side"] for entry in tokens] == ["target", "target", "baseline", "baseline"]
    for entry in tokens:
        before, after = torch.tensor(entry["original"]), torch.tensor(entry["edited"])
        assert before.shape == after.shape == (4, len(entry["tokens"]))
        assert before.abs().max() > 0.05
        assert after.abs().max() < 1e-3
    (ids,) = handle.prompt_ids([tokens[0]["prompt"]])
    h = stream_at(handle, [tokens[0]["prompt"]], -1)[0, 3, 1]
    assert tokens[0]["original"][3][-1] == pytest.approx(float(h @ at(directions, PLACE) / h.norm()), abs=1e-3)
    assert len(tokens[0]["tokens"]) == min(len(ids), 64)


def test_a_parallel_block_has_no_mid(sides):
    handle = handle_of(FAMILIES["gpt_neox"]())
    directions = difference_of_means(collect(handle, sides.target.train, sides.baseline.train, positions=1))
    place = Place(2, "pre", -1)
    edit = Edit.uniform(find_writers(handle), at(directions, place))
    found = gather(handle, edit, place, directions, sides.target.validation.texts, sides.baseline.validation.texts)
    assert set(found.document["separation"]["mid"]["auc"]) == {None}
    assert "mid" not in found.document["cosines"]
    json.dumps(found.document, allow_nan=False)


def test_direction_by_layer_follows_the_strengths(tiny_handle):
    writers = find_writers(tiny_handle)
    directions = torch.eye(3, tiny_handle.d_model)
    strengths = torch.zeros(len(writers), 3)
    for row, writer in enumerate(writers):
        if writer.layer in (0, 1):
            strengths[row, writer.layer] = 0.5
        if writer.layer == 3:
            strengths[row, 2] = -1.5
    along = direction_by_layer(Edit([w.name for w in writers], directions, strengths), tiny_handle)
    assert along.argmax(1).tolist() == [0, 1, 2, 2]  # layer 2 isn't edited: the strongest of all


def test_a_run_keeps_little_and_no_answer_to_a_target_prompt(done):
    assert (done / "report-data.json").stat().st_size < 2 * 2**20
    found = data(done)
    assert not found["show_completions"]
    assert len(found["examples"]["target"]) == len(found["examples"]["baseline"]) == 6
    for entry in found["examples"]["target"]:
        assert set(entry) == {"prompt", "original", "edited"}
        assert set(entry["original"]) == set(entry["edited"]) == {"refused", "evaded"}
    assert all(set(entry["original"]) == {"refused", "answer"} for entry in found["examples"]["baseline"])


def test_a_run_keeps_them_when_asked(shown):
    found = data(shown)
    assert found["show_completions"]
    assert all(set(entry["edited"]) == {"refused", "evaded", "answer"} for entry in found["examples"]["target"])


def test_every_writer_is_named(done, tiny_handle):
    found = {(w["name"], w["layer"], w["side"]) for w in data(done)["writers"]}
    assert found == {(w.name, w.layer, w.side) for w in find_writers(tiny_handle)}
