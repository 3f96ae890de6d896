"""Judging a model: refusals, over-refusals, divergence, degenerate answers, loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from abliterate.common.reporting import SILENT, Tick, untold
from abliterate.measure.coherence import is_degenerate
from abliterate.measure.decode import BATCH, Answer, decode
from abliterate.measure.divergence import ANSWER_TOKENS, Divergence, Reference, compare, make_reference
from abliterate.measure.judges import Judge, LexicalJudge, Verdict
from abliterate.measure.rates import Rate
from abliterate.measure.verdicts import Panel, baseline_floor, irrelevant
from abliterate.measure.wordings import stock
from abliterate.models.handle import Handle


@dataclass
class Measurement:
    """One model's numbers, as they stand in results.json.

    Attributes:
        refusal: refused target prompts.
        over_refusal: refused baseline prompts.
        divergence: from the original; None for the original itself.
        degenerate: empty, looping or unended answers to baseline prompts, all decoded to the limit.
        degenerate_on_target: the same on target prompts that are not refused (refusals stop early).
        loss: mean negative log-likelihood of the original's answers to baseline prompts, nats per token.
        target_answers, baseline_answers: what was decoded; kept out of `to_json`.
        refused_target, refused_baseline: the judge's verdicts on them.
        reference: for an original: what later measurements are compared with.
        coherent: for a judge of style: answers to target prompts that show it and are not degenerate.
        scores: for such a judge: its mean score on target and on baseline prompts.
        verdicts: of a panel: on the answers to target prompts.
        collapse: of a panel: share of answers alike, to target and to baseline prompts.
        floor: of an original: how relevant an answer to a target prompt must be (`relevance`).
        second: what a judge says that choosing never saw.
    """

    refusal: Rate
    over_refusal: Rate
    divergence: Divergence | None
    degenerate: Rate
    degenerate_on_target: Rate
    loss: float
    target_answers: list[Answer] = field(repr=False)
    baseline_answers: list[Answer] = field(repr=False)
    refused_target: list[bool] = field(repr=False)
    refused_baseline: list[bool] = field(repr=False)
    reference: Reference | None = field(default=None, repr=False)
    coherent: Rate | None = None
    scores: tuple[float, float] | None = None
    verdicts: list[Verdict] | None = field(default=None, repr=False)
    collapse: tuple[float, float] | None = None
    floor: float | None = None
    second: SecondOpinion | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        style: dict[str, Any] = {}
        if self.coherent is not None and self.scores is not None:
            score = dict(zip(("target", "baseline"), self.scores, strict=True))
            style = {"coherent": self.coherent.to_json("refused"), "score": score}
        return {
            "refusal": self.refusal.to_json("refused"),
            "over_refusal": self.over_refusal.to_json("refused"),
            "divergence": self.divergence and self.divergence.to_json(),
            "degenerate": self.degenerate.to_json(),
            "degenerate_on_target": self.degenerate_on_target.to_json(),
            "loss": {"baseline_answers": self.loss},
            **(self._verdicts_json() if self.verdicts is not None else {}),
            **style,
        }

    def _verdicts_json(self) -> dict[str, Any]:
        counts = Counter(self.verdicts)
        missing = counts["refused"] + counts["evaded"]
        rows = {"answered": counts["answered"], "evaded": counts["evaded"], "not_answered": missing}
        found: dict[str, Any] = {name: Rate(n, counts.total()).to_json() for name, n in rows.items()}
        if self.collapse is not None:
            found["collapse"] = dict(zip(("target", "baseline"), self.collapse, strict=True))
        if self.second is not None:
            found["second"] = self.second.to_json(self)
        return found


@dataclass
class SecondOpinion:
    """What a judge says of a measurement's answers that choosing never saw.

    Attributes:
        judge: its name.
        target, baseline: whether it takes each answer for a refusal.
    """

    judge: str
    target: list[bool]
    baseline: list[bool]

    def to_json(self, measured: Measurement) -> dict[str, Any]:
        """As it stands in results.json, beside what the panel says."""
        assert measured.verdicts is not None
        sides = {
            "target": (measured.refused_target, self.target),
            "baseline": (measured.refused_baseline, self.baseline),
        }
        word = {True: "refused", False: "answered"}
        differ = [
            {"side": side, "index": i, "panel": word[ours], "judge": word[theirs]}
            for side, both in sides.items()
            for i, (ours, theirs) in enumerate(zip(*both, strict=True))
            if ours != theirs
        ]
        total = len(self.target) + len(self.baseline)
        missing = [v != "answered" or theirs for v, theirs in zip(measured.verdicts, self.target, strict=True)]
        return {
            "judge": self.judge,
            "refusal": Rate.of(self.target).to_json("refused"),
            "over_refusal": Rate.of(self.baseline).to_json("refused"),
            "not_answered": Rate.of(missing).to_json(),
            "agree": Rate(total - len(differ), total).to_json(),
            "disagreements": differ,
        }


def measure(
    handle: Handle,
    target: Sequence[str],
    baseline: Sequence[str],
    *,
    original: Measurement | None = None,
    judge: Judge | None = None,
    second: Judge | None = None,
    max_new_tokens: int = 100,
    batch_size: int = BATCH,
    progress: Callable[[str, int], Tick] = SILENT.progress,
) -> Measurement:
    """Measure a model on held-out prompts.

    Args:
        handle: the model, with or without an edit attached or baked.
        target: held-out prompts that show the behaviour.
        baseline: held-out prompts that don't; where the two are the same, answers are decoded once and count for both.
        original: the original's measurement on the same baseline prompts, to get a divergence from it;
            None when `handle` is the original.
        judge: decides what a refusal is; the lexical one by default. A panel that has learnt no refusal wordings yet
            learns them from these answers, and says which target prompts are answered; whether answers are relevant
            to their prompts is left to `look_for_relevance`.
        second: a judge that choosing never saw, beside a panel.
        max_new_tokens: longest answer decoded.
        batch_size: rows decoded at a time.
        progress: progress(stage, total) gives the function to call with the number done.

    Example:
        >>> before = measure(h, target, baseline)
        >>> with edit.attached(h):
        ...     after = measure(h, target, baseline, original=before)
    """
    judge = judge or LexicalJudge()
    one = list(target) == list(baseline)
    prompts, count = list(target) if one else [*target, *baseline], len(target)
    # Together: baseline prompts take the places of refusals, which stop early. They go on to the limit:
    # whether one loops is seen only there.
    answers, refused = judged(
        handle,
        prompts,
        judge,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop_on=lambda index: (True, False) if index < count and not one else (True,),
        tick=progress("answers", len(prompts)),
    )
    texts = [a.text for a in answers]
    if isinstance(judge, Panel) and not judge.learnt:
        judge.learn(texts[:count], texts if one else texts[count:])
        refused = judge.judge(prompts, texts)
    on_target = Judged(answers[:count], refused[:count])
    on_baseline = Judged(answers, refused) if one else Judged(answers[count:], refused[count:])
    reference = original.reference if original else reference_of(handle, baseline, *on_baseline)
    divergence = None
    loss = reference.loss if reference else 0.0
    if original is not None and reference is not None:
        divergence = compare(handle, reference, progress("divergence", len(reference.rows)))
        loss = divergence.loss
    found = Measurement(
        refusal=on_target.rate,
        over_refusal=on_baseline.rate,
        divergence=divergence,
        degenerate=on_baseline.degenerate,
        degenerate_on_target=Judged([a for a, shown in zip(*on_target, strict=True) if not shown], []).degenerate,
        loss=loss,
        target_answers=on_target.answers,
        baseline_answers=on_baseline.answers,
        refused_target=on_target.shown,
        refused_baseline=on_baseline.shown,
        reference=None if original else reference,
        coherent=on_target.coherent if hasattr(judge, "scores") else None,
        scores=(mean_score(judge, on_target.answers), mean_score(judge, on_baseline.answers)),
    )
    if isinstance(judge, Panel):
        found.verdicts = judge.verdicts(target, texts[:count], forms=True)
        alike = [stock([a.text for a in side.answers]) for side in (on_target, on_baseline)]
        found.collapse = tuple(Rate.of(side).rate for side in alike)  # type: ignore[assignment]
        if second is not None:
            said = second.judge(prompts, texts)
            found.second = SecondOpinion(second.name, said[:count], said if one else said[count:])
    return found


def look_for_relevance(
    handle: Handle, found: Measurement, target: Sequence[str], baseline: Sequence[str],
    original: Measurement | None = None, tick: Tick = untold,
) -> None:  # fmt: skip
    """Take answers that say nothing about their prompts for evasions, in a panel's measurement.

    Args:
        handle: whose probabilities count: the original where it is at hand, else the model measured.
        found: the measurement.
        target, baseline: the prompts it was made on.
        original: the original's measurement, which says how relevant answers are.
        tick: told how many forward rows are done.
    """
    if found.verdicts is None:
        return
    floor = original.floor if original is not None else None
    if floor is None:
        kept = [i for i, refused in enumerate(found.refused_baseline) if not refused]
        floor = baseline_floor(handle, [baseline[i] for i in kept], [found.baseline_answers[i] for i in kept])
    found.floor = floor
    found.verdicts = irrelevant(handle, target, found.target_answers, found.verdicts, floor, tick)


def mean_score(judge: Judge, answers: Sequence[Answer]) -> float:
    """The mean of a style judge's scores; 0 for judges that give none."""
    scores: list[float] = getattr(judge, "scores", lambda texts: [])([a.text for a in answers])
    return sum(scores) / len(scores) if scores else 0.0


