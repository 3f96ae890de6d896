"""The comparison with Heretic, less what needs Heretic: bars, caching, the chat, reading its menus."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import frontier_evaluator  # noqa: E402
import frontier_prompts  # noqa: E402
import frontier_verdict  # noqa: E402
import heretic_run  # noqa: E402


def model(name, refused, first, along, *, over="0000", degenerate="0000", **more):
    divergence = None if name == "original" else {"first_token": first, "answer": along, "prompts": 4}
    rate = {"refused": refused, "total": 10, "rate": refused / 10, "ci95": [0.0, 1.0]}
    return {
        "name": name,
        "refusal": rate,
        "over_refusal": {"refused": over.count("1"), "total": 4},
        "divergence": divergence,
        "degenerate": {"count": degenerate.count("1"), "total": 4},
        "text_loss": 3.0,
        "questions": {"correct": 8, "total": 10, "log_score": -1.0},
        "verdicts": {
            "refusal": "1" * refused + "0" * (10 - refused),
            "over_refusal": over,
            "degenerate": degenerate,
        },
        **more,
    }


ORIGINAL = model("original", 9, 0, 0)
HERETIC = [model("H1", 0, 0.2, 0.1, pick=True), model("H2", 3, 0.1, 0.06), model("H3", 9, 0.01, 0.01)]
TIMES = {"heretic_seconds": 3000.0, "heretic_cpu_seconds": 4000.0}


def ours(first=0.07, along=0.03, **more):
    pick = model("A", 0, first, along, pick=True, seconds=100.0, cpu_seconds=120.0, **more)
    return [pick, model("B", 3, 0.03, 0.02, seconds=190.0, cpu_seconds=220.0)]


def bars_of(models):
    rows, bars = frontier_verdict.verdict(ORIGINAL, HERETIC, models, TIMES)
    return rows, [bar["met"] for bar in bars], bars


def test_all_bars_met():
    rows, met, bars = bars_of(ours())
    assert met == [True] * 7
    # H3 refuses as much as the original: there is nothing to compare
    assert [row["heretic"]["name"] for row in rows] == ["H1", "H2"]
    assert [row["ours"]["name"] for row in rows] == ["A", "B"]
    assert rows[0]["ratios"] == pytest.approx({"first_token": 0.35, "answer": 0.3})
    assert "1/30.0 (of CPU seconds 1/33.3)" in bars[4]["found"]


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"first": 0.09}, 0),
        ({"along": 0.05}, 1),
        ({"over": "1000"}, 2),
        ({"degenerate": "0100"}, 3),
    ],
)
def test_each_bar_can_be_missed(change, missed):
    _, met, _ = bars_of(ours(**change))
    assert met.index(False) == missed and met.count(False) == 1


def test_a_refusal_rate_not_reached_is_missed():
    rows, met, bars = bars_of([model("A", 2, 0.01, 0.01, pick=True, seconds=1.0, cpu_seconds=1.0)])
    assert rows[0]["ours"] is None
    assert met[:5] == [False, False, False, False, False]
    assert "1 not reached" in bars[0]["found"] and bars[4]["found"] == "none of ours beats it"
    assert "none" in frontier_verdict.markdown(document(rows, bars))


def test_nothing_to_compare_meets_no_bar():
    _, bars = frontier_verdict.verdict(ORIGINAL, [HERETIC[2] | {"pick": True}], ours(), TIMES)
    assert [bar["met"] for bar in bars[:4]] == [False] * 4


def test_time_and_abilities():
    late = ours()
    late[0] |= {"seconds": 201.0, "text_loss": 3.1, "questions": {"correct": 7, "total": 10, "log_score": -2.0}}
    _, met, _ = bars_of(late)
    assert met == [True, True, True, True, False, False, False]


def test_a_model_of_ours_is_one_model():
    """The best first token and the best answers of two models don't make a third."""
    split = [
        model("A", 0, 0.02, 0.09, pick=True, seconds=1.0, cpu_seconds=1.0),
        model("B", 0, 0.19, 0.01, seconds=1.0, cpu_seconds=1.0),
    ]
    rows, met, _ = bars_of(split)
    assert rows[0]["ours"]["name"] == "A" and met[:2] == [True, False]


