"""The main job: find the direction, choose it by measurement, remove it, prove the result, write it down."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from abliterate.cards.card import write_card
from abliterate.common.errors import AbliterateError, WriterError
from abliterate.common.files import check_apart, check_folder, check_space, whole_folder
from abliterate.common.names import public_name
from abliterate.common.reporting import Clock, Reporter, Silent
from abliterate.directions.activations_file import load_activations, save_activations
from abliterate.directions.contrast import collect_contrast, contrast
from abliterate.directions.keep import check_keep, keeping, read_keep
from abliterate.directions.means import Directions, difference_of_means
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe, config_file, save_recipe
from abliterate.measure import Measurement
from abliterate.measure.judges import make_judge
from abliterate.models.handle import Handle
from abliterate.models.stored import stored_names, stored_tensors
from abliterate.models.writers import Proof, check_proof, find_writers, prove, tolerance
from abliterate.prompts.behaviour import Behaviour, load_behaviour
from abliterate.prompts.sets import Sides
from abliterate.report import write_html
from abliterate.report.gather import Gathered, gather
from abliterate.run.facts import (
    SCHEMA,
    environment,
    model_facts,
    shared_prompts,
    shared_settings,
    side_facts,
    strengths_used,
    tied_fate,
)
from abliterate.run.opening import check_lengths, described, open_model, open_prompts, set_prefill
from abliterate.run.saving import attach_or_bake, bytes_to_write, save_model, to_save
from abliterate.run.searching import Work, forget, search
from abliterate.run.showing import Shown
from abliterate.run.stages import check_same_tokens, collected, decoding, filtered, measured
from abliterate.search.frontier import FrontierPoint
from abliterate.search.sweep import Choice, Choose, Show
from abliterate.settings.run import RunSettings


@dataclass
class Result:
    """What a run did; `document` is results.json."""

    out: Path
    edit: Edit
    original: Measurement
    edited: Measurement
    document: dict[str, Any]


def run(
    model: str,
    out: str | Path,
    settings: RunSettings | None = None,
    *,
    activations: str | Path | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    choose: Choose | None = None,
    show: Show | None = None,
    show_completions: bool = False,
) -> Result:
    """Find, choose, remove and prove; write model/, recipe.safetensors, results.json and the report into `out`.

    Args:
        model: Hub id, folder or GGUF file.
        out: output folder; it appears only when whole.
        settings: everything else.
        activations: a file that `collect` saved, instead of collecting.
        overwrite: replace `out` if it is not empty.
        reporter: told about stages and progress.
        choose: for the article's method: which of the passing candidates to take.
        show: for the article's method: shown headings and answers.
        show_completions: keep a few answers to target prompts in report-data.json and, folded, in the report.

    Raises:
        AbliterateError: any of the errors in `abliterate.common.errors`; nothing is written then.
        NothingToDoError: the model hardly refuses, and `settings.force` is off.
    """
    settings, reporter, clock = settings or RunSettings(), reporter or Silent(), Clock()
    settings, behaviour = resolve_behaviour(settings, reporter)
    if behaviour.runs_as_style:
        from abliterate.run.styling import run_style

        if activations is not None or show_completions or (choose is not None and settings.search.interactive):
            raise AbliterateError(
                f"behaviour {behaviour.name} has a search of its own; leave --activations, --interactive and "
                "--show-completions out"
            )
        return run_style(model, out, settings, behaviour, overwrite=overwrite, reporter=reporter)
    check_folder(out, overwrite=overwrite)
    check_apart(out, model, activations)
    if activations is not None:
        load_activations(activations)  # whether it is there and whole; once more below, against the model
    judge = make_judge(settings.measure.judge)
    with clock.stage("prompts"):
        sides = open_prompts(settings.prompts, settings.seed, behaviour)
        keep = read_keep(settings.keep, settings.seed) if settings.keep else None
    for note in sides.notes:
        reporter.say(note)
    reporter.say(f"loading {model}")
    with clock.stage("load"):
        handle = open_model(model, settings.load)
    check_space(out, bytes_to_write(handle))
    reporter.say(described(handle))
    stored = None if activations is None else load_activations(activations, handle)
    check_lengths(handle, sides)
    if keep is not None:
        check_keep(handle, keep)
    torch.manual_seed(settings.seed)
    with clock.stage("prove"):
        proof = check_proof(handle)
    reporter.say(f"{len(find_writers(handle))} writers found; proof: largest component left {proof.component:.1e}")
    with clock.stage("filter"):
        set_prefill(handle, sides.target.train.texts, reporter)
        # activations from a file were filtered when they were collected; the fit wants the answers
        filters = stored is None or settings.search.method == "fit"
        shown = filtered(handle, sides, "train", judge, settings, reporter) if filters else None
        validation = filtered(handle, sides, "validation", judge, settings, reporter)
    with clock.stage("collect"):
        if stored is not None:
            reporter.say(f"activations from {activations}")
        else:
            assert shown is not None
            stored = collected(handle, shown, settings, reporter)
    directions = difference_of_means(stored, projected=settings.collect.projected)
    with clock.stage("keep"):
        contrasted = shown.baseline if shown else list(sides.baseline.train.texts)
        directions, kept = keeping(handle, keep, directions, contrasted, reporter)
    with clock.stage("search"):
        work = Work(
            handle, directions, shown, validation, sides, judge, settings, reporter, Path(out), choose, show, kept
        )
        choice = search(work)
    with clock.stage("report data"):
        gathered = _gathered(handle, choice, directions, validation, reporter)
        gathered.document["activations"] = public_name(str(activations)) if activations else None
    with clock.stage("measure original"):
        original = measured(handle, sides, judge, settings, reporter, "original")
        if kept is not None:
            kept.watch(handle, judge, **decoding(settings))
    with whole_folder(out, overwrite=overwrite) as folder:
        tied = tied_fate(handle, choice.edit, settings.keep_tied)
        with clock.stage("edit"):
            live = attach_or_bake(handle, choice.edit, settings, reporter)
        with live:
            left = _check_removed(handle, choice.edit)
            with clock.stage("measure edited"):
                edited = measured(handle, sides, judge, settings, reporter, "edited", original)
                kept_found = kept.to_json(handle, choice.edit, judge, **decoding(settings)) if kept else None
            gathered.look_at_edited(handle)
        with clock.stage("save"):
            proofs = {"writers": proof, "edited": left}
            document = _document(handle, settings, sides, shown, choice, original, edited, proofs, clock)
            document["recipe"]["tied"] = tied
            document["behaviour"] = behaviour.to_json()
            if kept_found:
                document["kept"] = kept_found
            save_recipe(_recipe(handle, choice, document), folder / "recipe.safetensors")
            document["frontier"] = _save_frontier(handle, choice, document, folder, clock)
            save_model(to_save(handle, choice.edit, settings), folder / "model")
            write_card(folder / "model" / "README.md", handle, document)
        document["timings_s"] = clock.seconds
        (folder / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        gathered.compare(sides, original, edited, show_completions=show_completions)
        gathered.save(folder)
    forget(out)
    # the result is in place: nothing that goes wrong here can lose it
    write_html(out, show_completions=show_completions)
    return Result(Path(out), choice.edit, original, edited, document)


def resolve_behaviour(settings: RunSettings, reporter: Reporter | None = None) -> tuple[RunSettings, Behaviour]:
    """The settings with the behaviour's judge and defaults, and the behaviour; says what it changes.

    Raises:
        AbliterateError: when there is no such behaviour, or its file is wrong.
    """
    behaviour = load_behaviour(settings.behaviour)
    settings, notes = behaviour.resolved(settings)
    for note in notes:
        (reporter or Silent()).say(note)
    return settings, behaviour


def _gathered(
    handle: Handle, choice: Choice, directions: Directions, validation: Shown, reporter: Reporter
) -> Gathered:
    """What the report needs of the original, read before the edit."""
    target, baseline = validation.target, validation.baseline
    tick = reporter.progress("reading activations for the report", len(target) + len(baseline))
    return gather(handle, choice.edit, choice.winner.place, directions, target, baseline, tick=tick)


def _check_removed(handle: Handle, edit: Edit) -> Proof:
    left = prove(handle, edit.directions[0])
    whole = len(edit.writers) == len(find_writers(handle)) and bool((edit.strengths == 1).all())
    # a direction that the weights are large along leaves more of their rounding than a random one: in half precision
    # the bound is what tells it from a missed writer, which leaves 1/sqrt(d_model)
    half = 0.4 * handle.d_model**-0.5 if handle.dtype.itemsize < 4 else 0.0
    if whole and left.component > max(tolerance(handle), half):
        raise WriterError(
            f"after baking, a component of {left.component:.1e} is left at {left.where}; nothing was written"
        )
    return left


def _document(
    handle: Handle, settings: RunSettings, sides: Sides, shown: Shown | None, choice: Choice, original: Measurement,
    edited: Measurement, proofs: dict[str, Proof], clock: Clock,
) -> dict[str, Any]:  # fmt: skip
    return {
        "schema": SCHEMA,
        "model": model_facts(handle),
        "recipe": {
            "file": "recipe.safetensors",
            "method": settings.search.method,
            "direction": choice.winner.to_json(),
            "writers": len(choice.edit.writers),
            "strength": strengths_used(choice.edit),
            "proof": {name: {"component": p.component, "where": p.where} for name, p in proofs.items()},
        },
        "settings": settings.model_dump(),
        "prompts": {
            "target": side_facts(sides.target),
            "baseline": side_facts(sides.baseline),
            "filter": shown.to_json() if shown and settings.collect.filter else None,
            "notes": list(sides.notes),
        },
        "environment": environment(handle),
        "original": original.to_json(),
        "edited": edited.to_json(),
        "candidates": [c.to_json() for c in choice.candidates],
        "frontier": [],
        "timings_s": clock.seconds,
    }


def _save_frontier(
    handle: Handle, choice: Choice, document: dict[str, Any], folder: Path, clock: Clock
) -> list[dict[str, Any]]:
    """A recipe per point of the frontier, with what validation found; the chosen one is marked."""
    listed = []
    for number, point in enumerate(choice.frontier):
        name = f"frontier/{number:02}.safetensors"
        (folder / "frontier").mkdir(exist_ok=True)
        validation = point.to_json()
        whole = _recipe(handle, replace(choice, edit=point.edit), document)
        kept = {k: v for k, v in whole.provenance.items() if k not in ("original", "edited")}
        save_recipe(replace(whole, provenance={**kept, "validation": validation}), folder / name)
        listed.append({**validation, **_found(point, clock), "recipe": name, "chosen": point.edit is choice.edit})
    return listed


def _found(point: FrontierPoint, clock: Clock) -> dict[str, float]:
    """How long after the run's start a point was there, and the process's CPU seconds until then."""
    if point.found is None:
        return {}
    return {"seconds": round(point.found.clock - clock.started, 1), "cpu_seconds": round(point.found.cpu, 1)}


def _recipe(handle: Handle, choice: Choice, document: dict[str, Any]) -> Recipe:
    """The edit with its provenance: nothing in it depends on the time or the output's place."""
    model = {k: document["model"][k] for k in ("source", "revision", "class", "config_hash", "layers", "d_model")}
    model["source"] = public_name(model["source"])  # a recipe is shared: no path of this machine in it
    # what baking untied was tied in the model that the recipe is for
    model |= stored_names(handle) | {"tied": handle.tied or document["recipe"]["tied"] is not None}
    model |= config_file(handle.source)
    provenance: dict[str, Any] = {
        "found_at": choice.winner.to_json(),
        "prompts": shared_prompts(document["prompts"]),
        "settings": shared_settings(document["settings"]),
        "environment": document["environment"],
        "original": document["original"],
        "edited": document["edited"],
        **{key: document[key] for key in ("behaviour", "kept") if key in document},
    }
    # a quantised model's weights have other shapes in memory: whoever applies the recipe looks at the checkpoint
    tensors = {} if handle.quantised else stored_tensors(handle)
    used = {writer: tensors[writer] for writer in choice.edit.writers if tensors}
    return Recipe(choice.edit, model, provenance, used)


