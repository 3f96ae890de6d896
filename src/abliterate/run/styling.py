"""A run of a style: a behaviour that is added, or whose contrast is system prompts or pairs of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from abliterate.cards.style import style_card
from abliterate.common.errors import NothingToDoError
from abliterate.common.files import check_apart, check_folder, check_space, whole_folder
from abliterate.common.reporting import Clock, Reporter
from abliterate.directions.contrast import Rows, collect_contrast, contrast
from abliterate.directions.keep import check_keep, keeping, read_keep
from abliterate.directions.means import difference_of_means
from abliterate.edit.recipe import Recipe, config_file, recipe_for, save_recipe
from abliterate.measure import Measurement, judged
from abliterate.measure.judges import Judge, make_judge
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle
from abliterate.models.writers import check_proof, prove
from abliterate.prompts.behaviour import Behaviour
from abliterate.prompts.sets import Sides
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
from abliterate.run.pipeline import Result
from abliterate.run.saving import Held, attach_or_bake, bytes_to_write, held, save_model, to_save
from abliterate.run.stages import decoding, measured
from abliterate.search.styles import StyleSettings, add_style, remove_style
from abliterate.search.sweep import Choice
from abliterate.settings.run import RunSettings, layer_range

LEAST_TO_REMOVE = 0.15
MOST_TO_ADD = 0.85
CHECK_PROMPTS = 48


def run_style(
    model: str, out: str | Path, settings: RunSettings, behaviour: Behaviour, *, overwrite: bool, reporter: Reporter
) -> Result:
    """Find a style's direction, choose an edit by whole answers, apply it, and measure on held-out prompts.

    Writes recipe.safetensors, results.json and model/ into `out`; no model/ where the edit shifts a block whose class
    has no bias for it (it is then measured live, and the log says so).

    Args:
        model: Hub id, folder or GGUF file.
        out: output folder; it appears only when whole.
        settings: resolved for the behaviour (`Behaviour.resolved`).
        behaviour: what is added or removed.
        overwrite: replace `out` if it is not empty.
        reporter: told about stages and progress.

    Raises:
        AbliterateError: any of the errors in `abliterate.common.errors`; nothing is written then.
        NothingToDoError: the model hardly shows what is to be removed, or shows already what is to be added.
    """
    clock = Clock()
    check_folder(out, overwrite=overwrite)
    check_apart(out, model)
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
    check_lengths(handle, sides)
    if keep is not None:
        check_keep(handle, keep)
    torch.manual_seed(settings.seed)
    with clock.stage("prove"):
        proof = check_proof(handle)
    with clock.stage("filter"):
        set_prefill(handle, sides.target.train.texts, reporter)
        before = _checked(handle, sides, behaviour, judge, settings, reporter)
    with clock.stage("collect"):
        rows = _rows(handle, sides, behaviour, judge, settings, reporter)
        found = collect_contrast(handle, rows, settings.collect, reporter=reporter)
    directions = difference_of_means(found, projected=settings.collect.projected)
    with clock.stage("keep"):
        neutral = list(sides.baseline.train.texts)
        directions, kept = keeping(handle, keep, directions, neutral, reporter)
    with clock.stage("search"):
        choice = _searched(handle, directions, sides, behaviour, judge, settings, reporter)
    with clock.stage("measure original"):
        original = measured(handle, sides, judge, settings, reporter, "original")
        if kept is not None:
            kept.watch(handle, judge, **decoding(settings))
    facts, recipe = model_facts(handle), recipe_for(choice.edit, handle)
    holding = held(handle, choice.edit)
    reporter.say(holding.said)
    with whole_folder(out, overwrite=overwrite) as folder:
        if holding.weights:
            live: Any = attach_or_bake(handle, choice.edit, settings, reporter)
        else:
            live = choice.edit.attached(handle)
        with live:
            left = prove(handle, choice.edit.directions[0]) if len(choice.edit.directions) else None
            with clock.stage("measure edited"):
                edited = measured(handle, sides, judge, settings, reporter, "edited", original)
                kept_found = kept.to_json(handle, choice.edit, judge, **decoding(settings)) if kept else None
        with clock.stage("save"):
            document = _document(handle, facts, settings, behaviour, sides, before, choice, original, edited, holding)
            document["recipe"]["proof"] = {
                "writers": {"component": proof.component, "where": proof.where},
                "edited": {"component": left.component, "where": left.where} if left else None,
            }
            if kept_found:
                document["kept"] = kept_found
            document["prompts"]["contrast"] = {"target": len(rows.target), "baseline": len(rows.baseline)}
            save_recipe(_with_provenance(recipe, document), folder / "recipe.safetensors")
            if holding.weights:
                save_model(to_save(handle, choice.edit, settings), folder / "model")
                (folder / "model" / "README.md").write_text(style_card(handle, document), encoding="utf-8")
        document["timings_s"] = clock.seconds
        (folder / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return Result(Path(out), choice.edit, original, edited, document)


def _checked(
    handle: Handle, sides: Sides, behaviour: Behaviour, judge: Judge, settings: RunSettings, reporter: Reporter
) -> Rate:
    """How often the original shows the style on validation prompts.

    Raises:
        NothingToDoError: when there is nothing to remove, or it is there already; not with --force.
    """
    prompts = list(sides.target.validation.texts)[:CHECK_PROMPTS]
    tick = reporter.progress("answering validation prompts", len(prompts))
    _, shown = judged(handle, prompts, judge, stop_on=(), tick=tick, **decoding(settings))
    rate, word = Rate(sum(shown), len(shown)), behaviour.words.shows
    reporter.say(f"validation: {rate.count} of {rate.total} of the original's answers are {word}")
    if settings.force:
        return rate
    low, high = rate.ci95
    said = f"{rate.count} of {rate.total} ({rate.rate:.0%}, 95% interval {low:.0%} to {high:.0%})"
    if not behaviour.adds and rate.rate < LEAST_TO_REMOVE:
        raise NothingToDoError(
            f"answers of {handle.source} are hardly {word}: {said} in the validation split; there is nothing to "
            "remove. Pass --force to go on, or give prompts that bring it out with --target"
        )
    if behaviour.adds and rate.rate > MOST_TO_ADD:
        raise NothingToDoError(f"answers of {handle.source} are {word} already: {said}. Pass --force to go on")
    return rate


def _rows(
    handle: Handle, sides: Sides, behaviour: Behaviour, judge: Judge, settings: RunSettings, reporter: Reporter
) -> Rows:
    """The contrast: of the behaviour's kind; of two prompt sets, for one that is added, as they stand."""
    if behaviour.kind == "prompts":
        return Rows(handle.prompt_ids(sides.target.train.texts), handle.prompt_ids(sides.baseline.train.texts))
    prompts = list(sides.target.train.texts)
    return contrast(handle, behaviour, prompts, judge, filter=settings.collect.filter, reporter=reporter)


