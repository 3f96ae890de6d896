"""Healing the demo model after the article's edit at full strength, which hurts it badly: the bars."""

from __future__ import annotations

import json

import pytest

import abliterate as ab
from abliterate.directions.means import Place, at, difference_of_means
from abliterate.edit.edit import Edit
from abliterate.measure.decode import decode
from abliterate.models.demo import demo_model
from abliterate.models.loading import load
from command import PROMPTS, succeeds
from long import LONG
from models import save_tiny

pytestmark = [pytest.mark.slow, LONG]  # the training alone takes half an hour on two slow cores

ARTICLES = Place(5, "pre", -1)  # what `abliterate run demo --method article` picks
TEST_PROMPTS = 60
PAIRS, PAIR_TOKENS = 80, 40


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """The demo model with one layer's direction taken out of every writer whole, as a folder; read only."""
    handle = load(str(demo_model()))
    sides = ab.load_sides("bundled", "bundled", limit_train=64, limit_validation=8, limit_test=8)
    found = difference_of_means(ab.collect(handle, sides.target.train.texts, sides.baseline.train.texts))
    Edit.uniform(ab.find_writers(handle), at(found, ARTICLES)).bake(handle)
    folder = tmp_path_factory.mktemp("demo") / "edited"
    return save_tiny(folder, handle.model, handle.tokenizer)


@pytest.fixture(scope="module")
def healed(edited, tmp_path_factory):
    """It healed by the original, and what the command printed."""
    out = tmp_path_factory.mktemp("healed") / "out"
    done = succeeds(
        "heal", edited, "--original", demo_model(), "--preset", "self", "--out", out, *PROMPTS,
        "--test-prompts", TEST_PROMPTS, "--max-new-tokens", "48", "--json", "--quiet",
    )  # fmt: skip
    return out / "model", done


@pytest.mark.timeout(3600)
def test_the_original_teaches_it_back(healed):
    _, done = healed
    states = {name: done.json[name] for name in ("original", "edited", "healed")}
    print(json.dumps({**states, "heal": done.json["heal"], "timings_s": done.json["timings_s"]}))
    before, after = (states[name]["divergence"] for name in ("edited", "healed"))
    assert before["answer"] > 1.0  # it was hurt badly
    assert after["answer"] <= 0.5 * before["answer"]
    assert after["first_token"] <= 0.5 * before["first_token"]
    degenerate = {name: state["degenerate"]["rate"] for name, state in states.items()}
    assert degenerate["edited"] > degenerate["original"] + 0.05  # its answers broke
    assert degenerate["healed"] <= degenerate["original"] + 0.02
    assert states["original"]["refusal"]["rate"] > 0.9
    assert states["healed"]["refusal"]["rate"] <= 0.05


def pairs_of(edited, file) -> None:
    """The original's answers to training baseline prompts, preferred to the edited model's."""
    prompts = ab.load_sides("bundled", "bundled", limit_train=PAIRS).baseline.train.texts
    answers = []
    for source in (str(demo_model()), str(edited)):
        handle = load(source)
        answers.append([a.text for a in decode(handle, handle.prompt_ids(prompts), max_new_tokens=PAIR_TOKENS)])
        del handle
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(prompts, *answers, strict=True) if c and r]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.timeout(3600)
def test_preferences_move_it_back(edited, tmp_path):
    pairs_of(edited, tmp_path / "pairs.jsonl")
    done = succeeds(
        "heal", edited, "--original", demo_model(), "--preset", "dpo", "--data", tmp_path / "pairs.jsonl", "--out",
        tmp_path / "healed", *PROMPTS, "--test-prompts", "24", "--max-new-tokens", "32", "--learning-rate", "2e-4",
        "--micro-batch", "4", "--accumulation", "2", "--epochs", "2", "--rank", "16", "--held-out", "0.25",
        "--no-gradient-checkpointing", "--json", "--quiet",
    )  # fmt: skip
    states = {name: done.json[name] for name in ("original", "edited", "healed")}
    print(json.dumps({**states, "heal": done.json["heal"], "timings_s": done.json["timings_s"]}))
    held_out = done.json["heal"]["held_out"]
    assert held_out["likelihood_accuracy"]["after"]["rate"] > held_out["likelihood_accuracy"]["before"]["rate"]
    assert held_out["reward_accuracy"]["rate"] > 0.6
    assert states["healed"]["divergence"]["answer"] < 0.9 * states["edited"]["divergence"]["answer"]


@pytest.mark.timeout(3600)
def test_the_benchmark_sees_what_it_cost_and_what_came_back(edited, healed, tmp_path):
    pytest.importorskip("lm_eval")
    models = [f"original={demo_model()}", f"edited={edited}", f"healed={healed[0]}"]
    done = succeeds("bench", *models, "--suite", "quick", "--out", tmp_path / "bench", "--cache", tmp_path / "cache",
                    "--quiet")  # fmt: skip
    print(done.out)
    document = json.loads((tmp_path / "bench" / "results.json").read_text())
    row = next(row for row in document["rows"] if row["name"] == "average")
    average = {name: column["score"] for name, column in row["models"].items()}
    assert average["edited"] < average["healed"]
    assert average["edited"] < average["original"] - 0.05
