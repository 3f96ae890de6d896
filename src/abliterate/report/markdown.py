"""The report as Markdown: tables and links to the pictures, for a model card."""

from __future__ import annotations

from collections.abc import Iterable

from abliterate.report import story
from abliterate.report.document import Loaded
from abliterate.report.figures import Figure, Table, all_figures
from abliterate.report.repeat import repeat_command


def markdown(loaded: Loaded, pictures: str | None, missing: str | None = None) -> str:
    """The report as Markdown.

    Args:
        loaded: the run.
        pictures: the pictures' folder as the file names it; None leaves them out.
        missing: why there are no pictures.
    """
    figures = all_figures(loaded)

    def show(*names: str) -> list[str]:
        return [line for name in names if name in figures for line in _picture(figures[name], pictures)]

    separation = [name for name in figures if name.startswith("separation-")]
    lines = [
        f"# {story.title(loaded)}", "", story.verdict(loaded), "",
        *([f"Pictures are left out: {missing}.", ""] if missing else []),
        *_list(loaded.missing),
        "## Did it work?", "", *show("outcome"), *_table(figures["outcome"].table),
        *_list(story.paired_sentences(loaded)),
        "## What did it cost?", "", *_table(story.costs(loaded)), *_list(story.cost_notes(loaded)),
        *_examples(loaded, "baseline"),
        "## What was changed?", "", *_list(story.changed(loaded)), *show("strengths", "tokens"),
        "## How was it chosen?", "", *_list(story.chosen(loaded)),
        *show(*separation, "projection", "cosines", "frontier", "candidates"),
        *(_table(figures["frontier"].table) if "frontier" in figures else []),
        "## Can I trust it?", "", *_list(story.trust(loaded)), *_table(story.prompt_table(loaded)),
        "## How do I repeat it?", "", "```", repeat_command(loaded), "```", "",
        *_table(story.environment(loaded)), *_table(story.timings(loaded)),
    ]  # fmt: skip
    return "\n".join(lines).rstrip("\n") + "\n"


def _picture(figure: Figure, pictures: str | None) -> list[str]:
    if pictures is None:
        return [f"{figure.title}: {_inline(figure.summary)}", ""]
    return [f"![{_inline(figure.title)}]({pictures}/{figure.name}.png)", "", f"*{_inline(figure.summary)}*", ""]


def _table(table: Table | None) -> list[str]:
    if table is None or not table.rows:
        return []
    rows = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    return ["| " + " | ".join(table.header) + " |", "|" + " --- |" * len(table.header), *rows, ""]


def _list(items: Iterable[str]) -> list[str]:
    lines = [f"- {_inline(item)}" for item in items]
    return [*lines, ""] if lines else []


def _examples(loaded: Loaded, side: str) -> list[str]:
    lines = []
    for entry in story.examples(loaded, side):
        lines.append(f"- **{_inline(entry['prompt'])}**")
        lines += [f"  - {state}: {_inline(found['answer'])}" for state, found in entry["states"].items()]
    return [*lines, ""] if lines else []


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|")


def _inline(text: str) -> str:
    """On one line, with nothing that Markdown or HTML would take for a mark."""
    line = " ".join(text.split())
    for mark in ("\\", "`", "*", "_", "[", "]", "<", ">"):
        line = line.replace(mark, "\\" + mark)
    return line