def _searched(
    handle: Handle, directions: Any, sides: Sides, behaviour: Behaviour, judge: Judge, settings: RunSettings,
    reporter: Reporter,
) -> Choice:  # fmt: skip
    named = settings.search.layers
    options = StyleSettings(
        layers=layer_range(named) if named else None,
        tokens=settings.measure.max_new_tokens,
        max_rate=None if settings.search.max_divergence is not None else settings.search.max_refusal_rate,
        max_divergence=settings.search.max_divergence,
    )
    # a behaviour that is added has to show where it doesn't: on baseline prompts, which may be the only ones
    target, baseline = sides.target.validation.texts, sides.baseline.validation.texts
    if behaviour.adds:
        return add_style(handle, directions, baseline, judge, options, reporter=reporter)
    return remove_style(handle, directions, target, baseline, judge, options, reporter=reporter)


def _document(
    handle: Handle, facts: dict[str, Any], settings: RunSettings, behaviour: Behaviour, sides: Sides, before: Rate,
    choice: Choice, original: Measurement, edited: Measurement, holding: Held,
) -> dict[str, Any]:  # fmt: skip
    edit = choice.edit
    return {
        "schema": SCHEMA,
        "model": facts,
        "behaviour": behaviour.to_json(),
        "recipe": {
            "file": "recipe.safetensors",
            "method": settings.search.method,
            "direction": choice.winner.to_json(),
            "writers": len(edit.writers),
            "shifts": [{"layer": shift.layer, "size": shift.size} for shift in edit.shifts],
            "strength": strengths_used(edit) if edit.writers else None,
            "tied": tied_fate(handle, edit, settings.keep_tied),
            "weights_hold_it": holding.weights,
            "switch": holding.switch,
        },
        "settings": settings.model_dump(),
        "prompts": {
            "target": side_facts(sides.target),
            "baseline": side_facts(sides.baseline),
            "filter": None,
            "validation": {"original": before.to_json("refused")},
            "notes": list(sides.notes),
        },
        "environment": environment(handle),
        "original": original.to_json(),
        "edited": edited.to_json(),
        "candidates": [c.to_json() for c in choice.candidates],
        "frontier": [{**p.to_json(), "chosen": p.edit is edit} for p in choice.frontier],
        "timings_s": {},
    }


def _with_provenance(recipe: Recipe, document: dict[str, Any]) -> Recipe:
    provenance: dict[str, Any] = {
        "found_at": document["recipe"]["direction"],
        "prompts": shared_prompts(document["prompts"]),
        "settings": shared_settings(document["settings"]),
        **{key: document[key] for key in ("behaviour", "kept", "environment", "original", "edited") if key in document},
    }
    model = recipe.model | config_file(document["model"]["source"])
    return Recipe(recipe.edit, model, provenance, recipe.tensors)
