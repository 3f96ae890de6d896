"""At the side: the model, the recipe, the strengths, and how answers are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from abliterate.edit.recipe import MOST_BYTES, load_recipe
from abliterate.studio.folder import check_upload
from abliterate.studio.session import GROUPS, Session
from abliterate.studio.shared import NO_RECIPE, UPLOADED, Studio
from abliterate.studio.tabs import On
from abliterate.studio.views import note, status


class Controls:
    """The controls, and what loading and uploading do."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.model = gr.Dropdown(
            [], label="Model", info="In the studio's folder, or a Hub id.", allow_custom_value=True, elem_id="model"
        )
        self.recipe = gr.Dropdown(
            [], label="Recipe", info="In the folder, or uploaded (.safetensors).", allow_custom_value=True,
            elem_id="recipe",
        )  # fmt: skip
        size: dict[str, Any] = {"min_width": 80, "size": "md"}
        with gr.Row():
            self.load = gr.Button("Load", variant="primary", elem_id="load", **size)
            self.upload = gr.UploadButton("Upload", file_types=[".safetensors"], elem_id="upload", **size)
        self.status = gr.Markdown("No model is loaded.", elem_id="status")
        overall = gr.Slider(-1, 2, 1, step=0.05, label="Strength", info="0 original, 1 recipe", elem_id="overall")
        groups = [gr.Slider(0, 2, 1, step=0.05, label=f"× {name}", elem_id=f"group-{name}") for name in GROUPS]
        self.sliders = [overall, *groups]
        with gr.Accordion("Answers", open=False):
            self.sampling = [
                gr.Slider(8, 1024, 128, step=8, label="At most, tokens", elem_id="tokens"),
                gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest token."),
                gr.Number(0, label="Seed of both answers", precision=0),
            ]
            self.system = gr.Textbox("", label="System prompt", lines=2)

    def wire(self, on: On, session: gr.State, taken: list[Any]) -> Any:
        """Wire them; returns the event of loading."""
        on(self.upload.upload, self.uploaded, [session, self.upload], taken)
        return on(self.load.click, self.loaded, [session, self.model, self.recipe], [self.model, *taken])

    def loaded(self, session: Session, model: str | None, recipe: str | None) -> Any:
        self.studio.load(session, model or "", recipe or "")
        return gr.update(value=session.model.name), *now_used(self.studio, session)

    def uploaded(self, session: Session, file: str) -> Any:
        path = Path(file)
        try:
            check_upload(path, (".safetensors",), MOST_BYTES)
            recipe, name = load_recipe(path), path.name + UPLOADED
        finally:
            path.unlink(missing_ok=True)
        session.use(session.model, recipe, name)
        return now_used(self.studio, session)


def recipe_list(studio: Studio, session: Session) -> Any:
    """The list of recipes, at the one that is attached; an uploaded one is listed though it is in no folder."""
    found = [NO_RECIPE, *studio.folder.recipes()]
    name = session.recipe_name or NO_RECIPE
    return gr.update(choices=found if name in found else [*found, name], value=name)


def now_used(studio: Studio, session: Session) -> tuple[Any, ...]:
    """What another recipe changes on the page: its name, and all that was asked of the one before."""
    return recipe_list(studio, session), status(session), 1, 1, 1, 1, "", "", note(session)
