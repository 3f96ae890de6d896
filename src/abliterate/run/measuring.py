"""`abliterate measure`: one model, or two and how far they are apart."""

from __future__ import annotations

import contextlib
from typing import Any

from abliterate.apply.hooks import attached
from abliterate.common.reporting import Clock, Reporter, Silent
from abliterate.edit.recipe import Recipe, check_model
from abliterate.measure import Measurement
from abliterate.measure.document import RunDocument
from abliterate.models.folders import check_here
from abliterate.models.handle import Handle, reasoning_open
from abliterate.run.beside import Beside, say_beside
from abliterate.run.facts import SCHEMA, chat_facts, environment, side_facts
from abliterate.run.opening import (
    check_lengths,
    judges,
    open_model,
    open_pool,
    open_prompts,
    resolve_behaviour,
    say_judges,
    second_judge,
    set_prefill,
)  # fmt: skip
from abliterate.run.stages import check_same_tokens, measured
from abliterate.settings.run import RunSettings


def measure_models(
    model: str, original: str | None, settings: RunSettings, *, recipe: Recipe | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a model, and its divergence from an original when one is named; one is loaded at a time.

    A recipe is attached live to the model, not to the original.

    Raises:
        AbliterateError: any of those of loading and decoding, or when the recipe is for another model.
    """
    reporter, clock = reporter or Silent(), Clock()
    settings, behaviour = resolve_behaviour(settings)
    for named in filter(None, (model, original)):
        check_here(named)
    pool = open_pool(settings)
    sides = open_prompts(settings.prompts, settings.seed, behaviour)
    for note in sides.notes:
        reporter.say(note)
    judge, second = judges(settings, behaviour), second_judge(settings, behaviour)
    say_judges(settings, judge, second, reporter)
    beside = Beside(sides, behaviour, settings)
    before: Measurement | None = None
    handle: Handle | None = None
    document: dict[str, Any] = {"schema": SCHEMA, "original": None, "edited": None}
    measurements: dict[str, Measurement] = {}
    for name, source in (("original", original), ("edited", model)):
        if source is None:
            continue
        label = name if original else "model"
        reporter.say(f"loading {source}")
        handle = None  # let go of the one before
        with clock.stage(f"load {label}"):
            handle = open_model(source, settings.load, pool)
        check_lengths(handle, sides)
        beside.check_lengths(handle, reporter)
        if not settings.beside.think:
            set_prefill(handle, sides.target.test.texts, reporter)
        live: Any = contextlib.nullcontext()
        if recipe is not None and name == "edited":
            check_model(recipe, handle.config_hash)
            live = attached(handle, recipe.edit)
        with live, clock.stage(f"measure {label}"), reasoning_open(handle, settings.beside.think):
            if before is not None:
                check_same_tokens(handle, sides, before, source, original)
            found = measured(handle, sides, judge, settings, reporter, label, before, second=second)
            state = name if original else "original"
            beside.look(handle, judge, reporter, state, second)
            beside.weigh(handle, state, found.floor)
        measurements[state] = found
        before = found if name == "original" else before
        document[name] = found.to_json()
        document["model"] = {"source": handle.source, "config_hash": handle.config_hash, "revision": handle.revision}
    if original is None:
        document["original"], document["edited"] = document["edited"], None
    document |= beside.to_json(**measurements)
    document["settings"] = settings.model_dump()
    document["behaviour"] = behaviour.to_json()
    document["prompts"] = {"target": side_facts(sides.target), "baseline": side_facts(sides.baseline)}
    document["prompts"] |= chat_facts(handle) if handle else {}
    document["environment"] = environment()
    document["timings_s"] = clock.seconds
    say_beside(RunDocument.model_validate(document), reporter)
    return document
