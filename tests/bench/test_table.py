"""The table out of scores: which differences are marked, and what is averaged."""

from __future__ import annotations

from typing import Any

import pytest

from abliterate.bench.store import TaskScores
from abliterate.bench.table import Row, cells_as_text, make_table, markdown


def scores(task: str, values: list[float] | None, **more: Any) -> TaskScores:
    mean = sum(values) / len(values) if values else 12.5
    return TaskScores(
        task=task, version="1", shots=0, chat=False, metrics={"acc,none": (mean, None)},
        items={"acc,none": values} if values else {}, hashes=[f"{task}{i}" for i in range(len(values or "xy"))],
        higher_is_better={"acc": True}, **more,
    )  # fmt: skip


def table_of(*columns: dict[str, list[float]]) -> Any:
    rows = [Row(name, [name], "acc", None) for name in columns[0]]
    labels = ["original", "edited", "healed"][: len(columns)]
    return make_table(rows, labels, [{n: scores(n, v) for n, v in column.items()} for column in columns])


def test_a_difference_is_marked_only_when_it_is_more_than_chance_over_all_tasks() -> None:
    # p = 2 / 2^7 = 0.0156 for one task alone: enough for one, not for four after Holm
    good, bad, same = [1.0] * 7 + [0.0] * 3, [0.0] * 10, [1.0] * 5 + [0.0] * 5
    alone = table_of({"a": good}, {"a": bad})
    assert alone.rows[0].cells[1].mark == "▼"
    many = table_of({"a": good, "b": same, "c": same, "d": same}, {"a": bad, "b": same, "c": same, "d": same})
    assert many.rows[0].cells[1].mark == ""
    assert many.rows[0].cells[1].p_corrected == pytest.approx(4 * 2 / 128)
    better = table_of({"a": bad}, {"a": good})
    assert better.rows[0].cells[1].mark == "▲"
    assert better.rows[0].cells[0].mark == ""


def test_the_average_counts_every_row_alike() -> None:
    table = table_of({"a": [1.0] * 10, "b": [0.0] * 2}, {"a": [0.0] * 10, "b": [0.0] * 2})
    assert table.average.cells[0].score == 0.5
    assert table.average.cells[1].comparison.difference == -0.5
    assert table.average.cells[1].comparison.p == pytest.approx(2 / 2**10)
    assert table.average.cells[1].mark == "▼"


def test_scores_without_items_are_shown_but_not_tested() -> None:
    rows = [Row("wiki", ["wiki"], "acc", None), Row("b", ["b"], "acc", None)]
    column = {"wiki": scores("wiki", None), "b": scores("b", [1.0, 0.0])}
    table = make_table(rows, ["original", "edited"], [column, column])
    assert table.rows[0].cells[1].comparison is None
    assert table.rows[0].cells[1].score == 12.5
    assert table.average is None
    assert table.to_json()[0]["models"]["edited"]["against_reference"] is None


def test_other_items_are_not_compared() -> None:
    other = scores("a", [1.0, 0.0])
    other.hashes = ["x", "y"]
    table = make_table([Row("a", ["a"], "acc", None)], ["o", "e"], [{"a": scores("a", [1.0, 1.0])}, {"a": other}])
    assert table.rows[0].cells[1].comparison is None


def test_items_of_several_tasks_are_counted_together() -> None:
    parts = {"x": scores("x", [1.0, 1.0]), "y": scores("y", [0.0] * 6)}
    table = make_table([Row("both", ["x", "y"], "acc", None)], ["o"], [parts])
    assert table.rows[0].cells[0].score == 0.25
    assert table.rows[0].items == 8


def test_the_page_says_how_to_read_it() -> None:
    table = table_of({"a": [1.0] * 7 + [0.0]}, {"a": [0.0] * 8})
    assert cells_as_text(table)[0] == ["a (acc)", "8", "87.5 ± 12.5", "0.0 ± 0.0 (-87.5 ▼)"]
    document = {
        "suite": "quick", "settings": {"limit": 8},
        "environment": {"lm_eval": "0.4.13", "transformers": "5", "torch": "2"},
    }  # fmt: skip
    text = markdown(table, document)
    assert "McNemar" in text
    assert "Holm" in text
    assert "the first 8 items" in text
    assert "lm-evaluation-harness 0.4.13" in text
