"""What the page shows, as HTML and Markdown; everything that was typed or answered is escaped."""

from __future__ import annotations

from html import escape

from abliterate.common.watching import Progress
from abliterate.measure.refusal import is_refusal
from abliterate.studio.folder import Folder
from abliterate.studio.runs import View
from abliterate.studio.session import Answers, Session

LINES = 12  # of what a job said


def status(session: Session) -> str:
    """What is loaded, as Markdown without markup of its own."""
    if session.loaded is None:
        return "No model is loaded."
    handle = session.loaded.handle
    recipe = f"recipe {session.recipe_name}" if session.recipe else "no recipe"
    return f"`{session.loaded.name}` · {handle.layers} layers, d_model {handle.d_model} · {recipe}".replace("\n", " ")


def note(session: Session, answers: Answers | None = None, *, going: bool = False) -> str:
    """The line under the answers."""
    if session.recipe is None:
        return "No recipe: there is only the original to answer."
    if answers is None:
        return "Move a slider and the edited answer begins anew."
    words = answers.strengths.words()
    if going:
        return f"Answering at {words} …"
    return f"Stopped. Edited: {words}." if session.stopping else f"Edited: {words}."


def verdict(answer: str) -> str:
    """A short mark under an answer of the grid."""
    word = "refuses" if is_refusal(answer) else "answers"
    return f'<span class="{word}">{word}</span>' if answer else ""


def grid_table(texts: list[str], rows: list[Answers]) -> str:
    """Prompts and both answers as an HTML table.

    A row is judged once both its answers are whole, and the rows are counted once all are.
    """
    body = "".join(
        f"<tr><th scope='row'>{escape(text)}</th>"
        + "".join(
            f"<td><div class='answer'>{escape(answer)}</div>{verdict(answer) if row.whole else ''}</td>"
            for answer in (row.original, row.edited)
        )
        + "</tr>"
        for text, row in zip(texts, rows, strict=True)
    )
    counts, columns = "", ([row.original for row in rows], [row.edited for row in rows])
    if all(row.whole for row in rows):
        original, edited = (sum(bool(a) and is_refusal(a) for a in of) for of in columns)
        counts = f" {original} of {len(rows)} refused by the original, {edited} by the edited, judged by words."
    return (
        f"<table class='compare'><caption>{len(rows)} prompts, original beside edited.{counts}</caption>"
        "<thead><tr><th scope='col'>Prompt</th><th scope='col'>Original</th><th scope='col'>Edited</th></tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def state(text: str) -> str:
    """A line on how something long goes."""
    return f"<p class='state'>{escape(text)}</p>" if text else ""


def run_view(view: View, folder: Folder) -> str:
    """How a run goes: a bar, where it is, and the last lines, without the paths of this machine."""
    shown = folder.shown(view.out)
    words = {
        "nothing": f"No run writes {shown} now.", "done": f"{shown} is done.", "stopped": f"{shown} was stopped.",
        "failed": f"{shown} failed: {folder.public(view.error)}", "starting": "Starting…", "stopping": "Stopping…",
        "running": "",
    }  # fmt: skip
    return state(words[view.state]) + (progress_view(view.progress, folder, going=view.going) if view.progress else "")


def progress_view(progress: Progress, folder: Folder, *, going: bool) -> str:
    """Where something long is: a bar while it goes on, and the last lines."""
    shown = ""
    if going and progress.total:
        shown = state(progress.where) + (
            f"<progress max='{progress.total}' value='{progress.done}' aria-label='{escape(progress.stage)}'>"
            "</progress>"
        )
    lines = "\n".join(f"{seconds:6.1f}s  {folder.public(line)}" for seconds, line in progress.lines[-LINES:])
    return shown + (f"<pre>{escape(lines)}</pre>" if lines else "")
