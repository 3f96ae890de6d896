"""The table: a row per task, a column per model, and what of the differences is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from abliterate.bench.paired import LEVEL, Comparison, compare, holm, mean, sign_flips, stderr
from abliterate.bench.store import TaskScores
from abliterate.bench.suites import METRICS
from abliterate.common.errors import AbliterateError

AVERAGE = "average"
BETTER, WORSE = "▲", "▼"


@dataclass
class Row:
    """A row of the table: a task, or a group of tasks whose items are counted together.

    Attributes:
        name: what was asked for.
        tasks: names of the tasks it is made of.
        metric, filter: what it is read by; None where it is found when scores are there.
        chat: whether its questions become a user's turn where nothing else is asked for.
    """

    name: str
    tasks: list[str]
    metric: str | None
    filter: str | None
    chat: bool = False


@dataclass
class Cell:
    """One model on one row.

    Attributes:
        score: mean over the items, 0 to 1 for shares.
        stderr: its standard error; None where it isn't known.
        comparison: with the reference; None for the reference itself, and where items have no score of their own.
        p_corrected: the comparison's p-value corrected by Holm over the rows; the average's own.
    """

    score: float
    stderr: float | None
    comparison: Comparison | None = None
    p_corrected: float | None = None

    @property
    def mark(self) -> str:
        """An arrow where the difference is more than chance."""
        if self.comparison is None or self.p_corrected is None or self.p_corrected >= LEVEL:
            return ""
        return BETTER if self.comparison.difference > 0 else WORSE


@dataclass
class TableRow:
    """A task, or several counted together.

    Attributes:
        name: of the task or group; `average` is the mean of the rows.
        metric: "metric,filter" it is read by.
        shots: worked examples.
        chat: whether questions were formatted as a chat.
        items: how many.
        higher_is_better: whether more is better.
        cells: one per model, the reference first.
    """

    name: str
    metric: str
    shots: int
    chat: bool
    items: int
    higher_is_better: bool
    cells: list[Cell] = field(default_factory=list)


@dataclass
class Table:
    """Rows of the benchmark and the average under them; None where the rows can't be averaged."""

    labels: list[str]
    rows: list[TableRow]
    average: TableRow | None

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "name": row.name, "metric": row.metric, "shots": row.shots, "chat": row.chat, "items": row.items,
                "models": {
                    label: {
                        "score": cell.score, "stderr": cell.stderr,
                        "against_reference": None if cell.comparison is None else
                        {**asdict(cell.comparison), "p_holm": None if row is self.average else cell.p_corrected,
                         "more_than_chance": bool(cell.mark)},
                    }
                    for label, cell in zip(self.labels, row.cells, strict=True)
                },
            }
            for row in (*self.rows, *([self.average] if self.average else []))
        ]  # fmt: skip


@dataclass
class BenchResult:
    """What a benchmark found.

    Attributes:
        document: results.json.
        table: the rows, with their comparisons.
        text: the table as Markdown.
    """

    document: dict[str, Any]
    table: Table
    text: str


def make_table(rows: Sequence[Row], labels: Sequence[str], scores: Sequence[dict[str, TaskScores]]) -> Table:
    """The table of every model's scores by task, the first model the reference.

    Args:
        rows: what is shown, of which tasks.
        labels: the models' names.
        scores: per model, by task.
    """
    per_item = [[_items(row, found) for found in scores] for row in rows]
    made = [_row(row, scores, own) for row, own in zip(rows, per_item, strict=True)]
    for column in range(1, len(labels)):
        cells = [row.cells[column] for row in made]
        compared = [(cell, cell.comparison.p) for cell in cells if cell.comparison is not None]
        for (cell, _), p in zip(compared, holm([p for _, p in compared]), strict=True):
            cell.p_corrected = p
    return Table(list(labels), made, _average(made, per_item))


def _row(row: Row, scores: Sequence[dict[str, TaskScores]], own: Sequence[list[float] | None]) -> TableRow:
    first = scores[0][row.tasks[0]]
    metric = metric_of(first, row)
    hashes = [[found[task].hashes for task in row.tasks] for found in scores]
    shown = TableRow(
        row.name,
        metric,
        max(scores[0][task].shots for task in row.tasks),
        first.chat,
        sum(map(len, hashes[0])),
        first.higher_is_better.get(metric.split(",")[0], True),
    )
    for found, values, asked in zip(scores, own, hashes, strict=True):
        cell = Cell(*found[row.tasks[0]].metrics[metric]) if values is None else Cell(mean(values), stderr(values))
        if shown.cells and asked == hashes[0] and values is not None and own[0] is not None:
            cell.comparison = compare(values, own[0])
        shown.cells.append(cell)
    return shown


def _items(row: Row, found: dict[str, TaskScores]) -> list[float] | None:
    """Scores of all items of a row; None where one of its tasks has none per item."""
    parts = [found[task].items.get(metric_of(found[task], row)) for task in row.tasks]
    return None if any(part is None for part in parts) else [value for part in parts for value in part or ()]


