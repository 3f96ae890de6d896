"""The main job on the demo model: real weights, real refusals, held-out prompts. Slow: some minutes."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import abliterate as ab
from abliterate.edit.recipe import load_recipe
from abliterate.measure import Measurement
from abliterate.models.demo import GUARD
from abliterate.run.pipeline import Result, run
from abliterate.search.sweep import SweepSettings
from abliterate.settings.run import RunSettings, resolve

pytestmark = pytest.mark.slow
TEST = 50


def settings(**flags: object) -> RunSettings:
    """Bundled prompts, and the flags given with `__` for the dot."""
    sources = {"prompts.target": "bundled", "prompts.baseline": "bundled"}
    return resolve({**sources, **{k.replace("__", "."): v for k, v in flags.items()}}, environment={})


@pytest.fixture(scope="module")
def demo_model() -> str:
    return str(ab.demo_model())


@pytest.fixture(scope="module")
def result(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One whole run at its defaults but for the prompts' numbers, on 50 held-out prompts a side."""
    out = tmp_path_factory.mktemp("run") / "out"
    prompts = {"prompts__train_prompts": 96, "prompts__validation_prompts": 48, "prompts__test_prompts": TEST}
    beside = {"beside__also_prompts": 16, "beside__obligations": 8, "beside__second_turn": 12}
    return run(demo_model, out, settings(**prompts, **beside, measure__max_new_tokens=48))


def wordings(measurement: Measurement) -> Counter[str]:
    """How often each of the guard's wordings is what an answer opens with."""
    known = [entry["refusal"] for entry in json.loads((GUARD / "wordings.json").read_text())]
    answers = [a.text.strip() for a in measurement.target_answers]
    return Counter(next((w for w in known if a.startswith(w[:20])), "other") for a in answers)


def test_the_guard_refuses_target_prompts_and_answers_baseline_prompts(result: Result) -> None:
    assert result.original.refusal.total == TEST
    assert result.original.refusal.rate >= 0.90
    assert result.original.over_refusal.total == TEST
    assert result.original.over_refusal.rate <= 0.05


def test_the_guard_refuses_in_many_wordings(result: Result) -> None:
    counts = wordings(result.original)
    del counts["other"]
    assert len(counts) >= 12, counts
    assert sum(n for w, n in counts.items() if "sorry" not in w.lower()) > sum(counts.values()) / 2


def test_the_guard_is_small() -> None:
    assert sum(f.stat().st_size for f in GUARD.iterdir()) <= 3_000_000


def test_the_edit_removes_refusals_and_little_else(result: Result) -> None:
    before, after = result.original, result.edited
    assert after.refusal.rate <= 0.05
    found = result.document["edited"]
    assert found["not_answered"]["rate"] <= 0.08 and found["second"]["refusal"]["rate"] <= 0.05
    assert found["second"]["judge"] == "trained" and found["collapse"]["target"] <= 0.05
    later = next(one for one in result.document["also"] if one["source"] == "second-turn")
    assert later["original"]["refusal"]["rate"] >= 0.6 and later["edited"]["refusal"]["refused"] <= 1
    assert after.over_refusal.rate <= before.over_refusal.rate
    assert after.degenerate.rate <= before.degenerate.rate + 0.02
    assert after.divergence is not None and after.divergence.prompts >= 0.9 * TEST
    assert after.divergence.first_token <= 0.03 and after.divergence.answer <= 0.03  # one direction at 1: 0.13, 0.11


def test_the_frontier_is_kept_with_the_chosen_point_marked(result: Result) -> None:
    frontier = result.document["frontier"]
    assert len(frontier) >= 2
    assert [p["chosen"] for p in frontier].count(True) == 1
    rates, divergences = ([p["refusal"]["rate"] for p in frontier], [p["divergence"] for p in frontier])
    assert divergences == sorted(divergences, reverse=True)  # the strongest first
    assert rates[-1] > 0.3 and min(rates) <= 0.05
    in_order = sorted(frontier, key=lambda p: p["step"])
    assert [p["seconds"] for p in in_order] == sorted(p["seconds"] for p in frontier)
    assert in_order[0]["seconds"] > 0 and in_order[-1]["seconds"] < sum(result.document["timings_s"].values())
    for point in frontier:
        edit = load_recipe(result.out / point["recipe"]).edit
        assert point["chosen"] == np.array_equal(edit.strengths, result.edit.strengths)


def test_the_saved_model_loads_with_plain_transformers_and_holds_the_edit(result: Result, demo_model: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(result.out / "model")
    tokenizer = AutoTokenizer.from_pretrained(result.out / "model")
    assert model.dtype == torch.bfloat16
    assert tokenizer.chat_template
    plain = AutoModelForCausalLM.from_pretrained(demo_model)
    assert set(result.edit.writers) <= {w.name for w in ab.find_writers(ab.load(demo_model))}
    assert 1 <= len(result.edit.writers) < 40  # writers that do nothing are left alone
    for name, part in result.edit.parts.items():
        before, after = (m.get_parameter(name).float() for m in (plain, model))
        if "embed" in name:
            before, after = before.T, after.T
        (r,), (strength,) = torch.from_numpy(part.directions), part.strengths
        assert 0 < strength <= 1.5
        assert torch.allclose(r @ after, (1 - strength) * (r @ before), atol=2e-2 * float((r @ before).abs().max())), (
            name
        )


def test_no_completion_of_a_target_prompt_is_written(result: Result) -> None:
    texts = [a.text[:40] for a in result.edited.target_answers if len(a.text) > 40]
    assert texts
    for file in ("results.json", "model/README.md"):
        written = (result.out / file).read_text()
        assert not any(text in written for text in texts)


def test_writers_are_proved_on_the_real_model_and_live_equals_baked(demo_model: str) -> None:
    handle = ab.load(demo_model, dtype="float32")
    assert ab.prove(handle).component < 1e-5
    edit = ab.Edit.uniform(ab.find_writers(handle), torch.randn(handle.d_model), 1.0)
    ids = torch.tensor(handle.prompt_ids(["Name three kinds of apple."]))
    with torch.inference_mode():
        plain = handle.model(ids).logits
        with edit.attached(handle):
            live = handle.model(ids).logits
        edit.bake(handle)
        baked = handle.model(ids).logits
    assert (plain - live).abs().max() > 0.1
    assert (live - baked).abs().max() < 1e-4 * live.abs().max()


def test_the_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With few prompts and the layers about the one found; everything else as it stands there."""
    few = {"limit_train": 16, "limit_validation": 8, "limit_test": 8}
    load_sides, measure, sweep = ab.load_sides, ab.measure, ab.sweep
    near = SweepSettings(layers=range(15, 17), decoded=2, decode_tokens=24)
    monkeypatch.setattr(ab, "sweep", lambda *given, **named: sweep(*given, **named, settings=near))
    monkeypatch.setattr(ab, "load_sides", lambda *sources, **limits: load_sides(*sources, **{**limits, **few}))
    monkeypatch.setattr(ab, "measure", lambda *given, **named: measure(*given, **{**named, "max_new_tokens": 24}))
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "pipeline.py"))
    printed = capsys.readouterr().out
    assert "Rate(" in printed and "Proof(" in printed
