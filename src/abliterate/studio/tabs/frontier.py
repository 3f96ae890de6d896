"""Frontier: a run's points, one of them to use, and the run's report."""

from __future__ import annotations

from typing import Any

import gradio as gr

from abliterate.common.errors import AbliterateError
from abliterate.edit.recipe import load_recipe
from abliterate.studio.frontier import drawing, frontier_points
from abliterate.studio.session import Session
from abliterate.studio.shared import Studio
from abliterate.studio.tabs import LONGER, SMALL, On
from abliterate.studio.tabs.controls import now_used


class Frontier:
    """The points as a drawing and a list."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.out = gr.Dropdown([], label="Run", allow_custom_value=True, elem_id="out")
        self.svg = gr.HTML("", elem_id="svg", padding=False)
        self.point = gr.Radio([], label="Point", elem_id="point")
        with gr.Row():
            self.take = gr.Button("Use this point", variant="primary", elem_id="take", **SMALL)
            self.make_report = gr.Button("Prepare the report", elem_id="make-report", **LONGER)
            self.report = gr.DownloadButton("Download the report", visible=False, elem_id="report", **LONGER)

    def wire(self, on: On, session: gr.State, taken: list[Any], loads: list[Any]) -> None:
        on(self.out.input, self.points, [self.out], [self.point, self.svg, self.report])
        on(self.point.input, self.pointed, [self.out, self.point], [self.svg])
        on(self.take.click, self.took, [session, self.out, self.point], taken)
        for event in loads:
            on(event.success, self.of_recipe, [session], [self.out, self.point, self.svg, self.report])
        on(self.make_report.click, self.reported, [self.out], [self.report])

    def of_recipe(self, session: Session) -> Any:
        """The run of the recipe that is attached, and its points; the page as it is where there is none."""
        out = self.studio.folder.run_of(session.recipe_name)
        return (gr.update(value=out), *self.points(out)) if out else (gr.skip(),) * 4

    def points(self, out: str | None) -> Any:
        if not out:
            return gr.update(choices=[], value=None), "", gr.update(visible=False)
        points = frontier_points(self.studio.folder.run(out))
        chosen = next((i for i, p in enumerate(points) if p.chosen), 0)
        labels = [p.label for p in points]
        return gr.update(choices=labels, value=labels[chosen]), drawing(points, chosen), gr.update(visible=False)

    def pointed(self, out: str, label: str) -> str:
        points = frontier_points(self.studio.folder.run(out))
        return drawing(points, next((i for i, p in enumerate(points) if p.label == label), None))

    def took(self, session: Session, out: str | None, label: str | None) -> Any:
        if not out or not label:
            raise AbliterateError("no point is chosen; choose a run and one of its points")
        points = frontier_points(self.studio.folder.run(out))
        point = next((p for p in points if p.label == label), None)
        if point is None:
            raise AbliterateError("the run has no such point any more; choose one of its points")
        name = self.studio.folder.shown(point.recipe.resolve())
        session.use(session.model, load_recipe(self.studio.folder.recipe(name)), name)
        return now_used(self.studio, session)

    def reported(self, out: str | None) -> Any:
        if not out:
            raise AbliterateError("no run is chosen; choose one")
        return gr.update(value=self.studio.handed_out(self.studio.report(out)), visible=True)
