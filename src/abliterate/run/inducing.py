"""`abliterate run --induce`: make a model refuse what it used to answer, prove it, and write it down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abliterate.cards.induced import induced_card
from abliterate.common.errors import AbliterateError
from abliterate.common.files import check_apart, check_folder, check_space, whole_folder
from abliterate.common.reporting import Clock, Reporter, Silent
from abliterate.directions.means import difference_of_means
from abliterate.edit.recipe import Recipe, config_file, recipe_for, save_recipe
from abliterate.measure import Measurement
from abliterate.measure.coherence import is_degenerate
from abliterate.measure.judges import Judge, make_judge
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle
from abliterate.run.facts import SCHEMA, environment, model_facts, shared_prompts, shared_settings, side_facts
from abliterate.run.opening import check_lengths, described, open_model, open_prompts, set_prefill
from abliterate.run.saving import Held, attach_or_bake, bytes_to_write, held, save_model, to_save
from abliterate.run.showing import Shown, showing
from abliterate.run.stages import collected, enough, measured
from abliterate.search.induce import InduceSettings, Inducing, induce
from abliterate.settings.run import RunSettings, layer_range


@dataclass
class InducedResult:
    """What such a run did; `document` is results.json."""

    out: Path
    inducing: Inducing
    original: Measurement
    edited: Measurement
    document: dict[str, Any]


def run_induce(
    model: str,
    out: str | Path,
    settings: RunSettings | None = None,
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> InducedResult:
    """Find a shift that makes the model refuse, choose it by measurement, apply it, prove it on held-out prompts.

    Writes recipe.safetensors, results.json and, where the weights of the model's class can hold a shift, model/ into
    `out`. Where they can't, the result is measured with the shift attached live, and the log says so.

    Args:
        model: Hub id, folder or GGUF file.
        out: output folder; it appears only when whole.
        settings: everything else; of the search's, `layers`.
        overwrite: replace `out` if it is not empty.
        reporter: told about stages and progress.

    Raises:
        AbliterateError: any of the errors in `abliterate.common.errors`; nothing is written then.
        NothingToDoError: the model hardly refuses its target prompts, so it has no refusal to copy.
    """
    settings, reporter, clock = settings or RunSettings(), reporter or Silent(), Clock()
    check_folder(out, overwrite=overwrite)
    check_apart(out, model)
    judge = make_judge(settings.measure.judge)
    with clock.stage("prompts"):
        sides = open_prompts(settings.prompts, settings.seed)
    for note in sides.notes:
        reporter.say(note)
    reporter.say(f"loading {model}")
    with clock.stage("load"):
        handle = open_model(model, settings.load)
    check_space(out, bytes_to_write(handle))
    reporter.say(described(handle))
    check_lengths(handle, sides)
    torch.manual_seed(settings.seed)
    with clock.stage("filter"):
        set_prefill(handle, sides.target.train.texts, reporter)
        shown = _with_examples(handle, sides, "train", judge, settings, reporter)
        validation = _with_examples(handle, sides, "validation", judge, settings, reporter)
    with clock.stage("collect"):
        activations = collected(handle, shown, settings, reporter)
    directions = difference_of_means(activations, projected=settings.collect.projected)
    assert shown.examples is not None
    with clock.stage("search"):
        named = settings.search.layers
        options = InduceSettings(layers=layer_range(named) if named else None, seed=settings.seed)
        found = induce(handle, directions, shown.examples, validation.baseline, judge, options,
                       reporter=reporter)  # fmt: skip
    patient = Patient(judge)
    with clock.stage("measure original"):
        original = measured(handle, sides, patient, settings, reporter, "original")
    recipe, facts = recipe_for(found.edit, handle), model_facts(handle)
    holding = held(handle, found.edit)
    reporter.say(holding.said)
    with whole_folder(out, overwrite=overwrite) as folder:
        if holding.weights:
            live: Any = attach_or_bake(handle, found.edit, settings, reporter)
        else:
            live = found.edit.attached(handle)
        with live, clock.stage("measure edited"):
            edited = measured(handle, sides, patient, settings, reporter, "edited", original)
        with clock.stage("save"):
            document = _document(handle, facts, settings, sides, shown, found, original, edited, holding)
            save_recipe(_with_provenance(recipe, document), folder / "recipe.safetensors")
            if holding.weights:
                save_model(to_save(handle, found.edit, settings), folder / "model")
                card = induced_card(handle, document)
                (folder / "model" / "README.md").write_text(card, encoding="utf-8")
        document["timings_s"] = clock.seconds
        (folder / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return InducedResult(Path(out), found, original, edited, document)


class Patient:
    """A judge that wants every answer to its end: where refusals are induced, whether they are sentences counts."""

    def __init__(self, judge: Judge) -> None:
        self.name, self._judge = judge.name, judge

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """As the judge within."""
        return self._judge.judge(prompts, answers)

    def settled(self, prompt: str, partial_answer: str) -> bool | None:
        """Never."""
        return None


def _with_examples(
    handle: Handle, sides: Any, split: str, judge: Judge, settings: RunSettings, reporter: Reporter
) -> Shown:
    """A split's prompts after the filter, with the model's own words; the filter is what finds these."""
    target, baseline = (list(getattr(side, split).texts) for side in (sides.target, sides.baseline))
    shown = showing(handle, target, baseline, judge, reporter)
    reporter.say(
        f"{split}: {shown.refused.count} of {shown.refused.total} target prompts refused and "
        f"{shown.answered.count} of {shown.answered.total} baseline prompts answered; these count"
    )
    if not shown.target and settings.force:
        raise AbliterateError(f"{handle.source} refuses none of the target prompts, so it has no refusal to copy")
    return enough(handle, shown, target, baseline, settings, reporter, split)


def _document(
    handle: Handle, facts: dict[str, Any], settings: RunSettings, sides: Any, shown: Shown, found: Inducing,
    original: Measurement, edited: Measurement, holding: Held,
) -> dict[str, Any]:  # fmt: skip
    (shift,) = found.edit.shifts
    return {
        "schema": SCHEMA,
        "model": facts,
        "recipe": {
            "file": "recipe.safetensors",
            "method": "induce",
            "direction": found.winner.to_json(),
            "writers": 0,
            "shifts": [{"layer": shift.layer, "size": shift.size}],
            "strength": None,
            "tied": None,
            "weights_hold_it": holding.weights,
            "switch": holding.switch,
        },
        "settings": settings.model_dump(),
        "prompts": {
            "target": side_facts(sides.target),
            "baseline": side_facts(sides.baseline),
            "filter": shown.to_json(),
            "notes": list(sides.notes),
        },
        "environment": environment(handle),
        "original": {**original.to_json(), "coherent_over_refusal": coherent(original).to_json("refused")},
        "edited": {**edited.to_json(), "coherent_over_refusal": coherent(edited).to_json("refused")},
        "candidates": [c.to_json() for c in found.candidates],
        "frontier": [],
        "timings_s": {},
    }


def coherent(measured: Measurement) -> Rate:
    """Baseline prompts refused in whole sentences; the answers must have been decoded to their end."""
    pairs = zip(measured.baseline_answers, measured.refused_baseline, strict=True)
    count = sum(refused and not is_degenerate(a.text, finished=a.finished) for a, refused in pairs)
    return Rate(count, len(measured.baseline_answers))


def _with_provenance(recipe: Recipe, document: dict[str, Any]) -> Recipe:
    found = {k: v for k, v in document["recipe"]["direction"].items() if k != "note"}
    provenance = {
        "induced": found,
        "prompts": shared_prompts(document["prompts"]),
        "settings": shared_settings(document["settings"]),
        "environment": document["environment"],
        "original": document["original"],
        "edited": document["edited"],
    }
    return Recipe(recipe.edit, recipe.model | config_file(document["model"]["source"]), provenance, recipe.tensors)
