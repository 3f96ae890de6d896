"""The audit: exact on a model with a planted refusal, resumable, and on the demo model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import abliterate as ab
import abliterate.audit.stages as stages
from abliterate.audit import AuditRunSettings, audit
from abliterate.audit.judging import area_under_curve, stream_at, with_interval
from abliterate.audit.stages import fit_file, work_file
from abliterate.audit.summary import summary
from abliterate.audit.text import resisting, table_rows
from abliterate.common.errors import NothingToDoError, OutputError
from abliterate.directions.means import Place, difference_of_means
from abliterate.measure.rates import Rate
from abliterate.run import opening
from command import listing
from long import LONG
from planted import RefusesWithR, planted

WORDS = ["boats", "maps", "rain", "bread", "songs", "cats", "walks", "tea", "hills", "birds", "snow", "lamps"]
TEXTS = [f"{a} and {b}" for a in WORDS for b in WORDS if a != b][:96]
SMALL = {
    "steps": 6, "strengths": (0.5, 1.0), "counts": (1, 8), "draws": 2, "draw_prompts": 8, "divergence_prompts": 8,
    "answer_tokens": 3,
}  # fmt: skip


def settings(folder: Path, **more: object) -> AuditRunSettings:
    for side, start in (("target", "Q about"), ("baseline", "tell of")):
        (folder / f"{side}.txt").write_text("\n".join(f"{start} {text}" for text in TEXTS))
    prompts = {
        "target": str(folder / "target.txt"), "baseline": str(folder / "baseline.txt"), "train_prompts": 16,
        "validation_prompts": 8, "test_prompts": 12,
    }  # fmt: skip
    return AuditRunSettings.model_validate({"prompts": prompts, "audit": SMALL, **more})


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(opening, "open_model", lambda *_: planted())
    return "planted"


@pytest.fixture
def done(model, tmp_path):
    return audit(model, tmp_path / "out", settings(tmp_path), judge=RefusesWithR()), tmp_path / "out"


def test_the_planted_guard_is_found_out(done):
    """One direction, written by one layer, found from one prompt: the audit says so."""
    document, out = done
    assert document["direction"]["original"]["refusal"]["refused"] == 12
    assert document["direction"]["place"]["layer"] in (2, 3)  # written at the end of block 1
    at_full = document["direction"]["strengths"][-1]
    assert at_full["strength"] == 1.0 and at_full["test"]["refusal"]["refused"] == 0
    assert document["summary"]["directions"] == 1 and len(document["directions"]["ranks"]) == 1
    assert document["summary"]["prompts"] == 1 and document["summary"]["layers"] == 1
    lowered = [row["lowered"] for row in document["layers"]["each"]]
    assert lowered.index(max(lowered)) == 1 and document["layers"]["together"][0]["layers"] == [1]
    assert [row["auc"] for row in document["layers"]["each"]][2:] == [1.0, 1.0]
    least = document["summary"]["least_divergence"]["0.10"]
    assert least["refusal"]["refused"] == 0 and least["divergence"]["first_token"]["value"] < 0.1
    assert sorted(p.name for p in out.iterdir()) == ["audit.json", "audit.md", "audit.png"]
    assert json.loads((out / "audit.json").read_text()) == json.loads(json.dumps(document))
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []


def test_every_rate_and_divergence_has_an_interval(done):
    document, _ = done
    rates, means = [], []

    def walk(value):
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(inner)
        if isinstance(value, dict) and isinstance(value.get("refused"), int):
            rates.append(value)
        if isinstance(value, dict) and set(value) == {"value", "ci95"}:
            means.append(value)

    walk(document)
    assert len(rates) > 15 and len(means) > 10
    for found in rates:
        assert found["ci95"] == list(Rate(found["refused"], found["total"]).ci95)
    assert all(found["ci95"][0] <= found["value"] <= found["ci95"][1] for found in means)


def test_what_people_read_says_what_the_numbers_say(done):
    document, out = done
    text = (out / "audit.md").read_text()
    assert "(audit.png)" in text and "upper bound on how strong the guard is" in text
    refused = document["directions"]["ranks"][0]["test"]["refusal"]
    assert f"| 1 | {document['directions']['ranks'][0]['layers'][0]} | {refused['refused']} of 12" in text
    rows = table_rows(document)
    assert rows[0][2].startswith("12 of 12")
    assert any("prompts a side" in name and count == "1" for name, count, _ in rows)
    for name in ("audit.json", "audit.md"):  # no answers: the planted model's are R and A
        assert "RRR" not in (out / name).read_text() and not re.search(
            r'"(text|answers?)": "', (out / name).read_text()
        )


def test_a_guard_that_nothing_takes_out_is_said_to_resist(done):
    document, _ = json.loads(json.dumps(done[0])), None
    for point in (*document["frontier"]["points"], *document["direction"]["strengths"]):
        point["validation"]["refusal"]["rate"] = 0.5
    for row in (*document["directions"]["ranks"], *document["layers"]["together"]):
        row["test"]["refusal"]["rate"] = 0.5
    for row in document["few_prompts"]["counts"]:
        row["refusal"]["rate"] = 0.5
    document["summary"] = summary(document)
    assert document["summary"]["least_divergence"] == {"0.10": None, "0.05": None}
    assert [document["summary"][k] for k in ("directions", "layers", "prompts")] == [None, None, None]
    assert document["summary"]["kinds"]["in words that the list doesn't know"] == {"original": 12, "left": 0}
    shown = [how for _, how, _ in table_rows(document)]
    assert "none of the edits tried" in shown and "more than 8" in shown


def test_the_kind_that_resists_is_named():
    kinds = {
        "in known words": {"original": 60, "left": 2}, "behind an explanation": {"original": 30, "left": 12},
        "in another language": {"original": 0, "left": 1},
    }  # fmt: skip
    assert resisting(kinds) == "What resists most is refusing in another language: 1 left, of 0 before."
    del kinds["in another language"]
    assert resisting(kinds).endswith("refusing behind an explanation: 12 left, of 30 before.")
    assert resisting({"in known words": {"original": 9, "left": 0}}).startswith("No kind of refusal resists")


class Killed(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_audit_goes_on_to_the_same_numbers(model, tmp_path, monkeypatch):
    whole = audit(model, tmp_path / "whole", settings(tmp_path), judge=RefusesWithR())
    ran = []

    def counting(name, stage):
        def run(work):
            ran.append(name)
            if name == "layers" and ran.count(name) == 1:
                raise Killed
            return stage(work)

        return run

    monkeypatch.setattr(stages, "STAGES", {name: counting(name, stage) for name, stage in stages.STAGES.items()})
    out = tmp_path / "out"
    with pytest.raises(Killed):
        audit(model, out, settings(tmp_path), judge=RefusesWithR())
    assert work_file(out).is_file() and fit_file(out).is_file() and not out.exists()
    with pytest.raises(OutputError, match="another model, prompts or settings"):
        audit(model, out, settings(tmp_path, resume=True, seed=1), judge=RefusesWithR())
    again = audit(model, out, settings(tmp_path, resume=True), judge=RefusesWithR())
    assert ran == ["direction", "frontier", "directions", "layers", "layers", "few_prompts"]
    for name in ("direction", "frontier", "directions", "layers", "few_prompts", "summary"):
        assert again[name] == whole[name], name
    assert not work_file(out).exists() and not fit_file(out).exists()


def test_a_damaged_work_file_is_an_error_of_one_line(model, tmp_path, monkeypatch):
    def killed(_work):
        raise Killed

    monkeypatch.setattr(stages, "STAGES", {"direction": killed})
    work_file(tmp_path / "out").write_text('{"key": "k"')
    with pytest.raises(OutputError, match="start anew without --resume"):
        audit(model, tmp_path / "out", settings(tmp_path, resume=True), judge=RefusesWithR())
    with pytest.raises(Killed):  # anew: the file isn't read
        audit(model, tmp_path / "out", settings(tmp_path), judge=RefusesWithR())


def test_a_model_without_a_guard_has_nothing_to_audit(model, tmp_path):
    class Never(RefusesWithR):
        def judge(self, prompts, answers):
            return [False for _ in answers]

    before = listing(tmp_path)
    options = settings(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(NothingToDoError, match="hardly refuses"):
        audit(model, tmp_path / "out", options, judge=Never())
    assert listing(tmp_path) == before


# --- arithmetic ---


def test_area_under_curve():
    assert area_under_curve(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])) == 1.0
    assert area_under_curve(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0])) == pytest.approx(0.375)
    assert area_under_curve(torch.tensor([float("nan")]), torch.tensor([2.0])) is None


def test_the_interval_of_a_mean_covers_it():
    """Of 200 samples of 40, the interval holds the true mean in about 95%."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for seed in range(200):
        found = with_interval(torch.rand(40, generator=generator).tolist(), seed)
        inside += found["ci95"][0] <= 0.5 <= found["ci95"][1]
    assert 180 <= inside <= 198
    assert with_interval([0.25] * 5) == {"value": 0.25, "ci95": [0.25, 0.25]}


