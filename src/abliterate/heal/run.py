"""`abliterate heal`: train, merge, measure original, edited and healed side by side, and write it all down.

One model is in memory at a time: the original first (measured, and for `self` asked what it teaches), then the
edited one, then the healed one. What a training writes on its way lies in a work folder beside the output, which is
gone when the output is whole.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.cards.card import model_card
from abliterate.common.errors import OutputError
from abliterate.common.files import whole_folder
from abliterate.common.reporting import Clock, Reporter, Silent
from abliterate.common.resumable import beside
from abliterate.heal.sources import RESULTS, Sources, check, find_sources, with_settings_of_run
from abliterate.heal.teacher import open_lessons, open_teacher
from abliterate.heal.training import ADAPTER, CONFIGURATION, Job, Training
from abliterate.measure import Measurement
from abliterate.measure.document import RunDocument
from abliterate.measure.judges import Judge
from abliterate.models.handle import Handle
from abliterate.models.pretrained import with_adapter
from abliterate.prompts.behaviour import load_behaviour
from abliterate.prompts.sets import Sides
from abliterate.report import write_html
from abliterate.run.facts import SCHEMA, environment, model_facts, side_facts
from abliterate.run.opening import check_lengths, judges, open_model, open_prompts, second_judge, set_prefill
from abliterate.run.saving import check_savable, save_merged
from abliterate.run.stages import check_same_tokens, measured
from abliterate.settings.heal import HealRunSettings

TENSORBOARD = "tensorboard"
FROM_RUN = ("recipe.safetensors",)  # what the edit's run wrote and the healed model's folder shows too


@dataclass(frozen=True)
class Healed:
    """What healing did; `document` is results.json."""

    out: Path
    original: Measurement | None
    edited: Measurement
    healed: Measurement
    document: dict[str, Any]


def _quantised(settings: HealRunSettings) -> HealRunSettings:
    """`self` trains the model as it is loaded, so that is where --quantise goes; TRL's presets load it themselves."""
    if settings.heal.preset != "self" or settings.heal.quantise != "4bit":
        return settings
    return settings.model_copy(update={"load": settings.load.model_copy(update={"quantise": "4bit"})})


def work_folder(out: str | Path) -> Path:
    """The hidden folder beside an output in which a training keeps its state."""
    return beside(out, "heal")


def heal(
    model: str,
    out: str | Path,
    settings: HealRunSettings,
    *,
    original: str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Healed:
    """Heal an edited model; write model/, adapter/, results.json, heal.json, the curves and the report into `out`.

    Args:
        model: the edited model: folder, Hub id, GGUF file, or the output folder of `abliterate run`.
        out: output folder; it appears only when whole.
        settings: everything else; `settings.resume` goes on with an interrupted training.
        original: the model before the edit; found in the run's results.json where there is one. `self` needs it.
        overwrite: replace `out` if it is not empty.
        reporter: told about stages and progress.

    Raises:
        AbliterateError: any of the errors in `abliterate.common.errors`; nothing is written to `out` then.
    """
    reporter, clock = reporter or Silent(), Clock()
    sources = find_sources(model, original)
    settings = _quantised(with_settings_of_run(settings, sources.run))
    check(sources, out, settings, overwrite=overwrite)
    judge = judges(settings, load_behaviour(settings.behaviour))
    own = settings.heal.preset == "self"
    sides = open_lessons(settings) if own else open_prompts(settings.prompts, settings.seed)
    for note in sides.notes:
        reporter.say(note)
    job = Job(
        model=sources.model, original=sources.original, folder=work_folder(out), settings=settings,
        resume=settings.resume,
    )  # fmt: skip
    _prepare(job, reporter)
    measuring = _Measuring(sides, judge, settings, reporter, clock)
    teaching: dict[str, Any] = {}
    if sources.original is not None:
        handle = measuring.open(sources.original, "original")
        measuring.measure(handle, "original")
        if own:
            with clock.stage("teacher"):
                teaching = {"sides": sides, "teacher": open_teacher(job, sides, handle=handle, reporter=reporter)}
        del handle
    training = _train(job, out, measuring, teaching, reporter)
    handle = _merged(job, training, measuring)
    measuring.measure(handle, "healed")
    with whole_folder(out, overwrite=overwrite) as folder:
        with clock.stage("save"):
            document = _document(sources, handle, training, measuring)
            card = model_card(RunDocument.model_validate(document))
            save_merged(handle, training.adapter, folder / "model", card, reporter)
            _copy_training(job, training, sources, folder)
        document["timings_s"] = clock.seconds
        (folder / RESULTS).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        _write_report_data(sources, measuring, folder)
    shutil.rmtree(job.folder, ignore_errors=True)
    write_html(out)
    found = measuring.found
    return Healed(Path(out), found.get("original"), found["edited"], found["healed"], document)


def _prepare(job: Job, reporter: Reporter) -> None:
    from abliterate.heal.trainer import prepare_folder

    if job.folder.is_dir() and not job.resume:
        reporter.say("an earlier healing was interrupted; starting anew (--resume goes on from where it was)")
    elif job.resume and not job.folder.is_dir():
        reporter.say("there is nothing to go on from; starting anew")
    try:
        prepare_folder(job)
    except OSError as error:
        raise OutputError(f"work folder {job.folder} can't be written: {error.strerror}") from error


@dataclass
class _Measuring:
    """Loads models and measures them on the test split, one after the other."""

    sides: Sides
    judge: Judge
    settings: HealRunSettings
    reporter: Reporter
    clock: Any
    prefill: str | None = None
    switches: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Measurement] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def open(self, source: str, name: str) -> Handle:
        """Load a model, with the same prefill for all."""
        gc.collect()
        self.reporter.say(f"loading {source}")
        with self.clock.stage(f"load {name}"):
            handle = open_model(source, self.settings.load)
        self.ready(handle)
        return handle

    def ready(self, handle: Handle) -> None:
        """Read prompts with it as with the first one."""
        if self.prefill is None and not self.found:
            check_lengths(handle, self.sides)
            set_prefill(handle, self.sides.target.test.texts, self.reporter)
            self.prefill, self.switches = handle.prefill, handle.switches
        handle.prefill, handle.switches = self.prefill, self.switches

    def measure(self, handle: Handle, name: str) -> Measurement:
        """Measure it on the test split, against the original where that was measured."""
        before = self.found.get("original")
        if before is not None and name != "original":
            check_same_tokens(handle, self.sides, before, handle.source, "the original")
        with self.clock.stage(f"measure {name}"):
            second = second_judge(self.settings, load_behaviour(self.settings.behaviour))
            found = measured(handle, self.sides, self.judge, self.settings, self.reporter, name, before, second=second)
        self.found[name] = found
        if not self.about:
            self.about = model_facts(handle)
        return found


