"""The plan's arithmetic, and that planning runs no more than its probe."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from abliterate.common.errors import AbliterateError
from abliterate.models.handle import Handle
from abliterate.run import pipeline, plan
from abliterate.run.opening import OPENING_TOKENS
from abliterate.run.plan import SEARCH_COSTS, Counts, duration, plan_run, predicted
from command import SMALL, abliterate
from plans import COSTS, settings

COUNTS = Counts(
    {"train": 100, "validation": 20, "test": 40}, {"train": 100, "validation": 20, "test": 40}
)  # fmt: skip


def test_each_stage_counts_its_own_prompts():
    costs = replace(COSTS, per_token=1.0, collect=0.5, divergence=2.0, reference=3.0, load=7.0, bake=3.0, save=5.0)
    chosen = settings(measure={"max_new_tokens": 60}, beside={"also_prompts": 10, "obligations": 3, "second_turn": 5})
    found = predicted(costs, COUNTS, chosen, False, 0.0).stages
    assert found["load"] == 7 and found["edit"] == 0 and found["save"] == 5 + 3
    assert found["filter"] == (100 + 20) * (4 + 8)
    assert found["collect"] == 200 * 0.5
    assert found["measure original"] == 40 * 4 + 40 * 60 + 40 * 3 + 10 * 4 + 10 * 8 + 5 * 4 + 3 * 60
    assert found["measure edited"] == 40 * 8 + 40 * 60 + 40 * 2 + 10 * 8 + 10 * 8 + 5 * 8 + 3 * 60


def test_what_the_filter_leaves_out_is_not_collected():
    costs = replace(COSTS, collect=1.0, refused=0.5, answered=0.25)
    assert predicted(costs, COUNTS, settings(), False, 0.0).stages["collect"] == 50 + 25
    unfiltered = predicted(costs, COUNTS, settings(collect={"filter": False}), False, 0.0).stages
    assert unfiltered["collect"] == 200 and unfiltered["filter"] == 0


def test_activations_from_a_file_are_neither_filtered_nor_collected():
    costs = replace(COSTS, per_token=1.0, collect=1.0)
    found = predicted(costs, COUNTS, settings(), True, 0.0).stages
    assert found["collect"] == 0 and found["filter"] == 20 * (4 + 8)
    fitted = predicted(costs, COUNTS, settings({"method": "fit"}, collect={"filter": False}), True, 0.0).stages
    assert fitted["filter"] == (100 + 20) * (4 + 8)  # it needs the model's own words


def test_memory_grows_with_rows_tokens_and_prompts():
    less = predicted(COSTS, COUNTS, settings(measure={"max_new_tokens": 60}), False, 0.0).memory_bytes
    more = predicted(COSTS, COUNTS, settings(measure={"max_new_tokens": 90}), False, 0.0).memory_bytes
    assert more - less == 80 * 30 * 100  # eighty rows, thirty tokens, a hundred bytes each


def test_every_method_has_a_cost_that_grows_with_what_it_does():
    costs = replace(COSTS, per_token=0.01, first_token=0.01, first_token_edited=0.02)
    kept = Counts(COUNTS.target, COUNTS.baseline)
    few, many = (
        SEARCH_COSTS["article"](costs, kept, settings(search={"method": "article", "candidates": n})) for n in (5, 10)
    )
    assert many == pytest.approx(few * 11 / 6)
    whole, part = (SEARCH_COSTS["sweep"](costs, kept, settings(search={"layers": ls})) for ls in (None, "2-3"))
    assert 0 < part < whole


def test_a_fit_costs_its_steps_and_a_tpe_search_its_trials():
    costs = replace(COSTS, gradient=1.0)
    few, more = (SEARCH_COSTS["fit"](costs, COUNTS, settings({"method": "fit", "steps": n})) for n in (10, 20))
    assert more - few == 10 * (8 + 16)  # sequences per step
    costs = replace(COSTS, per_token=1.0, first_token_edited=0.5)
    found = SEARCH_COSTS["tpe"](costs, COUNTS, settings({"method": "tpe", "trials": 3}))
    assert found == 3 * (20 * 8 + 20 * 0.5)


def test_a_method_without_a_cost_is_an_error_before_anything_is_loaded(monkeypatch):
    monkeypatch.delitem(SEARCH_COSTS, "sweep")
    monkeypatch.setattr(plan, "open_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(AbliterateError, match="sweep"):
        plan_run("nowhere", settings(search={"method": "sweep"}))


def test_planning_probes_one_batch_and_writes_nothing(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("_searched", "measured", "filtered", "collected", "save_edited"):
        monkeypatch.setattr(pipeline, name, lambda *_a, **_k: pytest.fail("a stage of the run was run"))
    rows = []
    plain = Handle.last_logits

    def noted(self, keep=1, **inputs):
        rows.append(inputs["input_ids"].shape)
        return plain(self, keep, **inputs)

    monkeypatch.setattr(Handle, "last_logits", noted)
    chosen = settings(
        prompts={"target": "bundled", "baseline": "bundled"},
        measure={"max_new_tokens": 16},
        load={"dtype": "float32"},
    )
    found = plan_run(str(tiny_folder), chosen)
    assert list(tmp_path.iterdir()) == []
    assert max(shape[0] for shape in rows) <= 64
    assert sum(shape[1] == 1 for shape in rows) <= 16 + OPENING_TOKENS + 4  # the batch, the reasoning mark, the warm-up
    assert list(found.stages) == [
        "load", "prove", "filter", "collect", "search", "report data", "measure original", "edit", "measure edited",
        "save",
    ]  # fmt: skip
    assert all(seconds >= 0 and math.isfinite(seconds) for seconds in found.stages.values())
    assert found.total == pytest.approx(sum(found.stages.values()))
    assert found.memory_bytes >= found.costs.peak_bytes
    assert found.costs.kv_bytes == 4 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["total_s"] == found.total
    assert [name for name, _ in found.rows()][-3:] == ["in all", "memory, at most", "disk"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (59.4, "59 s"), (75, "1 min 15 s"), (3600, "1 h 0 min"), (5400, "1 h 30 min")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_the_command_prints_a_table_or_json_and_leaves_nothing(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = abliterate("run", tiny_folder, "--plan", "--method", "sweep", *SMALL)
    assert said.code == 0 and "measure edited" in said.out and "memory, at most" in said.out
    found = abliterate("run", tiny_folder, "--plan", "--json", "--quiet", "--method", "article", *SMALL)
    assert found.code == 0 and found.json["total_s"] > 0
    assert list(tmp_path.iterdir()) == []
