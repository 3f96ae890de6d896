"""The stages that several jobs share: filtering prompts, collecting activations, measuring a model."""

from __future__ import annotations

from dataclasses import replace

from abliterate.common.errors import AbliterateError, NothingToDoError, PromptError
from abliterate.common.reporting import Reporter, Tick
from abliterate.directions.activations import Activations, collect
from abliterate.measure import Measurement, measure
from abliterate.measure.judges import Judge
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle
from abliterate.prompts.behaviour import load_behaviour
from abliterate.prompts.sets import Sides
from abliterate.run.showing import FILTER_TOKENS, Shown, showing
from abliterate.settings.run import RunSettings

LEAST_PROMPTS = 8
LEAST_REFUSAL_RATE = 0.15


def filtered(
    handle: Handle, sides: Sides, split: str, judge: Judge, settings: RunSettings, reporter: Reporter
) -> Shown:
    """One split's prompts after the filter.

    Raises:
        NothingToDoError, PromptError: as `enough`.
    """
    target, baseline = (list(getattr(side, split).texts) for side in (sides.target, sides.baseline))
    if not settings.collect.filter:
        if settings.search.method == "fit":  # it needs the model's own words all the same
            shown = showing(handle, target, baseline, judge, reporter, tokens=_filter_tokens(settings))
            return replace(shown, target=target, baseline=baseline)
        return Shown(target, baseline, Rate(len(target), len(target)), Rate(len(baseline), len(baseline)))
    shown = showing(handle, target, baseline, judge, reporter, tokens=_filter_tokens(settings))
    word = load_behaviour(settings.behaviour).words.shows
    answered = "answered" if word == "refused" else f"not {word}"
    reporter.say(
        f"{split}: {shown.refused.count} of {shown.refused.total} target prompts {word} and "
        f"{shown.answered.count} of {shown.answered.total} baseline prompts {answered}; these count"
    )
    return enough(handle, shown, target, baseline, settings, reporter, split)


def _filter_tokens(settings: RunSettings) -> int:
    """How long the filter's answers are: a style needs more of them to show than a refusal."""
    is_style = load_behaviour(settings.behaviour).is_style
    return settings.measure.max_new_tokens if is_style else FILTER_TOKENS


def enough(
    handle: Handle, shown: Shown, target: list[str], baseline: list[str], settings: RunSettings,
    reporter: Reporter, split: str,
) -> Shown:  # fmt: skip
    """What the filter left, if it is enough to go on with; else, with --force, all prompts.

    Args:
        shown: from `showing`.
        target, baseline: all prompts of the split.
        split: its name.

    Raises:
        NothingToDoError: the model hardly shows the behaviour, and `settings.force` is off.
        PromptError: it shows it on nearly all baseline prompts too.
    """
    few = shown.refused.rate < LEAST_REFUSAL_RATE or len(shown.target) < min(LEAST_PROMPTS, len(target))
    if few and not settings.force:
        low, high = shown.refused.ci95
        word = load_behaviour(settings.behaviour).words.shows
        does = "hardly refuses" if word == "refused" else f"is hardly {word}"
        raise NothingToDoError(
            f"{handle.source} {does}: {shown.refused.count} of {shown.refused.total} target prompts "
            f"({shown.refused.rate:.0%}, 95% interval {low:.0%} to {high:.0%}) in the {split} split; there is nothing "
            "to remove. Pass --force to go on with all prompts"
        )
    if few:
        reporter.say("too few prompts left by the filter; --force: all of them count")
        shown = replace(shown, target=target)
    if len(shown.baseline) < min(LEAST_PROMPTS, len(baseline)):
        if not settings.force:
            raise PromptError(
                f"{handle.source} answers only {len(shown.baseline)} of {shown.answered.total} baseline prompts in the "
                f"{split} split; at least {LEAST_PROMPTS} are needed. Give others with --baseline, or pass --force"
            )
        shown = replace(shown, baseline=baseline)
    return shown


def collected(
    handle: Handle, shown: Shown, settings: RunSettings, reporter: Reporter, *, keep_vectors: bool = False
) -> Activations:
    """Collect as the settings say."""
    tick = reporter.progress("collecting activations", len(shown.target) + len(shown.baseline))
    return collect(
        handle,
        shown.target,
        shown.baseline,
        positions=settings.collect.positions,
        batch_size=settings.collect.batch_size,
        winsorise=settings.collect.winsorise,
        keep_vectors=keep_vectors,
        tick=tick,
    )


def measured(
    handle: Handle, sides: Sides, judge: Judge, settings: RunSettings, reporter: Reporter, name: str,
    original: Measurement | None = None,
) -> Measurement:  # fmt: skip
    """Measure a model on the test split as the settings say; `name` tells its progress from others'."""

    def progress(stage: str, total: int) -> Tick:
        return reporter.progress(f"{name}: {stage}", total)

    return measure(
        handle,
        sides.target.test.texts,
        sides.baseline.test.texts,
        original=original,
        judge=judge,
        progress=progress,
        **decoding(settings),
    )


def decoding(settings: RunSettings) -> dict[str, int]:
    """How answers are decoded to be measured, as arguments of `judged` and its kin."""
    return {"max_new_tokens": settings.measure.max_new_tokens, "batch_size": settings.measure.batch_size}


def check_same_tokens(handle: Handle, sides: Sides, before: Measurement, model: str, original: str | None) -> None:
    """Raise AbliterateError when models read the prompts as different tokens: no divergence is defined between them."""
    rows = before.reference.rows if before.reference else []
    starts = {tuple(ids) for ids in handle.prompt_ids(sides.baseline.test.texts)}
    lengths = {len(ids) for ids in starts}
    if not all(any(tuple(row[:n]) in starts for n in lengths) for row in rows):
        raise AbliterateError(
            f"{model} reads the prompts as other tokens than {original}, so there is no divergence between them; "
            "leave --original out, or measure with the same tokenizer and chat template"
        )
