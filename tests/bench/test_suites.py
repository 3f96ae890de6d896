"""Suites name what the installed harness has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from abliterate.bench.harness import build, manager, unknown
from abliterate.bench.suites import QUICK_TASKS, SUITES, Suite, SuiteTask, suite_of
from abliterate.common.errors import AbliterateError
from models import save_tiny, tiny_llama

pytest.importorskip("lm_eval")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SUITES if name != "quick"])
def test_every_task_of_a_suite_is_in_the_installed_harness(name: str) -> None:
    missing = [task.name for task in SUITES[name].tasks if task.name not in manager().all_tasks]
    assert not missing


def test_the_leaderboards_shots() -> None:
    assert {task.name: task.shots for task in SUITES["openllm"].tasks} == {
        "arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5,
    }  # fmt: skip


@pytest.mark.slow
def test_the_second_leaderboard_is_the_harness_own_group() -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    group = load_yaml(manager().task_index["leaderboard"].yaml_path, resolve_func=False)
    assert set(group["task"]) == {task.name for task in SUITES["openllm2"].tasks}


def test_nous_holds_the_four_parts() -> None:
    names = [task.name for task in SUITES["nous"].tasks]
    assert "agieval_nous" in names
    assert {"hellaswag", "openbookqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "piqa"} <= set(names)
    assert "truthfulqa_mc2" in names
    assert sum(name.startswith("bigbench_") for name in names) == 14


def test_names_are_joined_each_task_once() -> None:
    assert suite_of(["quick"]) is SUITES["quick"]
    joined = suite_of(["openllm,arc_easy", "hellaswag"])
    assert [task.name for task in joined.tasks][-2:] == ["gsm8k", "arc_easy"]
    assert next(task for task in joined.tasks if task.name == "hellaswag").shots == 10
    assert [task.chat for task in suite_of(["quick_instructions,hellaswag,leaderboard_ifeval"]).tasks] == [
        True, False, True,
    ]  # fmt: skip


def test_bundled_tasks_are_built_without_the_index_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abliterate.bench.harness.manager", lambda: pytest.fail("the index takes seconds to read"))
    rows, tasks = build(SUITES["quick"])
    assert list(tasks) == [row.name for row in rows] == list(QUICK_TASKS)
    assert sum(len(task.eval_docs) for task in tasks.values()) == 210  # what --help and the documentation say
    assert "210" in SUITES["quick"].about


@pytest.mark.slow
def test_an_unknown_task_is_named_with_what_looks_like_it() -> None:
    with pytest.raises(AbliterateError, match=r"no suite or task 'helaswag'.*did you mean hellaswag"):
        build(suite_of(["helaswag"]))
    assert "quick" in unknown("quik")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "data"),
    [("hellaswag", "Rowan/hellaswag"), ("mmlu", "cais/mmlu"), ("bigbench_navigate_multiple_choice", "hails/bigbench"),
     ("leaderboard_musr", "TAUR-Lab/MuSR")],
)  # fmt: skip
def test_without_the_network_the_data_set_is_named(
    task: str, data: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # whatever this machine has
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AbliterateError) as raised:
        build(Suite("one", (SuiteTask(task),), ""))
    text = str(raised.value)
    assert data in text
    assert "--suite quick" in text
    assert "\n" not in text


def stand_in(path: str, name: str | None = None, **_more: Any) -> Any:
    """A few rows with the columns of a data set of the first leaderboard."""
    import datasets

    def rows(count: int) -> list[dict[str, Any]]:
        numbers = range(count)
        if path == "allenai/ai2_arc":
            choices = {"text": ["red", "a green one", "blue", "no"], "label": ["A", "B", "C", "D"]}
            return [
                {"id": str(i), "question": f"Arc {i}?", "choices": choices, "answerKey": "ABCD"[i % 4]} for i in numbers
            ]
        if path == "Rowan/hellaswag":
            return [
                {"ind": i, "activity_label": "Cooking", "ctx_a": f"Hella {i}", "ctx_b": "she", "ctx": "x",
                 "endings": ["eats", "sleeps", "runs home", "sings"], "label": str(i % 4)}
                for i in numbers
            ]  # fmt: skip
        if path == "cais/mmlu":
            return [
                {"question": f"Mmlu {name} {i}?", "subject": name, "choices": list("wxyz"), "answer": i % 4}
                for i in numbers
            ]
        if path == "truthfulqa/truthful_qa":
            targets = {"choices": ["yes", "no", "never"], "labels": [1, 1, 0]}
            return [{"question": f"Truth {i}?", "mc1_targets": targets, "mc2_targets": targets} for i in numbers]
        if path == "allenai/winogrande":
            return [
                {"sentence": f"Wino {i}: the _ is big.", "option1": "fox", "option2": "den", "answer": "12"[i % 2]}
                for i in numbers
            ]
        assert path == "openai/gsm8k"
        return [{"question": f"Gsm {i}?", "answer": f"It is so. #### {i}"} for i in numbers]

    tables = {split: datasets.Dataset.from_list(rows(30)) for split in ("train", "validation", "test", "dev")}
    return datasets.DatasetDict(tables)


@pytest.mark.slow
def test_openllm_is_run_with_the_leaderboards_shots_and_read_by_its_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterate.bench.models import Contestant
    from abliterate.bench.run import BenchOptions, bench
    from abliterate.bench.scoring import ScoredModel

    asked: list[str] = []
    plain = ScoredModel.loglikelihood

    def watched(self: Any, requests: Any, disable_tqdm: bool = True) -> Any:
        asked.append(requests[0].args[0])
        return plain(self, requests, disable_tqdm)

    monkeypatch.setattr("datasets.load_dataset", stand_in)
    monkeypatch.setattr(ScoredModel, "loglikelihood", watched)
    save_tiny(tmp_path / "model", tiny_llama(context=2048))
    found = bench(
        [Contestant("tiny", str(tmp_path / "model"))],
        None,
        BenchOptions(("openllm",), limit=1, store=tmp_path / "store"),
    )
    rows = {row["name"]: (row["metric"], row["shots"], row["items"]) for row in found.document["rows"]}
    assert rows == {
        "arc_challenge": ("acc_norm,none", 25, 1),
        "hellaswag": ("acc_norm,none", 10, 1),
        "mmlu": ("acc,none", 5, 57),
        "truthfulqa_mc2": ("acc,none", 0, 1),
        "winogrande": ("acc,none", 5, 1),
        "gsm8k": ("exact_match,strict-match", 5, 1),
        "average": ("", 0, 62),
    }
    assert len(found.document["tasks"]) == 62
    assert asked[0].count("Question: Arc") == 26
    assert asked[1].count("Cooking: Hella") == 11
    assert asked[2].count("Mmlu") == 6
    assert asked[-1].count("Wino") == 6


def test_the_harness_bars_are_hidden_and_others_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    from abliterate.bench.harness import quiet

    with quiet():
        assert list(tqdm(range(3), disable=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    list(tqdm(range(3), disable=False))
    assert "3/3" in capsys.readouterr().err
