"""The filter: which prompts show the behaviour and which don't, with the model's own words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from abliterate.common.errors import NothingToDoError, PromptError
from abliterate.common.reporting import Reporter, Silent
from abliterate.measure import Judged, judged
from abliterate.measure.decode import Answer
from abliterate.measure.judges import Judge
from abliterate.measure.rates import Rate
from abliterate.measure.verdicts import Panel
from abliterate.models.handle import Handle
from abliterate.run.opening import Job
from abliterate.search.examples import Examples

FILTER_TOKENS = 32
LEAST_PROMPTS = 8
PARTLY = 0.8  # of target prompts refused; of a model that refuses fewer, a count on few prompts says too little
LEAST_REFUSAL_RATE = 0.15


@dataclass
class Shown:
    """Prompts that show the behaviour and prompts that don't, after the filter, with the counts behind it.

    `examples` has the prompts that were refused and answered, with the model's own words.
    """

    target: list[str]
    baseline: list[str]
    refused: Rate
    answered: Rate
    examples: Examples | None = None

    def to_json(self) -> dict[str, Any]:
        return {"refused": self.refused.to_json("refused"), "answered": self.answered.to_json("answered")}


def showing(
    handle: Handle,
    target: Sequence[str],
    baseline: Sequence[str],
    judge: Judge,
    reporter: Reporter | None = None,
    *,
    tokens: int = FILTER_TOKENS,
) -> Shown:
    """Keep the target prompts that the model refuses and the baseline prompts that it answers (the paper's filter).

    For another behaviour: those whose answers show it, and those whose answers don't, as its judge says. A panel learns
    the model's own refusal wordings from these answers, unless it knows some.
    """
    reporter = reporter or Silent()
    found: list[Judged] = []
    for name, prompts in (("target", target), ("baseline", baseline)):
        tick = reporter.progress(f"filtering {name} prompts", len(prompts))
        found.append(judged(handle, prompts, judge, max_new_tokens=tokens, tick=tick))
    if isinstance(judge, Panel) and not judge.learnt:
        told = judge.learn(*([a.text for a in side.answers] for side in found))
        reporter.say(told)
        found = [
            Judged(side.answers, judge.judge(prompts, [a.text for a in side.answers]))
            for prompts, side in zip((target, baseline), found, strict=True)
        ]
    sorted_out: list[dict[bool, tuple[list[str], list[Answer]]]] = []
    for prompts, side in zip((target, baseline), found, strict=True):
        verdicts = list(zip(prompts, *side, strict=True))
        sorted_out.append(
            {v: ([p for p, _, r in verdicts if r == v], [a for _, a, r in verdicts if r == v]) for v in (True, False)}
        )
    (shown, refusals), (answered, answers) = sorted_out[0][True], sorted_out[1][False]
    return Shown(
        shown,
        answered,
        Rate(len(shown), len(target)),
        Rate(len(answered), len(baseline)),
        Examples(shown, refusals, answered, answers, *sorted_out[1][True], asked=list(target)),
    )


def filtered(job: Job, split: str, *, always: bool = False, seen: Shown | None = None) -> Shown:
    """One split's prompts after the filter, or all of them where the settings turn it off.

    Args:
        job: as `opening.opened` gives it.
        split: "train", "validation" or "test".
        always: filter whatever the settings say.
        seen: what the filter left of the training split. Where the model refuses only some of its target prompts, all
            validation prompts that were loaded are used; else as many as the settings say.

    Raises:
        NothingToDoError: the model hardly shows the behaviour, and `settings.force` is off.
        PromptError: it shows it on nearly all baseline prompts too.
    """
    settings, behaviour = job.settings, job.behaviour
    target, baseline = (list(getattr(side, split).texts) for side in (job.sides.target, job.sides.baseline))
    if split == "validation":
        target, baseline = (_thinned(texts, settings.prompts.validation_prompts) for texts in (target, baseline))
        if seen is not None and seen.refused.rate < PARTLY:
            target = list(job.sides.target.validation.texts)
    filters = settings.collect.filter or always
    if not filters and settings.search.method != "fit":  # which needs the model's own words all the same
        return Shown(target, baseline, Rate(len(target), len(target)), Rate(len(baseline), len(baseline)))
    # a style needs longer answers to show than a refusal
    tokens = settings.measure.max_new_tokens if behaviour.is_style else FILTER_TOKENS
    shown = showing(job.handle, target, baseline, job.judge, job.reporter, tokens=tokens)
    if tokens < settings.measure.max_new_tokens and _few(shown, target) and behaviour.words.shows == "refused":
        job.reporter.say(f"hardly any target prompt is refused within {tokens} tokens; looking at whole answers")
        if isinstance(job.judge, Panel):
            job.judge.learnt = False  # what recurs at the end of answers may be learnt now
        shown = showing(
            job.handle, target, baseline, job.judge, job.reporter, tokens=settings.measure.max_new_tokens
        )  # fmt: skip
    if not filters:
        return replace(shown, target=target, baseline=baseline)
    word = behaviour.words.shows
    answered = "answered" if word == "refused" else f"not {word}"
    job.reporter.say(
        f"{split}: {shown.refused.count} of {shown.refused.total} target prompts {word} and "
        f"{shown.answered.count} of {shown.answered.total} baseline prompts {answered}; these count"
    )
    return _enough(job, shown, target, baseline, split)


def _thinned(texts: list[str], most: int) -> list[str]:
    """At most so many, from all over the list, which may be sorted by topic."""
    return texts if len(texts) <= most else [texts[i * len(texts) // most] for i in range(most)]


def _few(shown: Shown, target: list[str]) -> bool:
    return shown.refused.rate < LEAST_REFUSAL_RATE or len(shown.target) < min(LEAST_PROMPTS, len(target))


def _enough(job: Job, shown: Shown, target: list[str], baseline: list[str], split: str) -> Shown:
    """What the filter left, if it is enough to go on with; else, with --force, all prompts of the split."""
    source, force = job.handle.source, job.settings.force
    few = _few(shown, target)
    if few and not force:
        low, high = shown.refused.ci95
        word = job.behaviour.words.shows
        does = "hardly refuses" if word == "refused" else f"is hardly {word}"
        raise NothingToDoError(
            f"{source} {does}: {shown.refused.count} of {shown.refused.total} target prompts "
            f"({shown.refused.rate:.0%}, 95% interval {low:.0%} to {high:.0%}) in the {split} split; there is nothing "
            "to remove. Pass --force to go on with all prompts"
        )
    if few:
        job.reporter.say("too few prompts left by the filter; --force: all of them count")
        shown = replace(shown, target=target)
    if len(shown.baseline) < min(LEAST_PROMPTS, len(baseline)):
        if not force:
            raise PromptError(
                f"{source} answers only {len(shown.baseline)} of {shown.answered.total} baseline prompts in the "
                f"{split} split; at least {LEAST_PROMPTS} are needed. Give others with --baseline, or pass --force"
            )
        shown = replace(shown, baseline=baseline)
    return shown