def test_mcnemar():
    assert frontier_verdict.mcnemar("1100", "1100") == 1.0
    assert frontier_verdict.mcnemar("00000000", "11111111") == pytest.approx(2 / 2**8)
    assert frontier_verdict.mcnemar("0000000000", "1111111110") == pytest.approx(2 / 2**9)


def document(rows, bars):
    return {
        "command": "c",
        "model": "m",
        "machine": {"processor": "p", "cores": 2},
        "threads": 2,
        "versions": {"torch": "1"},
        "notes": ["n"],
        "bars": bars,
        "rows": [frontier_verdict.named(row) for row in rows],
        "original": ORIGINAL,
        "heretic": HERETIC,
        "ours": ours(),
    }


def test_markdown_has_every_model_and_bar():
    rows, _, bars = bars_of(ours())
    text = frontier_verdict.markdown(document(rows, bars))
    assert all(f"| {name}" in text for name in ("original", "H1 (pick)", "H2", "H3", "A (pick)", "B"))
    assert all(bar["bar"] in text for bar in bars)
    assert "| 0.0700 against 0.2000 | 0.35 |" in text


def test_heretics_pick_is_the_smallest_sum_of_scores():
    trials = [{"index": 1, "scores": [0.5, 0.0]}, {"index": 2, "scores": [0.1, 0.2]}, {"index": 3, "scores": [0, 0.4]}]
    assert frontier_verdict.heretic_pick(trials)["index"] == 2


