"""The search stage of a run: one method or another chooses the edit, and writes down how far it came."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from abliterate.common.errors import AbliterateError, PromptError
from abliterate.common.resumable import beside, key_of
from abliterate.directions.keep import Kept, kept_reference
from abliterate.directions.means import Directions, Place
from abliterate.measure.divergence import Reference
from abliterate.measure.verdicts import not_answering
from abliterate.run.facts import environment
from abliterate.run.opening import Job
from abliterate.run.showing import Shown
from abliterate.search.article import article
from abliterate.search.fit import UNIT, fit
from abliterate.search.fit_settings import FitSettings
from abliterate.search.fit_state import FitState
from abliterate.search.frontier import FrontierPoint, choose
from abliterate.search.stand_ins import Staying
from abliterate.search.sweep import Candidate, Choice, Choose, Show, SweepSettings, sweep
from abliterate.settings.run import layer_range

FIT_FILE, STUDY_FILE = "fit.safetensors", "study.journal"  # hidden, beside the output while a search runs
KEPT_TOKENS = 8  # of the original's answers to kept prompts along which drifting counts


@dataclass(frozen=True)
class Work(Job):
    """What a search is given beside the job.

    Attributes:
        directions: of the training split.
        shown: the training prompts after the filter; None with activations from a file and a method that needs none.
        validation: the validation prompts after the filter.
        kept: what must not change; the directions are orthogonal to it already.
        choose, show: for the article's method, by hand.
    """

    directions: Directions
    shown: Shown | None
    validation: Shown
    kept: Kept | None = None
    choose: Choose | None = None
    show: Show | None = None

    @property
    def layers(self) -> range | None:
        """The layers that --layers names.

        Raises:
            PromptError: when the model has fewer.
        """
        named = self.settings.search.layers
        layers = layer_range(named) if named else None
        if layers is not None and layers.stop > self.handle.layers:
            raise PromptError(f"--layers {named}: {self.handle.source} has layers 0 to {self.handle.layers - 1}")
        return layers


def search(work: Work) -> Choice:
    """Choose an edit by the method the settings name."""
    return METHODS[work.settings.search.method](work)


def _article(work: Work) -> Choice:
    options = work.settings.search
    return article(
        work.handle,
        work.directions,
        work.sides.target.validation.texts,
        not_answering(work.judge),
        candidates=options.candidates,
        test_prompts=options.test_prompts,
        layers=work.layers,
        choose=work.choose if options.interactive else None,
        show=work.show,
        reporter=work.reporter,
    )


def _sweep(work: Work) -> Choice:
    return sweep(
        work.handle,
        work.directions,
        work.validation.target,
        work.validation.baseline,
        not_answering(work.judge),
        SweepSettings(layers=work.layers, max_refusal_rate=work.settings.search.max_refusal_rate),
        reporter=work.reporter,
    )


def _fit(work: Work) -> Choice:
    options, shown = work.settings.search, work.shown
    watched = _watched(work)
    assert shown is not None and shown.examples is not None and work.validation.examples is not None
    fitted = fit(
        work.handle,
        work.directions,
        shown.examples,
        work.validation.examples,
        work.judge,
        FitSettings(
            layers=work.layers,
            steps=options.steps,
            rank=options.rank,
            seed=work.settings.seed,
            max_refusal_rate=options.max_refusal_rate,
            max_divergence=options.max_divergence,
            free_divergence=options.free_divergence,
            validation_prompts=len(work.validation.examples.judged_on),
        ),
        also=[(1 / UNIT, Staying(watched, "kept"))] if watched else [],  # weighted as on baseline prompts
        kept=work.kept.span if work.kept else None,
        state=_fit_state(work),
        reporter=work.reporter,
    )
    return _choice(work, fitted.chosen, fitted.why, fitted.frontier)


def _tpe(work: Work) -> Choice:
    from abliterate.search.objectives import DivergenceFromOriginal, Refusals, original_reference
    from abliterate.search.tpe import TpeSettings, tpe

    options, kept = work.settings.search, beside(work.out, STUDY_FILE)
    if not (work.settings.resume or options.study):
        kept.unlink(missing_ok=True)
    refusals = Refusals(work.validation.target, not_answering(work.judge))
    divergence = DivergenceFromOriginal(original_reference(work.handle, work.validation.baseline))
    watched = _watched(work)
    frontier = tpe(
        work.handle,
        work.directions,
        refusals,
        divergence,
        TpeSettings(
            trials=options.trials,
            seed=work.settings.seed,
            study=options.study or str(kept),
            resume=work.settings.resume,
            layers=work.layers,
        ),
        objectives=[refusals, divergence, DivergenceFromOriginal(watched, "kept")] if watched else None,
        reporter=work.reporter,
    )
    chosen, why = choose(
        frontier, options.max_refusal_rate, options.max_divergence, free_divergence=options.free_divergence
    )
    work.reporter.say(f"chose {why}")
    return _choice(work, chosen, why, frontier)


def _choice(work: Work, chosen: FrontierPoint, why: str, frontier: list[FrontierPoint]) -> Choice:
    """A point of a frontier as a search's result, with the place where the two sides part best.

    Raises:
        AbliterateError: when the edit does nothing.
    """
    if not chosen.edit.writers:
        raise AbliterateError(
            f"--method {work.settings.search.method} left every writer alone: nothing it tried lowers refusing at a "
            "price worth paying; try --method sweep, a longer search, or other prompts"
        )
    separation = work.directions.separation[:, 0, -1].nan_to_num(-1.0)
    place = Place(int(separation.argmax()), "pre", -1)
    winner = Candidate(
        place,
        float(separation.max()),
        divergence=chosen.divergence,
        refusals=chosen.refused,
        stage="fitted",
        note=why,
    )
    return Choice(chosen.edit, winner, [winner], frontier)


def _watched(work: Work) -> Reference | None:
    """The original on kept prompts: drifting from it counts in a search."""
    return kept_reference(work.handle, work.kept.keep, KEPT_TOKENS) if work.kept else None


METHODS = {"fit": _fit, "sweep": _sweep, "article": _article, "tpe": _tpe}


def _fit_state(work: Work) -> FitState:
    """Where the fit is written down while it runs."""
    path, resume = beside(work.out, FIT_FILE), work.settings.resume
    hashes = [part.sha256 for side in (work.sides.target, work.sides.baseline) for part in side]
    if work.kept:
        hashes.append(work.kept.sha256)
    same = work.settings.model_dump(exclude={"force", "keep_tied", "resume", "beside"})
    key = key_of([work.handle.config_hash, work.handle.source, hashes, same, environment(work.handle)])
    if resume and not path.is_file():
        work.reporter.say("there is nothing to go on from; starting anew")
    elif path.is_file() and not resume:
        work.reporter.say("an earlier run was interrupted; starting anew (--resume goes on from where it was)")
    return FitState.at(path, key, resume=resume)


def forget(out: str | Path) -> None:
    """Remove what a search wrote down for going on: the output is whole."""
    beside(out, FIT_FILE).unlink(missing_ok=True)
    study = beside(out, STUDY_FILE)
    for left in study.parent.glob(f"{study.name}*"):  # the journal and its lock
        left.unlink(missing_ok=True)
