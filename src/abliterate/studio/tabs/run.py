"""Run: start one, watch it, stop it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from abliterate.studio.runs import METHODS
from abliterate.studio.session import Session
from abliterate.studio.shared import NO_RECIPE, Studio
from abliterate.studio.tabs import SMALL, On
from abliterate.studio.tabs.controls import recipe_list
from abliterate.studio.views import run_view, status


class Run:
    """What a run needs, and how it goes."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row():
            self.out = gr.Textbox("studio-run", label="Output folder", elem_id="run-out")
            method = gr.Dropdown(list(METHODS), value=METHODS[0], label="Method", elem_id="method")
        with gr.Row():
            sources = "bundled, a file in the folder, or a Hub data set; empty: the article's"
            target = gr.Textbox("bundled", label="Target prompts", info=sources, elem_id="target")
            baseline = gr.Textbox("bundled", label="Baseline prompts", info=sources, elem_id="baseline")
        with gr.Row():
            counts = [
                gr.Number(0, label=label, info="0: as usual", precision=0, minimum=0, min_width=110, elem_id=name)
                for name, label in (
                    ("train", "Training prompts"), ("validation", "Validation prompts"), ("test", "Test prompts"),
                    ("run-tokens", "Tokens per answer"),
                )
            ]  # fmt: skip
        self.settings = [self.out, method, target, baseline, *counts]
        with gr.Row():
            self.start = gr.Button("Start", variant="primary", elem_id="start", **SMALL)
            self.halt = gr.Button("Stop the run", variant="stop", elem_id="halt", **SMALL)
            self.watch = gr.Button("Watch", elem_id="watch", **SMALL)
        gr.Markdown("The run edits the model chosen in the list. *Watch* shows one started elsewhere, too.")
        self.progress = gr.HTML("", elem_id="progress", elem_classes="progress", padding=False)
        self.timer = gr.Timer(1.0, active=False)

    def wire(self, on: On, model: Any, lists: list[Any]) -> None:
        shown = [self.progress, self.timer]
        on(self.start.click, self.started, [model, *self.settings], shown)
        on(self.halt.click, self.halted, [self.out], shown)
        on(self.watch.click, self.looked, [self.out], shown)
        looked = on(self.timer.tick, self.looked, [self.out], shown, show_progress="hidden")
        on(looked.then, self.listed, [self.timer], lists, show_progress="hidden")

    def opened(self, session: Session) -> Iterator[Any]:
        """What a page that was just opened shows: the lists, what is loaded, and a run that goes on."""
        folder, first = self.studio.folder, self.studio.first
        models, runs = folder.models(), folder.runs()
        if first and session.loaded is None:
            self.studio.load(session, *first)
        model = session.loaded.name if session.loaded else models[0] if models else None
        going = self.studio.runs.going()
        yield (
            gr.update(choices=models, value=model),
            recipe_list(self.studio, session),
            gr.update(choices=runs, value=None),
            status(session),
            run_view(self.studio.runs.view(going), folder) if going else "",
            gr.Timer(active=going is not None),
        )

    def listed(self, _timer: float) -> Any:
        """The lists anew, once a run has ended; while it goes on there is nothing new."""
        if self.studio.runs.going():
            return gr.skip(), gr.skip(), gr.skip()
        folder = self.studio.folder
        found = (folder.models(), [NO_RECIPE, *folder.recipes()], folder.runs())
        return tuple(gr.update(choices=choices) for choices in found)

    def started(self, model: str | None, *settings: Any) -> Any:
        folder = self.studio.start_run(model or "", *settings)
        return run_view(self.studio.runs.view(folder), self.studio.folder), gr.Timer(active=True)

    def halted(self, out: str) -> Any:
        self.studio.runs.stop(self.studio.folder.output(out))
        return self.looked(out)

    def looked(self, out: str) -> Any:
        view = self.studio.runs.view(self.studio.folder.output(out))
        return run_view(view, self.studio.folder), gr.Timer(active=view.going)
