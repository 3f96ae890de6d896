"""Tables of what was measured, the same for cards, reports and terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from abliterate.cards.also import also_rows
from abliterate.cards.words import count_of
from abliterate.measure.document import RunDocument
from abliterate.measure.numbers import Measured


@dataclass
class Table:
    """Column names and rows of text."""

    header: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def markdown(self) -> list[str]:
        """The table's lines, an empty one behind them; none where there are no rows."""
        if not self.rows:
            return []
        rows = (" | ".join(inline(cell).replace("|", "\\|") for cell in row) for row in self.rows)
        head = [f"| {' | '.join(self.header)} |", f"|{' --- |' * len(self.header)}"]
        return [*head, *(f"| {row} |" for row in rows), ""]


def inline(text: str) -> str:
    """On one line, with nothing that Markdown or HTML would take for a mark."""
    line = " ".join(text.split())
    for mark in ("\\", "`", "*", "_", "[", "]", "<", ">"):
        line = line.replace(mark, "\\" + mark)
    return line


def state_table(document: RunDocument, rows: Iterable[Sequence[str]]) -> Table:
    """A table with a column for each model measured."""
    return Table(["", *document.states], [list(row) for row in rows])


def shares(document: RunDocument, label: str, key: str) -> list[str]:
    """A row of one share of `Measured`."""
    return [label, *(count_of(getattr(measured, key)) for measured in document.states.values())]


def divergences(
    document: RunDocument, label: str, key: str, shown: Callable[[float], str] = "{:.3f}".format
) -> list[str]:
    """A row of one divergence: 0 for the original, "-" where there is no original to compare with."""
    row = [label]
    for state, measured in document.states.items():
        found = measured.divergence
        row.append(shown(getattr(found, key)) if found else "0" if state == "original" else "-")
    return row


def losses(document: RunDocument, label: str, shown: Callable[[float], str] = "{:.3f}".format) -> list[str]:
    """The row of losses on the original's answers."""
    found = (measured.loss for measured in document.states.values())
    return [label, *(shown(loss.baseline_answers) if loss else "-" for loss in found)]


def results(document: RunDocument) -> Table:
    """What a run, a healing or a measuring found: the closing table, in the behaviour's own words."""
    measured = list(document.states.values())
    if all(found.coherent_over_refusal for found in measured):
        rows = [
            shares(document, "baseline prompts refused", "over_refusal"),
            shares(document, "of them in whole sentences", "coherent_over_refusal"),
            shares(document, "target prompts refused", "refusal"),
            shares(document, "degenerate answers to baseline prompts", "degenerate"),
        ]
        return state_table(document, rows)
    about = document.about
    rows = [shares(document, about.words.rate, "refusal")]
    if all(found.not_answered for found in measured):
        rows.append(shares(document, "not answered (refused or evaded)", "not_answered"))
    if all(found.second for found in measured):
        rows += _second(measured)
    if all(found.coherent and found.score for found in measured):
        rows.append(shares(document, "of them not degenerate", "coherent"))
        rows.append(["mean score per 100 words", *(f"{found.score.target:.2f}" for found in measured if found.score)])
    if not about.one_set:
        rows.append(shares(document, about.words.over, "over_refusal"))
    rows += [
        divergences(document, "divergence, first token", "first_token"),
        divergences(document, "divergence, along answers", "answer"),
        shares(document, "degenerate answers", "degenerate"),
        losses(document, "loss on the original's answers"),
        *also_rows(document),
    ]
    return state_table(document, rows)


def _second(measured: Sequence[Measured]) -> list[list[str]]:
    """What the judge says that choosing never saw, and how often it agrees."""
    found = [one.second for one in measured if one.second]
    return [
        [f"refusals by a second judge ({found[0].judge})", *(count_of(second.refusal) for second in found)],
        ["over-refusals by it", *(count_of(second.over_refusal) for second in found)],
        ["answers on which the judges agree", *(count_of(second.agree) for second in found)],
    ]


def results_of(provenance: dict[str, Any]) -> Table | None:
    """The closing table of the run that made a recipe; None where its provenance, which is free-form, has none."""
    if not all(isinstance(provenance.get(state), dict) for state in ("original", "edited")):
        return None
    try:
        kept = {key: provenance[key] for key in ("original", "edited", "behaviour") if key in provenance}
        return results(RunDocument.model_validate(kept))
    except ValidationError:
        return None
