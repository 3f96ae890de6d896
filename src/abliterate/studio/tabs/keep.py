"""Keep: the recipe as the sliders have it, and the edited model in one of its forms."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from rich.filesize import decimal

from abliterate.apply.forms import FORMS
from abliterate.common.errors import AbliterateError
from abliterate.studio.exporting import Export
from abliterate.studio.session import Session
from abliterate.studio.shared import Studio
from abliterate.studio.tabs import LONGER, SMALL, On
from abliterate.studio.tabs.controls import recipe_list
from abliterate.studio.views import progress_view, state

EXPORT_EVERY = 0.3  # seconds between two looks at an export


class Keep:
    """Saving and exporting."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        gr.Markdown("### The recipe, at the strengths of the sliders")
        with gr.Row():
            self.name = gr.Textbox("studio.safetensors", label="File", elem_id="name", min_width=160)
            self.replace = gr.Checkbox(False, label="Replace", elem_id="replace", min_width=100)
        with gr.Row():
            self.save = gr.Button("Save", variant="primary", elem_id="save", **SMALL)
            self.download = gr.DownloadButton("Download the recipe", visible=False, elem_id="download", **LONGER)
        self.saved = gr.Markdown("", elem_id="saved")
        gr.Markdown("### The edited model")
        with gr.Row():
            self.form = gr.Dropdown(list(FORMS), value="checkpoint", label="Form", elem_id="form", min_width=240)
            self.model = gr.Textbox(
                "", label="Model", placeholder="the loaded one, or a GGUF file", elem_id="export-model", min_width=240
            )
            self.out = gr.Textbox("studio-model", label="Folder or file", elem_id="export-name", min_width=240)
        with gr.Row():
            self.export = gr.Button("Export", variant="primary", elem_id="export", **SMALL)
            self.stop = gr.Button("Stop", elem_id="export-stop", **SMALL)
        self.exported = gr.HTML("", elem_id="exported", elem_classes="progress", padding=False)

    def wire(self, on: On, session: gr.State, recipes: Any) -> None:
        on(self.save.click, self.keep, [session, self.name, self.replace], [self.saved, self.download, recipes])
        exporting = [session, self.form, self.model, self.out]
        on(self.export.click, self.export_form, exporting, [self.exported], show_progress="hidden")
        on(self.stop.click, self.export_stopped, [session], [])

    def keep(self, session: Session, name: str, replace: bool) -> Any:
        path = self.studio.save(session, name, replace)
        return (
            f"Saved `{self.studio.folder.shown(path)}` ({session.strengths.words()}).",
            gr.update(value=self.studio.handed_out(path), visible=True),
            gr.update(choices=recipe_list(self.studio, session)["choices"]),
        )

    def export_form(self, session: Session, form: str, model: str, name: str) -> Iterator[str]:
        export = session.export = Export()
        yield state("Starting…")
        pool = ThreadPoolExecutor(1, thread_name_prefix="export")
        job = pool.submit(self.studio.export, session, export, form, model, name)
        pool.shutdown(wait=False)  # the one job goes on; whoever closes the page doesn't end it
        folder = self.studio.folder
        while not wait([job], timeout=EXPORT_EVERY).done:
            yield progress_view(export.state, folder, going=True)
        try:
            summary = job.result()
        except Exception:
            yield ""  # the message says what went wrong
            raise
        out = folder.shown(Path(summary["out"]).resolve())
        notes = "".join(f"<li>{escape(folder.public(note))}</li>" for note in summary.get("notes", ()))
        said = state(f"Wrote {out} as {form}: {decimal(summary.get('bytes', 0))}.")
        yield said + (f"<ul>{notes}</ul>" if notes else "")

    def export_stopped(self, session: Session) -> None:
        if session.export is None:
            raise AbliterateError("no export of yours goes on")
        session.export.stop()
