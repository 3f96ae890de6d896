"""What all users of the page share: the folder, the models, and what goes on. Nothing here knows gradio."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any
from weakref import WeakSet

from abliterate.apply.forms import FORMS, ApplyOptions, apply_recipe
from abliterate.common.errors import AbliterateError, shorten
from abliterate.common.files import check_file
from abliterate.edit.recipe import load_recipe, save_recipe
from abliterate.report import write_html
from abliterate.studio.exporting import Export
from abliterate.studio.folder import Folder
from abliterate.studio.models import Models
from abliterate.studio.runs import METHODS, Runs
from abliterate.studio.session import Session

NO_RECIPE = "none: the model as it is"
UPLOADED = " (uploaded)"


class Studio:
    """What all users of the page share.

    Attributes:
        folder: what may be touched.
        models: those that are loaded.
        runs: those that go on.
        exports: those that go on, and perhaps some that have ended.
        downloads: a private folder for what is handed out.
        first: (model, recipe, its name) that a user starts with, or None.
    """

    def __init__(self, folder: Folder, models: Models, downloads: Path) -> None:
        self.folder, self.models, self.downloads = folder, models, downloads
        self.runs = Runs(folder.root)
        self.exports: WeakSet[Export] = WeakSet()
        self.first: tuple[str, str] | None = None

    def load(self, session: Session, model: str, recipe: str) -> None:
        """Give a user the model and the recipe of these names."""
        source, name = self.folder.model(model), recipe.strip()
        if name.endswith(UPLOADED) and name == session.recipe_name:
            found = session.recipe  # its file is gone
        else:
            found = load_recipe(self.folder.recipe(name)) if name and name != NO_RECIPE else None
        session.use(self.models.get(model.strip(), source), found, name if found else "")

    def handed_out(self, path: Path) -> str:
        """A copy that the browser may fetch: the folder itself is never served."""
        target = self.downloads / secrets.token_hex(8) / path.name
        target.parent.mkdir(parents=True)
        shutil.copyfile(path, target)
        return str(target)

    def save(self, session: Session, name: str, replace: bool) -> Path:
        """Write the recipe as the sliders have it.

        Raises:
            AbliterateError: when the file is there and isn't to be replaced.
        """
        recipe = session.scaled_recipe()
        path = self.folder.output(name, ".safetensors")
        if path.exists() and not replace:
            raise AbliterateError(f"{self.folder.shown(path)} exists; take another name, or tick Replace")
        check_file(path, overwrite=True)
        save_recipe(recipe, path)
        return path

    def export(self, session: Session, export: Export, form: str, model: str, name: str) -> dict[str, Any]:
        """Apply the recipe as the sliders have it to a model, in a form; `export` is told how it goes."""
        recipe = session.scaled_recipe()
        if form not in FORMS:
            raise AbliterateError(f"there is no form {shorten(form)}")
        loaded = model.strip() in ("", session.model.name)
        source = session.model.handle.source if loaded else self.folder.model(model)
        path = self.folder.output(name)
        self.exports.add(export)
        return apply_recipe(recipe, source, path, form, ApplyOptions(), export)

    def report(self, name: str) -> Path:
        """A run's report, written when it isn't there."""
        out = self.folder.run(name)
        file = out / "report.html"
        return file if file.is_file() else write_html(out)

    def start_run(self, model: str, out: str, method: str, target: str, baseline: str, *counts: float) -> Path:
        """Start a run; returns its output folder."""
        folder = self.folder.output(out)
        if method not in METHODS:
            raise AbliterateError(f"{shorten(str(method))} is none of {', '.join(METHODS)}")
        options = [f"--method={method}"]
        for side, source in (("target", target), ("baseline", baseline)):
            if source.strip():
                options.append(f"--{side}={self.folder.prompts(source)}")
        names = ("train-prompts", "validation-prompts", "test-prompts", "max-new-tokens")
        options += [f"--{name}={int(count)}" for name, count in zip(names, counts, strict=True) if count]
        self.runs.start(self.folder.model(model), folder, options)
        return folder

    def end(self) -> None:
        """Stop what goes on; nothing half-written is left."""
        for export in list(self.exports):
            export.stop()
        self.runs.end()