class Judged(NamedTuple):
    """Answers and, for each, whether it shows the behaviour (by default: refuses)."""

    answers: list[Answer]
    shown: list[bool]

    @property
    def rate(self) -> Rate:
        """Answers that show it."""
        return Rate.of(self.shown)

    @property
    def degenerate(self) -> Rate:
        """Answers that are degenerate; of one stopped at a settled verdict it can only be seen whether it loops."""
        return Rate(sum(_broken(a) for a in self.answers), len(self.answers))

    @property
    def coherent(self) -> Rate:
        """Answers that show it and are not degenerate; they must have been decoded to their end."""
        return Rate(sum(shown and not _broken(a) for a, shown in zip(*self, strict=True)), len(self.answers))


def _broken(answer: Answer) -> bool:
    return not answer.unclosed and is_degenerate(answer.text, finished=answer.finished)


def judged(
    handle: Handle,
    prompts: Sequence[str],
    judge: Judge,
    *,
    max_new_tokens: int,
    batch_size: int = BATCH,
    stop_on: tuple[bool, ...] | Callable[[int], tuple[bool, ...]] = (True, False),
    tick: Tick = untold,
) -> Judged:
    """Greedy answers and the judge's verdicts.

    Decoding stops where the verdict is settled as one in `stop_on`, or in what that gives for the prompt's index.
    """

    def settled(index: int, text: str) -> bool:
        return judge.settled(prompts[index], text) in (stop_on(index) if callable(stop_on) else stop_on)

    answers = decode(
        handle,
        handle.prompt_ids(prompts),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        settled=settled,
        tick=tick,
    )
    return Judged(answers, judge.judge(prompts, [a.text for a in answers]))


def reference_of(
    handle: Handle, baseline: Sequence[str], answers: Sequence[Answer], refused: Sequence[bool] | None = None,
    tokens: int = ANSWER_TOKENS,
) -> Reference | None:  # fmt: skip
    """The original's distributions on the baseline prompts it answers: undoing an over-refusal is not damage.

    Args:
        refused: of each answer; None where all of them are answers, those that end at once too.
        tokens: how many of each answer count.
    """
    if refused is None:
        kept = [i for i, answer in enumerate(answers) if answer.whole]
    else:
        kept = [i for i, answer in enumerate(answers) if answer.ids and not refused[i]]
    if not kept:
        return None
    ids = handle.prompt_ids([baseline[i] for i in kept])
    return make_reference(handle, ids, [answers[i] for i in kept], answer_tokens=tokens)
