"""The report as Markdown: tables and links to the pictures, for a model card."""

from __future__ import annotations

from collections.abc import Iterable

from abliterate.cards.tables import inline
from abliterate.report import story
from abliterate.report.charts import Figure
from abliterate.report.document import Loaded
from abliterate.report.figures import all_figures
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
        "## Did it work?", "", *show("outcome"), *_numbers(figures["outcome"]),
        *_list(story.paired_sentences(loaded)),
        *story.besides(loaded).markdown(), *_list(story.besides_notes(loaded)),
        "## What did it cost?", "", *story.costs(loaded).markdown(), *_list(story.cost_notes(loaded)),
        *_examples(loaded, "baseline"),
        "## What was changed?", "", *_list(story.changed(loaded)), *story.directions(loaded).markdown(),
        *show("strengths", "tokens"),
        "## How was it chosen?", "", *_list(story.chosen(loaded)),
        *show(*separation, "projection", "cosines", "frontier", "candidates"),
        *(_numbers(figures["frontier"]) if "frontier" in figures else []),
        "## Can I trust it?", "", *_list(story.trust(loaded)), *story.prompt_table(loaded).markdown(),
        "## How do I repeat it?", "", "```", repeat_command(loaded), "```", "",
        *story.environment(loaded).markdown(), *story.timings(loaded).markdown(),
    ]  # fmt: skip
    return "\n".join(lines).rstrip("\n") + "\n"


def _picture(figure: Figure, pictures: str | None) -> list[str]:
    if pictures is None:
        return [f"{figure.title}: {inline(figure.summary)}", ""]
    return [f"![{inline(figure.title)}]({pictures}/{figure.name}.png)", "", f"*{inline(figure.summary)}*", ""]


def _numbers(figure: Figure) -> list[str]:
    return figure.table.markdown() if figure.table else []


def _list(items: Iterable[str]) -> list[str]:
    lines = [f"- {inline(item)}" for item in items]
    return [*lines, ""] if lines else []


def _examples(loaded: Loaded, side: str) -> list[str]:
    lines = []
    for entry in story.examples(loaded, side):
        lines.append(f"- **{inline(entry['prompt'])}**")
        lines += [f"  - {state}: {inline(found['answer'])}" for state, found in entry["states"].items()]
    return [*lines, ""] if lines else []
