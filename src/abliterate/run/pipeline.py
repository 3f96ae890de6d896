"""The main job: find the direction, choose it by measurement, change the model, prove the result, write it down.

One skeleton, `_carried_out`, and a strategy for each kind of run: `refusing`, `styling`, `inducing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from abliterate.apply.proof import Proof, check_proof
from abliterate.cards.card import model_card
from abliterate.cards.tables import results
from abliterate.common.errors import AbliterateError
from abliterate.common.files import check_apart, check_folder, whole_folder, writes
from abliterate.common.reporting import Clock, Reporter, default_reporter
from abliterate.directions.activations_file import save_activations
from abliterate.directions.contrast import collect_contrast, contrast
from abliterate.directions.keep import Keep, Kept, check_keep, keeping, read_keep
from abliterate.directions.means import Directions, difference_of_means
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe, save_recipe
from abliterate.measure import Measurement
from abliterate.measure.document import RunDocument
from abliterate.measure.judges import Judge
from abliterate.measure.verdicts import Panel
from abliterate.models.handle import reasoning_open
from abliterate.models.writers import find_writers
from abliterate.prompts.behaviour import Behaviour, load_behaviour
from abliterate.report import write_html
from abliterate.run.beside import say_beside
from abliterate.run.facts import (
    SCHEMA,
    chat_facts,
    environment,
    model_facts,
    provenance,
    recipe_of,
    side_facts,
    strengths_used,
    tied_fate,
)
from abliterate.run.inducing import Inducing
from abliterate.run.opening import (
    Job,
    opened,
    resolve_behaviour,
    set_prefill,
)
from abliterate.run.refusing import Refusing
from abliterate.run.removing import Removal, proofs
from abliterate.run.saving import Held, check_savable, held, in_force, save_edited
from abliterate.run.searching import forget
from abliterate.run.showing import filtered
from abliterate.run.stages import collected, decoding, measured, relevant
from abliterate.run.strategy import Strategy
from abliterate.run.styling import Styling
from abliterate.search.frontier import FrontierPoint
from abliterate.search.sweep import Choice, Choose, Show
from abliterate.settings.run import RunSettings


@dataclass(repr=False)
class Result:
    """What a run did; `document` is results.json. A notebook shows it as its closing table."""

    out: Path
    edit: Edit
    original: Measurement
    edited: Measurement
    document: dict[str, Any]

    def __repr__(self) -> str:
        return "\n".join([f"{self.out}:", "", *results(RunDocument.model_validate(self.document)).markdown()])

    def _repr_markdown_(self) -> str:
        return repr(self)

    def report(self) -> Page:
        """The report, for a notebook to show in place."""
        return Page((self.out / "report.html").read_text(encoding="utf-8"))


class Page:
    """A page that a notebook shows in a frame."""

    def __init__(self, page: str) -> None:
        self.page = page

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.page)}" width="100%" height="800" style="border: 0"></iframe>'


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
    """Find, choose, change and prove; write recipe.safetensors, results.json, model/ and the report into `out`.

    There is no model/ where the edit of a style shifts a block whose class has no bias for it (it is then measured
    live, and the log says so).

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
        NothingToDoError: the model hardly shows what is to be removed (refuses), or shows already what is to be
            added, and `settings.force` is off.
    """
    settings, reporter = settings or RunSettings(), reporter or default_reporter()
    settings, behaviour = resolve_behaviour(settings, reporter)
    if settings.load.tensor_parallel and settings.search.method == "tpe":
        raise AbliterateError("--method tpe would ask its study in every process of --tensor-parallel; take another")
    strategy: Strategy = Refusing(activations, choose, show)
    if behaviour.runs_as_style:
        if activations is not None or show_completions or (choose is not None and settings.search.interactive):
            raise AbliterateError(
                f"behaviour {behaviour.name} has a search of its own; leave --activations, --interactive and "
                "--show-completions out"
            )
        strategy = Styling()
    return _carried_out(
        strategy, model, out, settings, behaviour, reporter, overwrite=overwrite, show_completions=show_completions
    )


def run_induce(
    model: str,
    out: str | Path,
    settings: RunSettings | None = None,
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Result:
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
    refusal, settings, reporter = load_behaviour("refusal"), settings or RunSettings(), reporter or default_reporter()
    return _carried_out(Inducing(), model, out, settings, refusal, reporter, overwrite=overwrite)


def _carried_out(
    strategy: Strategy, model: str, out: str | Path, settings: RunSettings, behaviour: Behaviour, reporter: Reporter,
    *, overwrite: bool, show_completions: bool = False,
) -> Result:  # fmt: skip
    check_folder(out, overwrite=overwrite)
    check_apart(out, model, strategy.activations)
    strategy.check()  # before any work; once more below, against the model
    keep = read_keep(settings.keep, settings.seed) if settings.keep and strategy.takes_out else None
    job = opened(model, out, settings, behaviour, reporter)
    handle, clock, sides = job.handle, job.clock, job.sides
    check_savable(handle, out, keep_tied=settings.keep_tied)
    strategy.check(handle)
    if keep is not None:
        check_keep(handle, keep)
    proof = _proved(job) if strategy.takes_out else None
    choice, directions, kept = _searched(strategy, job, keep)
    edit, judge = choice.edit, strategy.judge(job.judge)
    gathered = strategy.gathered(job, choice, directions)
    with clock.stage("measure original"):
        original = _measured(job, strategy, judge, "original")
        if kept is not None:
            kept.watch(handle, judge, **decoding(settings))
    # all that is said of the model is taken before the edit changes it
    holding = held(handle, edit)
    document = _document(strategy, job, choice, holding)
    points = choice.frontier if strategy.keeps_frontier else []
    removal = Removal(handle, edit) if len(edit.directions) else None
    recipes = [recipe_of(handle, one) for one in (edit, *(point.edit for point in points))]
    with whole_folder(out, overwrite=overwrite) as folder:
        with clock.stage("edit"):
            live = in_force(handle, edit, keep_tied=settings.keep_tied)
        with live:
            removed = removal.check(handle) if removal else []
            with clock.stage("measure edited"):
                edited = _measured(job, strategy, judge, "edited", original)
                kept_found = kept.to_json(handle, edit, judge, **decoding(settings)) if kept else None
            if gathered is not None:
                gathered.look_at_edited(handle)
        with clock.stage("measure edited"):  # by the original, where the edit was attached and is gone
            _weighed(job, edited, original)
        with clock.stage("save"):
            document |= {"original": strategy.numbers(original), "edited": strategy.numbers(edited)} | (
                job.beside.to_json(original=original, edited=edited)
            )
            if proof is not None:
                document["recipe"] |= {"proof": proofs(proof, removed), "removed": removed}
            document |= {"kept": kept_found} if kept_found else {}
            document["frontier"] = _save_recipes(recipes, choice, document, strategy.found, folder, clock)
            if holding.weights and writes():
                card = model_card(RunDocument.model_validate(document))
                save_edited(handle, recipes[0], folder / "model", card, reporter, keep_tied=settings.keep_tied)
        document["timings_s"] = clock.seconds
        typed = RunDocument.model_validate(document)
        typed.save(folder / "results.json")
        say_beside(typed, reporter)
        if gathered is not None:
            gathered.compare(sides, original, edited, show_completions=show_completions)
            gathered.save(folder)
    if writes():
        forget(out)
        write_html(out, show_completions=show_completions)  # all is in place: what goes wrong here can't lose it
    return Result(Path(out), edit, original, edited, typed.to_json())


def _measured(
    job: Job, strategy: Strategy, judge: Judge, state: str, original: Measurement | None = None
) -> Measurement:
    """A model on the test split, and on what is measured besides."""
    handle, first = job.handle, original is None
    with reasoning_open(handle, job.settings.beside.think):
        found = measured(
            handle, job.sides, judge, job.settings, job.reporter, state, original, second=job.second, relevance=first
        )
        if strategy.looks_beside:
            job.beside.look(handle, judge, job.reporter, state, job.second)
            if first:
                job.beside.weigh(handle, state, found.floor)
    return found


def _weighed(job: Job, edited: Measurement, original: Measurement) -> None:
    """Take the edited model's answers that say nothing about their prompts for evasions."""
    with reasoning_open(job.handle, job.settings.beside.think):
        relevant(job.handle, edited, job.sides, job.reporter, "edited", original)
        job.beside.weigh(job.handle, "edited", original.floor)


