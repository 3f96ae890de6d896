"""Talk: one prompt, both answers as they grow. Grid: several prompts, original beside edited."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from abliterate.common.errors import AbliterateError
from abliterate.prompts.sets import load_prompts
from abliterate.studio.conversation import Sampling
from abliterate.studio.folder import MOST_PROMPT_BYTES, PROMPT_SUFFIXES, check_upload
from abliterate.studio.session import Answers, Question, Session, Strengths
from abliterate.studio.tabs import LONGER, SMALL, On
from abliterate.studio.views import grid_table, note

MOST_GRID = 16
SHOW_EVERY = 0.08  # seconds between two looks at a growing answer
EXAMPLE = "Write a short poem about autumn."


class Talk:
    """A prompt and both answers; sliders act at once."""

    def __init__(self) -> None:
        self.prompt = gr.Textbox(EXAMPLE, label="Prompt", lines=2, max_lines=8, elem_id="prompt", submit_btn=False)
        with gr.Row():
            self.ask = gr.Button("Answer", variant="primary", elem_id="ask", **SMALL)
            self.stop = gr.Button("Stop", elem_id="stop", **SMALL)
        with gr.Row(equal_height=True):
            answers = [
                gr.Textbox(
                    label=label, elem_id=label.lower(), lines=16, max_lines=16, interactive=False, buttons=["copy"],
                    min_width=260,
                )
                for label in ("Original", "Edited")
            ]  # fmt: skip
        self.shown = [*answers, gr.Markdown("Move a slider and the edited answer begins anew.", elem_id="note")]

    def wire(self, on: On, session: gr.State, asking: list[Any], sliders: list[Any]) -> None:
        hidden: dict[str, Any] = {"show_progress": "hidden"}
        for slider in sliders:
            moved = on(slider.input, self.moved, [session, *sliders], [], trigger_mode="always_last", **hidden)
            on(moved.then, self.again, [session], self.shown, trigger_mode="always_last", **hidden)
        for event in (self.ask.click, self.prompt.submit):
            on(event, self.answer, [session, self.prompt, *asking], self.shown, **hidden)
        on(self.stop.click, stopped, [session], [])

    def moved(self, session: Session, overall: float, *groups: float) -> None:
        session.strengths = Strengths.of(overall, *groups)

    def again(self, session: Session) -> Iterator[Any]:
        given = False
        for value in growing(session, session.answer_again()):
            given = True
            yield value
        if not given:  # a stream that goes on sees to it: what stands on the page is its to change
            yield gr.skip(), gr.skip(), gr.skip()

    def answer(self, session: Session, text: str, system: str, *sampling: float) -> Iterator[Any]:
        yield "", "", ""
        yield from growing(session, session.ask(Question(text, system.strip(), _sampling(*sampling))))


class Grid:
    """Prompts, one per line, and a table of both answers to each."""

    def __init__(self) -> None:
        label = f"Prompts, one per line, at most {MOST_GRID}"
        self.prompts = gr.Textbox("", label=label, lines=5, max_lines=MOST_GRID, elem_id="prompts")
        with gr.Row():
            self.ask = gr.Button("Compare", variant="primary", elem_id="compare", **SMALL)
            self.stop = gr.Button("Stop", elem_id="grid-stop", **SMALL)
            self.upload = gr.UploadButton(
                "Upload prompts", file_types=list(PROMPT_SUFFIXES), elem_id="grid-upload", **LONGER
            )
        self.table = gr.HTML("", elem_id="table", padding=False)

    def wire(self, on: On, session: gr.State, asking: list[Any]) -> None:
        on(self.ask.click, self.compare, [session, self.prompts, *asking], [self.table], show_progress="hidden")
        on(self.stop.click, stopped, [session], [])
        on(self.upload.upload, self.uploaded, [self.upload], [self.prompts])

    def compare(self, session: Session, prompts: str, system: str, *sampling: float) -> Iterator[Any]:
        texts = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not 1 <= len(texts) <= MOST_GRID:
            raise AbliterateError(f"the grid takes 1 to {MOST_GRID} prompts, one per line; there are {len(texts)}")
        yield ""
        rows = session.grid(texts, system.strip(), _sampling(*sampling))
        yield from paced(rows, lambda found: grid_table(texts, found))

    def uploaded(self, file: str) -> str:
        path = Path(file)
        try:
            check_upload(path, PROMPT_SUFFIXES, MOST_PROMPT_BYTES)
            texts = load_prompts(str(path)).texts[:MOST_GRID]
        finally:
            path.unlink(missing_ok=True)
        return "\n".join(" ".join(text.split()) for text in texts)


def stopped(session: Session) -> None:
    """Have the stream that goes on end."""
    session.stopping = True


def growing(session: Session, stream: Iterator[Answers]) -> Iterator[tuple[str, str, str]]:
    """Both answers and the line under them as they grow, and once more when they are whole."""
    last: list[Answers] = []

    def seen() -> Iterator[Answers]:
        for answers in stream:
            last[:] = [answers]
            yield answers

    yield from paced(seen(), lambda found: (found.original, found.edited, note(session, found, going=True)))
    for answers in last:
        if session.answers is answers:  # else a newer question has taken the page over
            yield answers.original, answers.edited, note(session, answers)


def paced(values: Iterator[Any], show: Callable[[Any], Any]) -> Iterator[Any]:
    """What to show of each, at most so many times a second, and always the last."""
    last, shown, value = 0.0, True, None
    for value in values:
        shown = time.monotonic() - last > SHOW_EVERY
        if shown:
            last = time.monotonic()
            yield show(value)
    if not shown:
        yield show(value)


def _sampling(tokens: float, temperature: float, seed: float) -> Sampling:
    if not 1 <= tokens <= 4096 or not 0 <= temperature <= 5:
        raise AbliterateError("answers have 1 to 4096 tokens, temperatures are from 0 to 5")
    return Sampling(int(tokens), float(temperature), 1.0, int(seed or 0))