def test_an_evaluation_is_made_again_only_when_something_changed(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": len(made)}

    file = tmp_path / "x.json"
    assert frontier_evaluator.cached(file, {"a": 1}, make)["value"] == 1
    assert frontier_evaluator.cached(file, {"a": 1}, make)["value"] == 1
    assert frontier_evaluator.cached(file, {"a": 2}, make)["value"] == 2


def test_loglikelihoods_are_the_models(tiny_handle):
    """Batched and left-padded, the sums are those of each row alone."""
    import torch

    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    found = frontier_evaluator._logprob(tiny_handle, rows, [3, 1])
    for row, length, value in zip(rows, [3, 1], found, strict=True):
        logits = tiny_handle.model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        alone = sum(float(logits[i - 1, row[i]]) for i in range(len(row) - length, len(row)))
        assert value == pytest.approx(alone, abs=1e-3)


def test_questions_and_text_are_sound():
    questions = json.loads(frontier_evaluator.QUESTIONS.read_text())
    assert len(questions) >= 60
    assert all(len(set(item["choices"])) == 4 and 0 <= item["answer"] < 4 for item in questions)
    assert len({item["question"] for item in questions}) == len(questions)
    assert len(frontier_evaluator.TEXT.read_text().split()) > 1000


def test_text_and_questions_are_scored(tiny_handle):
    import math

    scored = frontier_evaluator.answer_questions(tiny_handle, json.loads(frontier_evaluator.QUESTIONS.read_text())[:8])
    assert 0 <= scored["correct"] <= scored["total"] == 8 and scored["log_score"] < 0
    loss = frontier_evaluator.text_loss(tiny_handle, "A plain sentence, and another one after it.")
    assert 0 < loss < 3 * math.log(tiny_handle.vocabulary)


def test_own_system_prompt(tiny_folder, tmp_path):
    import shutil

    assert frontier_prompts.own_system_prompt(tiny_folder) is None
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    template = folder / "chat_template.jinja"
    default = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    template.write_text(default + template.read_text())
    assert frontier_prompts.own_system_prompt(folder) == "Be kind."


def test_prompts_for_heretic_are_whole_and_leave_the_test_split_out(tmp_path):
    from abliterate.prompts.sets import load_sides

    tables = frontier_prompts.write_heretic_prompts(tmp_path)
    texts = {
        name: [json.loads(line)["text"] for line in Path(table["dataset"], "train.jsonl").read_text().splitlines()]
        for name, table in tables.items()
    }
    sides = load_sides("bundled", "bundled")
    assert tuple(texts["good_prompts"]) == sides.baseline.train.texts
    assert tuple(texts["bad_evaluation_prompts"]) == sides.target.validation.texts
    seen = {text for part in texts.values() for text in part}
    assert not seen & {*sides.target.test.texts, *sides.baseline.test.texts}


# A stand-in for Heretic's program: its menus, in its words, over a study that is a file with a number.
FAKE = """#!{python}
import pathlib, sys
study = pathlib.Path("study")
done = int(study.read_text()) if study.exists() else 0
def menu(entries):
    for number, entry in enumerate(entries, 1):
        print(f"[{{number}}] {{entry}}")
    return entries[int(input("Enter number: ")) - 1]
if done:
    print("How would you like to proceed?")
    what = "Show the results from the previous run" if done >= 3 else "Continue the previous run"
    if menu([what, "Ignore the previous run and start from scratch", "Exit program"]) != what:
        sys.exit("wrong choice")
wanted = max(3, done)
while True:
    for done in range(done + 1, wanted + 1):
        print(f"\\nRunning trial {{done}} of {{wanted}}...")
        if pathlib.Path("crash").exists() and done == 2:
            sys.exit("crashed")
        study.write_text(str(done))
        print("\\nElapsed time: 1s")
    print("\\nOptimization finished!\\n")
    back = True
    while back:
        print("\\nWhich trial do you want to use?")
        trials = [f"[Trial {{n:>3}}] Refusals: {{n:>2}}/60, KL divergence: {{1 / n:.4f}}" for n in range(1, done + 1)]
        what = menu([*trials, "Run additional trials", "Exit program"])
        if what == "Exit program":
            sys.exit(0)
        if what == "Run additional trials":
            wanted += int(input("How many additional trials do you want to run? []: "))
            break
        act = ["Save the model to a local folder", "Upload", "Chat", "Benchmark", "Return to the trial selection menu"]
        while menu(act) != act[-1]:
            path = pathlib.Path(input("Path to the folder: []: "))
            print("How do you want to export the model?")
            menu(["Merge the abliteration LoRA and export the full model", "Export the abliteration LoRA only"])
            path.mkdir(parents=True)
            (path / "tokenizer_config.json").write_text(what)
"""


@pytest.fixture
def fake(tmp_path):
    program = tmp_path / "venv" / "bin" / "heretic"
    program.parent.mkdir(parents=True)
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    folder = tmp_path / "heretic"
    heretic_run.write_config(folder, {"n_trials": 3, "dtypes": ["bfloat16"], "good_prompts": {"dataset": "x"}})
    return tmp_path / "venv", folder


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="CPU seconds are read from /proc")
class TestHereticRun:
    def test_runs_to_the_end_and_times_every_trial(self, fake):
        heretic_run.run(*fake, "m", 1, lambda text: None)
        laps = heretic_run.trial_times(fake[1])
        assert [lap["trial"] for lap in laps] == [0, 1, 2, 3]
        assert all(lap["seconds"] >= 0 and lap["cpu_seconds"] >= 0 for lap in laps)

    def test_a_crash_is_reported_and_resumed(self, fake):
        (fake[1] / "crash").touch()
        with pytest.raises(SystemExit, match="run again to resume"):
            heretic_run.run(*fake, "m", 1, lambda text: None)
        (fake[1] / "crash").unlink()
        heretic_run.run(*fake, "m", 1, lambda text: None)
        assert [lap["trial"] for lap in heretic_run.trial_times(fake[1])] == [0, 1, 0, 2, 3]

    def test_saves_the_models_wanted(self, fake):
        heretic_run.run(*fake, "m", 1, lambda text: None)
        folders = {index: fake[1] / f"trial-{index}" for index in (3, 1)}
        trials = heretic_run.save_models(*fake, "m", 1, lambda shown: folders, lambda text: None)
        assert [(t.index, t.refusals, t.prompts) for t in trials] == [(1, 1, 60), (2, 2, 60), (3, 3, 60)]
        assert "Trial   3" in (folders[3] / "tokenizer_config.json").read_text()
        assert "Trial   1" in (folders[1] / "tokenizer_config.json").read_text()
        assert not (fake[1] / "trial-2").exists()

    def test_a_trial_not_presented_is_an_error(self, fake):
        heretic_run.run(*fake, "m", 1, lambda text: None)
        with pytest.raises(SystemExit, match="trials \\[9\\]"):
            heretic_run.save_models(*fake, "m", 1, lambda shown: {9: fake[1] / "x"}, lambda text: None)