def _train(job: Job, out: str | Path, measuring: _Measuring, teaching: dict[str, Any], reporter: Reporter) -> Training:
    """Measure the edited model, and train it: `self` in this very copy, other presets as they load it."""
    handle = measuring.open(job.model, "edited")
    check_savable(handle, out)
    measuring.measure(handle, "edited")
    if teaching:
        from abliterate.heal.self_taught import train

        with measuring.clock.stage("heal"):
            return train(job, handle=handle, reporter=reporter, **teaching)
    del handle
    gc.collect()
    from abliterate.heal.launch import train as launched

    with measuring.clock.stage("heal"):
        return launched(job, reporter=reporter)


def _merged(job: Job, training: Training, measuring: _Measuring) -> Handle:
    """The healed model in memory, to be measured."""
    gc.collect()
    handle = open_model(job.model, job.settings.load.model_copy(update={"quantise": None}))
    handle.model = with_adapter(handle.model, training.adapter).merge_and_unload()
    handle.model.eval().requires_grad_(False)
    for name in ("decoder", "blocks", "module_names"):
        handle.__dict__.pop(name, None)
    measuring.ready(handle)
    return handle


def _document(sources: Sources, handle: Handle, training: Training, measuring: _Measuring) -> dict[str, Any]:
    """results.json, in the shapes that `run` writes."""
    settings, found = measuring.settings, measuring.found
    old = sources.run.to_json() if sources.run else {}
    stages = {name: old["settings"][name] for name in ("search", "collect") if name in (old.get("settings") or {})}
    return {
        "schema": SCHEMA,
        "model": measuring.about,
        **({"recipe": old["recipe"]} if old.get("recipe") else {}),
        "settings": {**settings.model_dump(mode="json", exclude={"search", "collect"}), **stages},
        "prompts": {
            "target": side_facts(measuring.sides.target),
            "baseline": side_facts(measuring.sides.baseline),
            "notes": list(measuring.sides.notes),
        },
        "environment": environment(handle),
        "original": found["original"].to_json() if "original" in found else None,
        "edited": found["edited"].to_json(),
        "healed": found["healed"].to_json(),
        "heal": {
            "preset": settings.heal.preset,
            "model": sources.model,
            "original": sources.original,
            "adapter": ADAPTER,
            "settings": training.resolved,
            "seconds": training.seconds,
            **training.results,
        },
        "timings_s": measuring.clock.seconds,
    }


def _copy_training(job: Job, training: Training, sources: Sources, folder: Path) -> None:
    """What the training left, into the output: adapter, configuration, curves; and the edit's recipe."""
    from abliterate.heal.curves import curves_missing, draw_curves

    shutil.copytree(training.adapter, folder / ADAPTER)
    shutil.copyfile(job.folder / CONFIGURATION, folder / CONFIGURATION)
    if job.curves.is_dir():
        shutil.copytree(job.curves, folder / TENSORBOARD)
    if curves_missing() is None:
        draw_curves(training.history, folder / "curves.png")
    (folder / "curves.json").write_text(json.dumps(training.history, indent=1) + "\n", encoding="utf-8")
    for name in FROM_RUN:
        if sources.folder and (sources.folder / name).is_file():
            shutil.copyfile(sources.folder / name, folder / name)


def _write_report_data(sources: Sources, measuring: _Measuring, folder: Path) -> None:
    """What the report shows beside the numbers: what the edit's run saw, paired tests and answers of all three."""
    from abliterate.report.gather import compared, read_data, write_data

    document = read_data(sources.folder) if sources.folder else None
    document = copy.deepcopy(document) or {"schema": 1}
    document |= compared(measuring.sides, measuring.found)
    write_data(document, folder)
