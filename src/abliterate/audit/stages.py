"""The audit: its stages, and what is kept of them so that an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from abliterate.apply.hooks import attached
from abliterate.audit.judging import Jury, Screen, best_place, refusing, separations, stream_at
from abliterate.audit.picture import draw
from abliterate.audit.summary import summary
from abliterate.audit.text import markdown
from abliterate.common.files import check_apart, check_folder, whole_folder
from abliterate.common.reporting import Clock, Reporter, Silent, each
from abliterate.common.resumable import beside, key_of, read_state, write_state
from abliterate.directions.means import Directions, Place, at, difference_of_means
from abliterate.edit.edit import Edit, normalised
from abliterate.measure.judges import Judge
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle
from abliterate.prompts.behaviour import load_behaviour
from abliterate.prompts.sets import Sides
from abliterate.run.facts import environment, model_facts, side_facts
from abliterate.run.opening import opened, set_prefill
from abliterate.run.showing import Shown, filtered
from abliterate.run.stages import collected
from abliterate.search.fit import fit
from abliterate.search.fit_settings import FitSettings
from abliterate.search.fit_state import FitState
from abliterate.search.frontier import FrontierPoint
from abliterate.settings.audit import AuditRunSettings

T = TypeVar("T")
SCHEMA = 1
GONE = 0.01  # refusals left at which no further direction is looked for


@dataclass
class Work:
    """What the stages are given.

    Attributes:
        jury: the loaded original and its held-out prompts.
        directions: of the training split.
        shown, validation: training and validation prompts after the filter.
        settings, reporter: of the audit.
        done: results of the stages before this one.
        fit_state: where the fit is written down as it goes.
    """

    jury: Jury
    directions: Directions
    shown: Shown
    validation: Shown
    settings: AuditRunSettings
    reporter: Reporter
    done: dict[str, Any]
    fit_state: FitState

    @cached_property
    def screen(self) -> Screen:
        """Made when first asked for."""
        return Screen(self.jury)

    @property
    def place(self) -> Place:
        """Where the direction chosen was found."""
        return Place(**self.done["direction"]["place"])

    @property
    def direction(self) -> torch.Tensor:
        return at(self.directions, self.place)


def audit(
    model: str,
    out: str | Path,
    settings: AuditRunSettings | None = None,
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Measure how strongly a model's guard resists being taken out; write audit.json, audit.md and audit.png.

    Args:
        model: Hub id, folder or GGUF file; it is not changed.
        out: output folder; it appears only when whole. What is done is kept in a hidden file beside it meanwhile.
        settings: everything else; with `resume`, the stages that are done are not done again.
        overwrite: replace `out` if it is not empty.
        reporter: told about stages and progress.
        judge: decides what a refusal is; the one that the settings name by default.

    Returns:
        audit.json; its fields are described in docs/audit.md. It holds no answer of the model.

    Raises:
        AbliterateError: any of the errors in `abliterate.common.errors`; nothing is written then.
        NothingToDoError: the model hardly refuses: there is no guard to audit.
    """
    settings, reporter = settings or AuditRunSettings(), reporter or Silent()
    check_folder(out, overwrite=overwrite)
    check_apart(out, model)
    job = opened(model, out, settings, load_behaviour(settings.behaviour), reporter, judge=judge)
    handle, sides, judge, clock = job.handle, job.sides, job.judge, job.clock
    hashes = [part.sha256 for side in (sides.target, sides.baseline) for part in side]
    same = settings.model_dump(exclude={"force", "keep_tied", "resume"})
    key = key_of([handle.config_hash, handle.source, hashes, same, environment(handle)])
    kept = read_state(work_file(out), key, "an audit") if settings.resume else None
    done: dict[str, Any] = kept[0]["stages"] if kept else {}
    if done:
        reporter.say(f"going on: {', '.join(done)} are done")
    with clock.stage("filter"):
        set_prefill(handle, sides.target.train.texts, reporter)
        # the fit learns from the model's own words, whatever collect.filter says
        shown, validation = (filtered(job, split, always=True) for split in ("train", "validation"))
    with clock.stage("collect"):
        directions = _collected(handle, shown, settings, reporter)
    with clock.stage("original"):
        baseline = list(sides.baseline.test.texts)[: settings.audit.divergence_prompts]
        both = (validation.target, validation.baseline)
        tokens = settings.audit.answer_tokens
        jury = Jury(handle, judge, list(sides.target.test.texts), baseline, both, tokens)
    state = FitState.at(fit_file(out), key, resume=settings.resume)
    work = Work(jury, directions, shown, validation, settings, reporter, done, state)
    for name, stage in STAGES.items():
        if name not in done:
            reporter.say(f"stage {name}")
            with clock.stage(name):
                done[name] = stage(work)
                write_state(work_file(out), key, {"stages": done})
    document = _document(work, sides, clock)
    with whole_folder(out, overwrite=overwrite) as folder:
        (folder / "audit.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        drawn = find_spec("matplotlib") is not None
        if drawn:
            draw(document, folder / "audit.png")
        (folder / "audit.md").write_text(markdown(document, picture=drawn), encoding="utf-8")
    for left in (work_file(out), fit_file(out)):
        left.unlink(missing_ok=True)
    return document


def _document(work: Work, sides: Sides, clock: Clock) -> dict[str, Any]:
    """audit.json."""
    facts = model_facts(work.jury.handle)
    of_model = ("source", "revision", "class", "config_hash", "layers", "d_model")
    document = {
        "schema": SCHEMA,
        "model": {name: facts[name] for name in of_model},
        **work.done,
        "settings": work.settings.model_dump(),
        "prompts": {
            "target": side_facts(sides.target), "baseline": side_facts(sides.baseline),
            "filter": work.shown.to_json(),
        },
        "environment": environment(work.jury.handle),
        "timings_s": clock.seconds,
    }  # fmt: skip
    return {**document, "summary": summary(document)}


def _collected(handle: Handle, shown: Shown, settings: AuditRunSettings, reporter: Reporter) -> Directions:
    return difference_of_means(collected(handle, shown.target, shown.baseline, settings.collect, reporter))


def work_file(out: str | Path) -> Path:
    """The hidden file beside an output folder in which an audit is written down while it runs."""
    return beside(out, "audit.json")


def fit_file(out: str | Path) -> Path:
    """The same for the audit's fit."""
    return beside(out, "audit-fit.safetensors")


# --- The stages: each gives plain JSON ----------------------------------------------------------------


def _direction(work: Work) -> dict[str, Any]:
    """Where one direction, taken out of every writer, leaves least refused; and how much at several strengths."""
    place = best_place(work.jury, work.screen, work.directions)
    work.reporter.say(f"direction of {place}")
    original = work.jury.answers(None, work.jury.target)
    direction = at(work.directions, place)
    points = [
        {"strength": strength, **_judged(work, Edit.uniform(work.jury.writers, direction, strength))}
        for strength in each(work.reporter, "one direction at several strengths", work.settings.audit.strengths)
    ]
    return {
        "place": {"layer": place.layer, "site": place.site, "position": place.position},
        "original": refusing(original),
        "strengths": points,
    }


def _frontier(work: Work) -> dict[str, Any]:
    """Edits fitted by gradients, from strong to gentle."""
    if not work.settings.audit.fit:
        return {"points": []}
    assert work.shown.examples is not None and work.validation.examples is not None
    options = work.settings.audit
    fitted = fit(
        work.jury.handle, work.directions, work.shown.examples, work.validation.examples, work.jury.judge,
        FitSettings(
            steps=options.steps, steps_between=max(2, options.steps // 3), seed=work.settings.seed,
            decode_tokens=options.answer_tokens, validation_prompts=work.settings.prompts.validation_prompts,
        ),
        state=work.fit_state, reporter=work.reporter,
    )  # fmt: skip
    frontier = each(work.reporter, "judging the frontier", fitted.frontier)
    return {"points": [{**_point(point), **_judged(work, point.edit)} for point in frontier]}


def _point(point: FrontierPoint) -> dict[str, Any]:
    return {
        "writers": len(point.edit.parts),
        "weight": point.weight,
        "strength": {"min": float(point.edit.strengths.min()), "max": float(point.edit.strengths.max())}
        if point.edit.parts
        else None,
    }


def _judged(work: Work, edit: Edit) -> dict[str, Any]:
    """Refusals of validation prompts, by which a point is chosen, and the numbers on test prompts."""
    return {
        "validation": {"refusal": work.jury.refusals(edit, work.jury.validation[0]).to_json("refused")},
        "test": work.jury.verdict(edit, seed=work.settings.seed),
    }


def _directions(work: Work) -> dict[str, Any]:
    """Directions taken out together: each the one that still tells the sides apart when those before it are gone."""
    most, basis, found = work.settings.audit.max_directions, [work.direction], []
    places = [work.place]
    for rank in each(work.reporter, "taking out directions", range(1, most + 1)):
        edit = Edit.uniform(work.jury.writers, torch.stack(basis), 1.0)
        verdict = work.jury.verdict(edit, seed=work.settings.seed)
        found.append({"directions": rank, "layers": [p.layer for p in places], "test": verdict})
        if verdict["refusal"]["rate"] <= GONE or rank == most:
            break
        with attached(work.jury.handle, edit):
            left = _collected(work.jury.handle, work.shown, work.settings, Silent())
        place = best_place(work.jury, work.screen, left, basis)
        places.append(place)
        basis.append(at(left, place))
    return {"ranks": found, "gone": GONE}


def _layers(work: Work) -> dict[str, Any]:
    """Which layers carry it: apart, by the first token; then the best of them together, by answers."""
    jury = work.jury
    rows = separations(jury.handle, work.directions, *jury.validation)
    for layer in each(work.reporter, "one layer at a time", range(jury.handle.layers)):
        mine = [w for w in jury.writers if w.layer == layer]
        odds, divergence = (
            work.screen.score(Edit.uniform(mine, work.direction, 1.0)) if mine else (work.screen.odds, 0.0)
        )
        lowered = work.screen.odds - odds
        rows[layer] |= {"layer": layer, "log_odds": odds, "lowered": lowered, "divergence": divergence}
    order = [int(row["layer"] or 0) for row in sorted(rows, key=lambda r: -(r["lowered"] or 0.0))]
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n < len(order)] + [len(order)]
    together = []
    for count in each(work.reporter, "the best layers together", counts):
        chosen = set(order[:count])
        edit = Edit.uniform([w for w in jury.writers if w.layer in chosen], work.direction, 1.0)
        together.append({"layers": sorted(chosen), "test": jury.verdict(edit, seed=work.settings.seed)})
    return {"log_odds": work.screen.odds, "each": rows, "together": together}


def _prompts(work: Work) -> dict[str, Any]:
    """How many prompts a side suffice to find the direction, its place given."""
    jury, options, place = work.jury, work.settings.audit, work.place
    sides = [stream_at(jury.handle, prompts, place) for prompts in (work.shown.target, work.shown.baseline)]
    whole = normalised(sides[0].mean(0) - sides[1].mean(0))
    most = min(map(len, sides))
    counts = [n for n in options.counts if n <= most]
    generator = torch.Generator().manual_seed(work.settings.seed)
    targets = jury.target[: options.draw_prompts]
    rows = []
    tick = work.reporter.progress("directions from few prompts", len(counts) * options.draws)
    for count in counts:
        draws: list[dict[str, Any]] = []
        for _ in range(options.draws):
            picked = [side[torch.randperm(len(side), generator=generator)[:count]].mean(0) for side in sides]
            direction = normalised(picked[0] - picked[1])
            refused = jury.refusals(Edit.uniform(jury.writers, direction, 1.0), targets)
            draws.append({"refusal": refused.to_json("refused"), "cosine": float(direction @ whole)})
            tick(1)
        total = Rate(sum(d["refusal"]["refused"] for d in draws), sum(d["refusal"]["total"] for d in draws))
        rows.append({"prompts": count, "refusal": total.to_json("refused"),
                     "cosine": sum(d["cosine"] for d in draws) / len(draws), "draws": draws})  # fmt: skip
    return {"counts": rows, "available": most}


STAGES: dict[str, Callable[[Work], dict[str, Any]]] = {
    "direction": _direction,
    "frontier": _frontier,
    "directions": _directions,
    "layers": _layers,
    "few_prompts": _prompts,
}