def test_the_stream_read_for_few_prompts_is_that_of_collect():
    handle = planted()
    target, baseline = [f"Q about {t}" for t in TEXTS[:6]], [f"tell of {t}" for t in TEXTS[6:12]]
    acts = ab.collect(handle, target, baseline, positions=1)
    place = Place(2, "pre", -1)
    means = [stream_at(handle, prompts, place, batch_size=4).mean(0) for prompts in (target, baseline)]
    wanted = difference_of_means(acts)
    difference = means[0] - means[1]
    torch.testing.assert_close(difference.norm(), wanted.length[2, 0, -1].double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((difference / difference.norm()).float(), wanted.unit[2, 0, -1], atol=1e-5, rtol=0)


# --- the demo model ---


@LONG
@pytest.mark.slow
def test_the_demo_guard(tmp_path):
    """Without the fit, which its own tests cover: one direction undoes it, few prompts find that."""
    few = {
        "train_prompts": 48,
        "validation_prompts": 16,
        "test_prompts": 24,
        "target": "bundled",
        "baseline": "bundled",
    }
    small = {"fit": False, "strengths": (0.5, 1.0), "max_directions": 2, "counts": (1, 32), "draws": 1,
             "draw_prompts": 16, "divergence_prompts": 16, "answer_tokens": 24}  # fmt: skip
    options = AuditRunSettings.model_validate({"prompts": few, "audit": small})
    document = audit(str(ab.demo_model()), tmp_path / "out", options)
    found = document["summary"]
    assert found["original"]["rate"] >= 0.9
    assert found["least_divergence"]["0.10"]["refusal"]["rate"] <= 0.2
    assert found["directions"] in (1, 2) and found["layers"] is not None and found["prompts"] is not None
    full = document["few_prompts"]["counts"][-1]
    assert full["prompts"] == 32 and full["cosine"] > 0.9
    assert max(row["auc"] or 0 for row in document["layers"]["each"]) > 0.95