def metric_of(scores: TaskScores, row: Row) -> str:
    """The "metric,filter" that a row is read by.

    Raises:
        AbliterateError: the task gives no such metric.
    """
    names = [row.metric] if row.metric else [*METRICS, *(key.split(",")[0] for key in scores.metrics)]
    for name in names:
        for key in scores.metrics:
            metric, extraction = key.split(",", 1)
            if metric == name and row.filter in (None, extraction):
                return key
    raise AbliterateError(
        f"task {scores.task} gives no metric {row.metric or ''} (it gives: {', '.join(scores.metrics) or 'none'}); "
        "the installed lm-evaluation-harness has another version of it"
    )


def _average(rows: Sequence[TableRow], per_item: Sequence[Sequence[list[float] | None]]) -> TableRow | None:
    """The mean of the rows' scores; each item counts by how many its row has."""
    whole = all(values is not None for columns in per_item for values in columns)
    if len(rows) < 2 or not whole or not all(row.higher_is_better for row in rows):
        return None
    average = TableRow(AVERAGE, "", 0, False, sum(row.items for row in rows), True)
    for column in range(len(rows[0].cells)):
        cells = [row.cells[column] for row in rows]
        errors = [cell.stderr for cell in cells]
        cell = Cell(mean([c.score for c in cells]), _error_of_mean(errors))
        if all(c.comparison is not None for c in cells):
            cell.comparison = _average_comparison(
                [(columns[column] or [], columns[0] or []) for columns in per_item], [c.comparison for c in cells]
            )
            cell.p_corrected = cell.comparison.p
        average.cells.append(cell)
    return average


def _average_comparison(
    pairs: Sequence[tuple[list[float], list[float]]], comparisons: Sequence[Comparison | None]
) -> Comparison:
    """The rows' differences averaged, tested by sign flips of all their items."""
    weighted = [
        (a - b) / (len(model) * len(pairs)) for model, reference in pairs for a, b in zip(model, reference, strict=True)
    ]
    found = [c for c in comparisons if c is not None]
    return Comparison(
        mean([c.difference for c in found]),
        _error_of_mean([c.stderr for c in found]),
        sign_flips(weighted),
        "sign flips",
        sum(c.better for c in found),
        sum(c.worse for c in found),
        len(weighted),
    )


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    """Standard error of a mean of independent scores."""
    known = [error for error in errors if error is not None]
    return math.sqrt(math.fsum(e * e for e in known)) / len(errors) if len(known) == len(errors) else None


def cells_as_text(table: Table) -> list[list[str]]:
    """The table as people read it: name, items, the reference's score, and the others' with their differences."""
    lines = []
    for row in (*table.rows, *([table.average] if table.average else [])):
        shots = f", {row.shots}-shot" if row.shots else ""
        name = row.name if row is table.average else f"{row.name} ({row.metric.split(',')[0]}{shots})"
        lines.append([name, str(row.items), *(_cell(cell, row) for cell in row.cells)])
    return lines


def _cell(cell: Cell, row: TableRow) -> str:
    share = row.higher_is_better and 0 <= cell.score <= 1
    scale, digits = (100, 1) if share else (1, 3)
    text = f"{scale * cell.score:.{digits}f}"
    if cell.stderr is not None:
        text += f" ± {scale * cell.stderr:.{digits}f}"
    if cell.comparison is not None:
        text += f" ({scale * cell.comparison.difference:+.{digits}f}{' ' + cell.mark if cell.mark else ''})"
    return text


def markdown(table: Table, document: dict[str, Any]) -> str:
    """The table as a page of Markdown, with how to read it."""
    head = ["", "items", *table.labels]
    lines = ["# Benchmark", "", "| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(cells) + " |" for cells in cells_as_text(table)]
    settings, environment = document["settings"], document["environment"]
    chats = [row.name for row in table.rows if row.chat]
    some = f"of {', '.join(chats)} with" if chats else "without"
    formatted = "with" if len(chats) == len(table.rows) else some
    limit = f", the first {settings['limit']} items of each task" if settings["limit"] else ""
    lines += [
        "",
        legend(table),
        "",
        f"Suite `{document['suite']}`{limit}; questions {formatted} the chat template; lm-evaluation-harness "
        f"{environment['lm_eval']}, transformers {environment['transformers']}, torch {environment['torch']}.",
        "",
    ]
    return "\n".join(lines)


def legend(table: Table) -> str:
    """How to read the table, in a paragraph."""
    text = "Scores ± standard error, in per cent where they are shares"
    if len(table.labels) > 1:
        tests = sorted({c.comparison.test for row in table.rows for c in row.cells if c.comparison is not None})
        text += (
            f"; in brackets the difference from {table.labels[0]}. {BETTER} and {WORSE} mark differences on the "
            f"same items that are more than chance (p < {LEVEL:g}: {' or '.join(tests) or 'no test'}, corrected by "
            "Holm over a column's tasks; the average by sign flips of all items, uncorrected)"
        )
    return text + "."
