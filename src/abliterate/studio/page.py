"""The page: what stands on it, and what happens when it is used. Events ask `Studio`; none reads a path itself."""

from __future__ import annotations

import functools
import inspect
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from html import escape
from pathlib import Path
from typing import Any
from weakref import WeakSet

import gradio as gr
from rich.filesize import decimal

from abliterate.apply.forms import FORMS, ApplyOptions, apply_recipe
from abliterate.common.errors import AbliterateError, shorten
from abliterate.common.files import check_file
from abliterate.common.watching import Progress
from abliterate.edit.recipe import MOST_BYTES, Recipe, load_recipe, save_recipe
from abliterate.measure.refusal import is_refusal
from abliterate.prompts.sets import load_prompts
from abliterate.report import write_html
from abliterate.studio.conversation import Sampling
from abliterate.studio.exporting import Export
from abliterate.studio.folder import MOST_PROMPT_BYTES, PROMPT_SUFFIXES, Folder, check_upload
from abliterate.studio.frontier import drawing, frontier_points
from abliterate.studio.models import Models
from abliterate.studio.runs import Runs, View
from abliterate.studio.session import GROUPS, Answers, Question, Session, Strengths

MOST_GRID = 16
SHOW_EVERY = 0.08  # seconds between two looks at a growing answer
EXPORT_EVERY = 0.3  # and at an export
STYLE = Path(__file__).parent / "studio.css"
SMALL: dict[str, Any] = {"scale": 0, "min_width": 150, "size": "md"}  # a button that doesn't fill its row
LONGER = {**SMALL, "min_width": 220}  # for a longer text
EXAMPLE = "Write a short poem about autumn."
NO_RECIPE = "none: the model as it is"
UPLOADED = " (uploaded)"
logger = logging.getLogger(__name__)


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
        """Write the recipe as the sliders have it."""
        recipe = session.scaled_recipe()
        path = self.folder.output(name, ".safetensors")
        _check_new(path, self.folder, replace)
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
        options = [f"--method={_one_of(method, ('fit', 'sweep', 'article', 'tpe'))}"]
        for side, source in (("target", target), ("baseline", baseline)):
            if source.strip():
                options.append(f"--{side}={self.folder.prompts(source)}")
        for option, count in zip(
            ("train-prompts", "validation-prompts", "test-prompts", "max-new-tokens"), counts, strict=True
        ):
            if count:
                options.append(f"--{option}={int(count)}")
        self.runs.start(self.folder.model(model), folder, options)
        return folder

    def end(self) -> None:
        """Stop what goes on; nothing half-written is left."""
        for export in list(self.exports):
            export.stop()
        self.runs.end()


def _one_of(value: str, values: tuple[str, ...]) -> str:
    if value not in values:
        raise AbliterateError(f"{shorten(str(value))} is none of {', '.join(values)}")
    return value


def _check_new(path: Path, folder: Folder, replace: bool) -> None:
    if path.exists() and not replace:
        raise AbliterateError(f"{folder.shown(path)} exists; take another name, or tick Replace")
    check_file(path, overwrite=True)


def told(function: Callable[..., Any], public: Callable[[str], str] = str) -> Callable[..., Any]:
    """The same event, an error shown as one line on the page; never a trace, and nothing of it in a log.

    Args:
        function: called with what the page holds.
        public: takes out of a text what isn't for those who use the page.
    """

    def line(error: Exception) -> gr.Error:
        if not isinstance(error, AbliterateError):
            logger.debug("an event of the studio failed", exc_info=error)
        said = str(error) if isinstance(error, AbliterateError) else f"{type(error).__name__}: {error}"
        return gr.Error(escape(shorten(public(said), 400)), print_exception=False, duration=None)

    @functools.wraps(function)
    def once(*values: Any) -> Any:
        try:
            return function(*values)
        except gr.Error:
            raise
        except Exception as error:
            raise line(error) from None

    @functools.wraps(function)
    def streamed(*values: Any) -> Iterator[Any]:
        try:
            yield from function(*values)
        except gr.Error:
            raise
        except Exception as error:
            raise line(error) from None

    return streamed if inspect.isgeneratorfunction(function) else once


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