def _proved(job: Job) -> Proof:
    with job.clock.stage("prove"):
        proof = check_proof(job.handle)
    found = len(find_writers(job.handle))
    what = "sites of the stream" if job.handle.at_stream else "writers"
    job.reporter.say(f"{found} {what} found; proof: largest component left {proof.component:.1e}")
    return proof


def _searched(strategy: Strategy, job: Job, keep: Keep | None) -> tuple[Choice, Directions, Kept | None]:
    """See which prompts count, collect, and choose an edit: the choice, the directions, and what must not change."""
    clock, baseline, kept = job.clock, job.sides.baseline.train.texts, None
    with clock.stage("filter"):
        set_prefill(job.handle, job.sides.target.train.texts, job.reporter)
        strategy.filter(job)
    with clock.stage("collect"):
        activations = strategy.collect(job)
    directions = difference_of_means(activations, projected=job.settings.collect.projected)
    if strategy.takes_out:
        with clock.stage("keep"):
            contrasted = strategy.shown.baseline if strategy.shown else list(baseline)
            directions, kept = keeping(job.handle, keep, directions, contrasted, job.reporter)
    with clock.stage("search"):
        return strategy.search(job, directions, kept), directions, kept


def _document(strategy: Strategy, job: Job, choice: Choice, holding: Held) -> dict[str, Any]:
    """results.json without the numbers measured; says whether the weights hold an edit that may shift."""
    handle, edit, settings, sides = job.handle, choice.edit, job.settings, job.sides
    shifts: dict[str, Any] = {}
    if strategy.may_shift or not holding.weights:
        job.reporter.say(holding.said)
    if strategy.may_shift:
        shifts["shifts"] = [{"layer": shift.layer, "size": shift.size} for shift in edit.shifts]
        shifts |= {"weights_hold_it": holding.weights, "switch": holding.switch}
    return {
        "schema": SCHEMA,
        "model": model_facts(handle),
        "recipe": {
            "file": "recipe.safetensors",
            "method": strategy.method or settings.search.method,
            "direction": choice.winner.to_json(),
            "writers": len(edit.writers),
            "strength": strengths_used(edit),
            "tied": tied_fate(handle, edit, settings.keep_tied),
            **shifts,
        },
        "settings": settings.model_dump(),
        "prompts": {
            "target": side_facts(sides.target),
            "baseline": side_facts(sides.baseline),
            "notes": list(sides.notes),
            **chat_facts(handle),
            **strategy.prompt_facts(),
            **(job.judge.facts() if isinstance(job.judge, Panel) else {}),
        },
        "environment": environment(handle),
        "candidates": [c.to_json() for c in choice.candidates],
        **strategy.facts(job),
    }