def collect_to_file(
    model: str,
    out: str | Path,
    settings: RunSettings,
    *,
    keep_vectors: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Collect on the training split and save to a file; returns counts and shape."""
    reporter = reporter or Silent()
    settings, behaviour = resolve_behaviour(settings, reporter)
    sides = open_prompts(settings.prompts, settings.seed, behaviour)
    for note in sides.notes:
        reporter.say(note)
    reporter.say(f"loading {model}")
    handle = open_model(model, settings.load)
    reporter.say(described(handle))
    set_prefill(handle, sides.target.train.texts, reporter)
    judge = make_judge(settings.measure.judge)
    if behaviour.kind == "prompts":
        shown = filtered(handle, sides, "train", judge, settings, reporter)
        found = collected(handle, shown, settings, reporter, keep_vectors=keep_vectors)
    else:
        filter = settings.collect.filter
        rows = contrast(handle, behaviour, sides.target.train.texts, judge, filter=filter, reporter=reporter)
        found = collect_contrast(handle, rows, settings.collect, keep_vectors=keep_vectors, reporter=reporter)
    found.provenance = {
        "target": {"source": sides.target.source, "sha256": sides.target.train.sha256},
        "baseline": {"source": sides.baseline.source, "sha256": sides.baseline.train.sha256},
        "settings": settings.model_dump(),
    }
    save_activations(found, out, handle)
    return {
        "schema": SCHEMA,
        "file": str(out),
        "layers": found.layers,
        "sites": 3,
        "positions": found.positions,
        "d_model": found.d_model,
        "target": found.target.count,
        "baseline": found.baseline.count,
    }


def measure_models(
    model: str, original: str | None, settings: RunSettings, *, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Measure a model, and its divergence from an original when one is named; one is loaded at a time."""
    reporter, clock = reporter or Silent(), Clock()
    settings, behaviour = resolve_behaviour(settings)
    sides = open_prompts(settings.prompts, settings.seed, behaviour)
    for note in sides.notes:
        reporter.say(note)
    judge = make_judge(settings.measure.judge)
    before: Measurement | None = None
    handle: Handle | None = None
    document: dict[str, Any] = {"schema": SCHEMA, "original": None, "edited": None}
    for name, source in (("original", original), ("edited", model)):
        if source is None:
            continue
        label = name if original else "model"
        reporter.say(f"loading {source}")
        handle = None  # let go of the one before
        with clock.stage(f"load {label}"):
            handle = open_model(source, settings.load)
        check_lengths(handle, sides)
        set_prefill(handle, sides.target.test.texts, reporter)
        with clock.stage(f"measure {label}"):
            if before is not None:
                check_same_tokens(handle, sides, before, source, original)
            found = measured(handle, sides, judge, settings, reporter, label, before)
        before = found if name == "original" else before
        document[name] = found.to_json()
        document["model"] = {"source": source, "config_hash": handle.config_hash, "revision": handle.revision}
    if original is None:
        document["original"], document["edited"] = document["edited"], None
    document["settings"] = settings.model_dump()
    document["behaviour"] = behaviour.to_json()
    document["prompts"] = {"target": side_facts(sides.target), "baseline": side_facts(sides.baseline)}
    document["environment"] = environment()
    document["timings_s"] = clock.seconds
    return document