def status(session: Session) -> str:
    """What is loaded, as Markdown without markup of its own."""
    if session.loaded is None:
        return "No model is loaded."
    handle = session.loaded.handle
    recipe = f"recipe {session.recipe_name}" if session.recipe else "no recipe"
    return f"`{session.loaded.name}` · {handle.layers} layers, d_model {handle.d_model} · {recipe}".replace("\n", " ")


def verdict(answer: str) -> str:
    """A short mark under an answer of the grid."""
    if not answer:
        return ""
    refuses = is_refusal(answer)
    return f'<span class="{"refuses" if refuses else "answers"}">{"refuses" if refuses else "answers"}</span>'


def grid_table(texts: list[str], rows: list[Answers]) -> str:
    """Prompts and both answers as an HTML table; everything typed or answered is escaped.

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
    counts = ""
    if all(row.whole for row in rows):
        refused = [sum(is_refusal(a) for a in answers if a) for answers in _columns(rows)]
        counts = f" {refused[0]} of {len(rows)} refused by the original, {refused[1]} by the edited, judged by words."
    return (
        f"<table class='compare'><caption>{len(rows)} prompts, original beside edited.{counts}</caption>"
        "<thead><tr><th scope='col'>Prompt</th><th scope='col'>Original</th><th scope='col'>Edited</th></tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _columns(rows: list[Answers]) -> tuple[list[str], list[str]]:
    return [row.original for row in rows], [row.edited for row in rows]


def run_view(view: View, folder: Folder) -> str:
    """How a run goes, as HTML: a bar, where it is, and the last lines, without the paths of this machine."""
    shown = folder.shown(view.out)
    words = {
        "nothing": f"No run writes {shown} now.", "done": f"{shown} is done.", "stopped": f"{shown} was stopped.",
        "failed": f"{shown} failed: {folder.public(view.error)}", "starting": "Starting…", "stopping": "Stopping…",
        "running": "",
    }  # fmt: skip
    said = f"<p class='state'>{escape(words[view.state])}</p>" if words[view.state] else ""
    return said + (progress_view(view.progress, folder, going=view.going) if view.progress else "")


def progress_view(progress: Progress, folder: Folder, *, going: bool) -> str:
    """Where something long is, as HTML: a bar while it goes on, and the last lines."""
    parts = []
    if going and progress.total:
        spent = time.time() - progress.stage_started
        left = f", about {spent / progress.done * (progress.total - progress.done):.0f} s left" if progress.done else ""
        where = f"{progress.stage}: {progress.done} of {progress.total}{left}"
        parts.append(
            f"<p class='state'>{escape(where)}</p>"
            f"<progress max='{progress.total}' value='{progress.done}' aria-label='{escape(progress.stage)}'>"
            "</progress>"
        )
    if progress.lines:
        lines = "\n".join(f"{seconds:6.1f}s  {folder.public(line)}" for seconds, line in progress.lines[-12:])
        parts.append(f"<pre>{escape(lines)}</pre>")
    return "".join(parts)


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    with gr.Blocks(
        title="abliterate studio", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        _Page(studio, page)
    return page


class _Page:
    """The components, and what each does when it is used."""

    def __init__(self, studio: Studio, page: gr.Blocks) -> None:
        self.studio = studio
        self.session = gr.State(Session())
        gr.Markdown("# abliterate studio", elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300, elem_id="controls"):
                self._controls()
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Talk", id="talk"):
                    self._talk()
                with gr.Tab("Grid", id="grid"):
                    self._grid()
                with gr.Tab("Frontier", id="frontier"):
                    self._frontier()
                with gr.Tab("Run", id="run"):
                    self._run()
                with gr.Tab("Keep", id="keep"):
                    self._keep()
        self._wire(page)

    def on(
        self, event: Any, function: Callable[..., Any], inputs: Any = None, outputs: Any = None, **options: Any
    ) -> Any:
        """Wire an event: errors on one line, as many users at once as come, not offered as an API."""
        return event(
            told(function, self.studio.folder.public), inputs, outputs, concurrency_limit=None,
            api_visibility="private", **{"show_progress": "minimal", **options},
        )  # fmt: skip

    def _controls(self) -> None:
        self.model = gr.Dropdown(
            [], label="Model", info="In the studio's folder, or a Hub id.", allow_custom_value=True, elem_id="model"
        )
        self.recipe = gr.Dropdown(
            [], label="Recipe", info="In the folder, or uploaded (.safetensors).", allow_custom_value=True,
            elem_id="recipe",
        )  # fmt: skip
        with gr.Row():
            self.load_button = gr.Button("Load", variant="primary", elem_id="load", min_width=80, size="md")
            self.upload = gr.UploadButton(
                "Upload", file_types=[".safetensors"], elem_id="upload", min_width=80, size="md"
            )
        self.status = gr.Markdown("No model is loaded.", elem_id="status")
        self.overall = gr.Slider(
            -1, 2, 1, step=0.05, label="Strength", info="0 original, 1 recipe", elem_id="overall"
        )  # fmt: skip
        self.groups = [
            gr.Slider(0, 2, 1, step=0.05, label=f"× {name}", elem_id=f"group-{name}") for name in GROUPS
        ]  # fmt: skip
        with gr.Accordion("Answers", open=False):
            self.tokens = gr.Slider(8, 1024, 128, step=8, label="At most, tokens", elem_id="tokens")
            self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest token.")
            self.seed = gr.Number(0, label="Seed of both answers", precision=0)
            self.system = gr.Textbox("", label="System prompt", lines=2)
        self.sampling = [self.tokens, self.temperature, self.seed]

    def _talk(self) -> None:
        self.prompt = gr.Textbox(EXAMPLE, label="Prompt", lines=2, max_lines=8, elem_id="prompt", submit_btn=False)
        with gr.Row():
            self.ask = gr.Button("Answer", variant="primary", elem_id="ask", **SMALL)
            self.stop = gr.Button("Stop", elem_id="stop", **SMALL)
        with gr.Row(equal_height=True):
            look: dict[str, Any] = {
                "lines": 16,
                "max_lines": 16,
                "interactive": False,
                "buttons": ["copy"],
                "min_width": 260,
            }
            self.original = gr.Textbox(label="Original", elem_id="original", **look)
            self.edited = gr.Textbox(label="Edited", elem_id="edited", **look)
        self.note = gr.Markdown("Move a slider and the edited answer begins anew.", elem_id="note")

    def _grid(self) -> None:
        self.prompts = gr.Textbox(
            "", label=f"Prompts, one per line, at most {MOST_GRID}", lines=5, max_lines=MOST_GRID, elem_id="prompts"
        )
        with gr.Row():
            self.grid_ask = gr.Button("Compare", variant="primary", elem_id="compare", **SMALL)
            self.grid_stop = gr.Button("Stop", elem_id="grid-stop", **SMALL)
            self.grid_upload = gr.UploadButton(
                "Upload prompts", file_types=list(PROMPT_SUFFIXES), elem_id="grid-upload", **LONGER
            )
        self.table = gr.HTML("", elem_id="table", padding=False)

    def _frontier(self) -> None:
        self.out = gr.Dropdown([], label="Run", allow_custom_value=True, elem_id="out")
        self.svg = gr.HTML("", elem_id="svg", padding=False)
        self.point = gr.Radio([], label="Point", elem_id="point")
        with gr.Row():
            self.take = gr.Button("Use this point", variant="primary", elem_id="take", **SMALL)
            self.make_report = gr.Button("Prepare the report", elem_id="make-report", **LONGER)
            self.report = gr.DownloadButton("Download the report", visible=False, elem_id="report", **LONGER)

    def _run(self) -> None:
        with gr.Row():
            self.run_out = gr.Textbox("studio-run", label="Output folder", elem_id="run-out")
            self.method = gr.Dropdown(["fit", "sweep", "article", "tpe"], value="fit", label="Method", elem_id="method")
        with gr.Row():
            sources = "bundled, a file in the folder, or a Hub data set; empty: the article's"
            self.target = gr.Textbox("bundled", label="Target prompts", info=sources, elem_id="target")
            self.baseline = gr.Textbox("bundled", label="Baseline prompts", info=sources, elem_id="baseline")
        with gr.Row():
            self.counts = [
                gr.Number(0, label=label, info="0: as usual", precision=0, minimum=0, min_width=110, elem_id=name)
                for name, label in (
                    ("train", "Training prompts"), ("validation", "Validation prompts"), ("test", "Test prompts"),
                    ("run-tokens", "Tokens per answer"),
                )
            ]  # fmt: skip
        with gr.Row():
            self.start = gr.Button("Start", variant="primary", elem_id="start", **SMALL)
            self.halt = gr.Button("Stop the run", variant="stop", elem_id="halt", **SMALL)
            self.watch = gr.Button("Watch", elem_id="watch", **SMALL)
        gr.Markdown("The run edits the model chosen in the list. *Watch* shows one started elsewhere, too.")
        self.progress = gr.HTML("", elem_id="progress", elem_classes="progress", padding=False)
        self.timer = gr.Timer(1.0, active=False)

    def _keep(self) -> None:
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
            self.export_model = gr.Textbox(
                "", label="Model", placeholder="the loaded one, or a GGUF file", elem_id="export-model", min_width=240
            )
            self.export_name = gr.Textbox("studio-model", label="Folder or file", elem_id="export-name", min_width=240)
        with gr.Row():
            self.export = gr.Button("Export", variant="primary", elem_id="export", **SMALL)
            self.export_stop = gr.Button("Stop", elem_id="export-stop", **SMALL)
        self.exported = gr.HTML("", elem_id="exported", elem_classes="progress", padding=False)

    def _wire(self, page: gr.Blocks) -> None:
        on, session = self.on, self.session
        sliders = [self.overall, *self.groups]
        lists = [self.model, self.recipe, self.out]
        talking = [self.original, self.edited, self.note]
        self.taken = [self.recipe, self.status, *sliders, *talking]  # what another recipe changes
        asked = [session, self.prompt, self.system, *self.sampling]
        on(page.load, self.opened, [session], [*lists, self.status, self.progress, self.timer])
        chosen = [session, self.model, self.recipe]
        on(self.load_button.click, self.loaded, chosen, [self.model, *self.taken])
        on(self.upload.upload, self.uploaded, [session, self.upload], self.taken)
        for slider in sliders:
            moved = on(
                slider.input, self.moved, [session, *sliders], [], trigger_mode="always_last", show_progress="hidden"
            )
            on(moved.then, self.again, [session], talking, trigger_mode="always_last", show_progress="hidden")
        for event in (self.ask.click, self.prompt.submit):
            on(event, self.answer, asked, talking, show_progress="hidden")
        for button in (self.stop, self.grid_stop):
            on(button.click, self.stopped, [session], [])
        grid = [session, self.prompts, self.system, *self.sampling]
        on(self.grid_ask.click, self.compare, grid, [self.table], show_progress="hidden")
        on(self.grid_upload.upload, self.prompts_uploaded, [self.grid_upload], [self.prompts])
        on(self.out.input, self.points, [self.out], [self.point, self.svg, self.report])
        on(self.point.input, self.pointed, [self.out, self.point], [self.svg])
        on(self.take.click, self.took, [session, self.out, self.point], self.taken)
        on(self.make_report.click, self.reported, [self.out], [self.report])
        settings = [self.model, self.run_out, self.method, self.target, self.baseline, *self.counts]
        on(self.start.click, self.started, settings, [self.progress, self.timer])
        on(self.halt.click, self.halted, [self.run_out], [self.progress, self.timer])
        on(self.watch.click, self.looked, [self.run_out], [self.progress, self.timer])
        looked = on(self.timer.tick, self.looked, [self.run_out], [self.progress, self.timer], show_progress="hidden")
        on(looked.then, self.listed, [self.timer], lists, show_progress="hidden")
        on(self.save.click, self.keep, [session, self.name, self.replace], [self.saved, self.download, self.recipe])
        exporting = [session, self.form, self.export_model, self.export_name]
        on(self.export.click, self.export_form, exporting, [self.exported], show_progress="hidden")
        on(self.export_stop.click, self.export_stopped, [session], [])

    # What the events do. Values come from the page and are checked by Studio, Session and Folder.

    def opened(self, session: Session) -> Iterator[Any]:
        folder, first = self.studio.folder, self.studio.first
        models, runs = folder.models(), folder.runs()
        if first and session.loaded is None:
            self.studio.load(session, *first)
        model = session.loaded.name if session.loaded else models[0] if models else None
        going = self.studio.runs.going()
        yield (
            gr.update(choices=models, value=model),
            self._recipes(session),
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
        return (
            gr.update(choices=folder.models()), gr.update(choices=[NO_RECIPE, *folder.recipes()]),
            gr.update(choices=folder.runs()),
        )  # fmt: skip

    def _recipes(self, session: Session) -> Any:
        """The list of recipes, at the one that is attached; an uploaded one is listed though it is in no folder."""
        found = [NO_RECIPE, *self.studio.folder.recipes()]
        name = session.recipe_name or NO_RECIPE
        return gr.update(choices=found if name in found else [*found, name], value=name)

    def _now_used(self, session: Session) -> tuple[Any, ...]:
        """What another recipe changes on the page: its name, and all that was asked of the one before."""
        return self._recipes(session), status(session), 1, 1, 1, 1, "", "", _note(session)

    def loaded(self, session: Session, model: str | None, recipe: str | None) -> Any:
        self.studio.load(session, model or "", recipe or "")
        return gr.update(value=session.model.name), *self._now_used(session)

    def uploaded(self, session: Session, file: str) -> Any:
        path = Path(file)
        try:
            check_upload(path, (".safetensors",), MOST_BYTES)
            recipe, name = load_recipe(path), path.name + UPLOADED
        finally:
            path.unlink(missing_ok=True)
        session.use(session.model, recipe, name)
        return self._now_used(session)

    def moved(self, session: Session, overall: float, *groups: float) -> None:
        session.strengths = Strengths.of(overall, *groups)

    def again(self, session: Session) -> Iterator[Any]:
        given = False
        for value in growing(session, session.answer_again()):
            given = True
            yield value
        if not given:  # a stream that goes on sees to it: what stands on the page is its to change
            yield gr.skip(), gr.skip(), gr.skip()

    def answer(
        self, session: Session, text: str, system: str, tokens: float, temperature: float, seed: float
    ) -> Iterator[Any]:
        yield "", "", ""
        yield from growing(session, session.ask(Question(text, system.strip(), _sampling(tokens, temperature, seed))))

    def stopped(self, session: Session) -> None:
        session.stopping = True

    def compare(
        self, session: Session, prompts: str, system: str, tokens: float, temperature: float, seed: float
    ) -> Iterator[Any]:
        texts = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not 1 <= len(texts) <= MOST_GRID:
            raise AbliterateError(f"the grid takes 1 to {MOST_GRID} prompts, one per line; there are {len(texts)}")
        yield ""
        rows = session.grid(texts, system.strip(), _sampling(tokens, temperature, seed))
        yield from paced(rows, lambda found: grid_table(texts, found))

    def prompts_uploaded(self, file: str) -> str:
        path = Path(file)
        try:
            check_upload(path, PROMPT_SUFFIXES, MOST_PROMPT_BYTES)
            texts = load_prompts(str(path)).texts[:MOST_GRID]
        finally:
            path.unlink(missing_ok=True)
        return "\n".join(" ".join(text.split()) for text in texts)

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
        recipe: Recipe = load_recipe(self.studio.folder.recipe(name))
        session.use(session.model, recipe, name)
        return self._now_used(session)

    def reported(self, out: str | None) -> Any:
        if not out:
            raise AbliterateError("no run is chosen; choose one")
        return gr.update(value=self.studio.handed_out(self.studio.report(out)), visible=True)

    def started(self, model: str | None, out: str, method: str, target: str, baseline: str, *counts: float) -> Any:
        folder = self.studio.start_run(model or "", out, method, target, baseline, *counts)
        return run_view(self.studio.runs.view(folder), self.studio.folder), gr.Timer(active=True)

    def halted(self, out: str) -> Any:
        self.studio.runs.stop(self.studio.folder.output(out))
        return self.looked(out)

    def looked(self, out: str) -> Any:
        view = self.studio.runs.view(self.studio.folder.output(out))
        return run_view(view, self.studio.folder), gr.Timer(active=view.going)

    def keep(self, session: Session, name: str, replace: bool) -> Any:
        path = self.studio.save(session, name, replace)
        shown = self.studio.folder.shown(path)
        recipes = self._recipes(session)["choices"]
        return (
            f"Saved `{shown}` ({session.strengths.words()}).",
            gr.update(value=self.studio.handed_out(path), visible=True),
            gr.update(choices=recipes),
        )

    def export_form(self, session: Session, form: str, model: str, name: str) -> Iterator[str]:
        export = session.export = Export()
        yield "<p class='state'>Starting…</p>"
        pool = ThreadPoolExecutor(1, thread_name_prefix="export")
        job = pool.submit(self.studio.export, session, export, form, model, name)
        pool.shutdown(wait=False)  # the one job goes on; whoever closes the page doesn't end it
        while not wait([job], timeout=EXPORT_EVERY).done:
            yield progress_view(export.state, self.studio.folder, going=True)
        try:
            summary = job.result()
        except Exception:
            yield ""  # the message says what went wrong
            raise
        out = self.studio.folder.shown(Path(summary["out"]).resolve())
        said = f"Wrote {out} as {form}: {decimal(summary.get('bytes', 0))}."
        notes = "".join(f"<li>{escape(self.studio.folder.public(note))}</li>" for note in summary.get("notes", ()))
        yield f"<p class='state'>{escape(said)}</p>" + (f"<ul>{notes}</ul>" if notes else "")

    def export_stopped(self, session: Session) -> None:
        if session.export is None:
            raise AbliterateError("no export of yours goes on")
        session.export.stop()


def growing(session: Session, stream: Iterator[Answers]) -> Iterator[tuple[str, str, str]]:
    """Both answers and the line under them as they grow, and once more when they are whole."""
    last: list[Answers] = []

    def seen() -> Iterator[Answers]:
        for answers in stream:
            last[:] = [answers]
            yield answers

    yield from paced(seen(), lambda found: (found.original, found.edited, _note(session, found, going=True)))
    for answers in last:
        if session.answers is answers:  # else a newer question has taken the page over
            yield answers.original, answers.edited, _note(session, answers)


def _note(session: Session, answers: Answers | None = None, *, going: bool = False) -> str:
    """The line under the answers."""
    if session.recipe is None:
        return "No recipe: there is only the original to answer."
    if answers is None:
        return "Move a slider and the edited answer begins anew."
    words = answers.strengths.words()
    if going:
        return f"Answering at {words} …"
    return f"Stopped. Edited: {words}." if session.stopping else f"Edited: {words}."