def _save_recipes(
    recipes: list[Recipe], choice: Choice, document: dict[str, Any], found: Callable[[dict[str, Any]], dict[str, Any]],
    folder: Path, clock: Clock,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the edit's recipe, then one for each point of the frontier with what validation found; lists the points."""
    source = provenance(document, found(document["recipe"]["direction"]))
    save_recipe(replace(recipes[0], provenance=source), folder / "recipe.safetensors")
    listed = [{**point.to_json(), "chosen": point.edit is choice.edit} for point in choice.frontier]
    kept = {name: value for name, value in source.items() if name not in ("original", "edited")}
    for number, recipe in enumerate(recipes[1:]):
        name, point = f"frontier/{number:02}.safetensors", choice.frontier[number]
        save_recipe(replace(recipe, provenance={**kept, "validation": point.to_json()}), folder / name)
        listed[number] |= {**_when(point, clock), "recipe": name}
    return listed


def _when(point: FrontierPoint, clock: Clock) -> dict[str, float]:
    """How long after the run's start a point was there, and the process's CPU seconds until then."""
    if point.found is None:
        return {}
    return {"seconds": round(point.found.clock - clock.started, 1), "cpu_seconds": round(point.found.cpu, 1)}


def collect_to_file(
    model: str,
    out: str | Path,
    settings: RunSettings,
    *,
    keep_vectors: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Collect on the training split and save to a file; returns counts and shape."""
    reporter = reporter or default_reporter()
    settings, behaviour = resolve_behaviour(settings, reporter)
    job = opened(model, out, settings, behaviour, reporter)
    handle, sides = job.handle, job.sides
    set_prefill(handle, sides.target.train.texts, reporter)
    if behaviour.kind == "prompts":
        shown = filtered(job, "train")
        found = collected(handle, shown.target, shown.baseline, settings.collect, reporter, keep_vectors=keep_vectors)
    else:
        filter = settings.collect.filter
        rows = contrast(handle, behaviour, sides.target.train.texts, job.judge, filter=filter, reporter=reporter)
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
