"""Measuring further sets of prompts besides the split of the given two, and how far they part from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from abliterate.common.reporting import Tick, untold
from abliterate.measure.decode import BATCH, Answer
from abliterate.measure.differences import gap, paired
from abliterate.measure.judges import Judge, Verdict
from abliterate.measure.measurement import Measurement, judged
from abliterate.measure.rates import Rate
from abliterate.measure.verdicts import Panel, irrelevant
from abliterate.models.handle import Handle, behind
from abliterate.prompts.further import Further


@dataclass
class FurtherVerdicts:
    """What a judge says of a model's answers to a further set.

    Attributes:
        answers: what was decoded.
        refused: whether each shows the behaviour (by default: refuses).
        verdicts: of a panel, on target prompts.
        second: what a judge says that choosing never saw.
    """

    answers: list[Answer] = field(repr=False)
    refused: list[bool]
    verdicts: list[Verdict] | None = None
    second: list[bool] | None = None

    @property
    def missing(self) -> list[bool]:
        """Which prompts aren't answered, as far as the judge says so; else which are refused."""
        return self.refused if self.verdicts is None else [verdict != "answered" for verdict in self.verdicts]


def verdicts_on(
    handle: Handle, sets: Sequence[Further], judge: Judge, *, max_new_tokens: int, batch_size: int = BATCH,
    second: Judge | None = None, tick: Tick = untold,
) -> list[FurtherVerdicts]:  # fmt: skip
    """The verdicts on each set, of `second` too where there is one; those behind the same turns are decoded at once."""
    decoded, shows = list[Answer](), list[bool]()
    for before, together in groupby(sets, key=lambda one: one.before):
        prompts = [text for one in together for text in one.prompts]
        with behind(handle, before):
            found = judged(handle, prompts, judge, max_new_tokens=max_new_tokens, batch_size=batch_size, tick=tick)
        decoded += found.answers
        shows += found.shown
    answers, shown = iter(decoded), iter(shows)
    said = []
    for one in sets:
        own = FurtherVerdicts([next(answers) for _ in one.prompts], [next(shown) for _ in one.prompts])
        if isinstance(judge, Panel) and one.role == "target":
            own.verdicts = judge.verdicts(one.prompts, [answer.text for answer in own.answers], forms=True)
        if second is not None:
            own.second = second.judge(one.prompts.texts, [answer.text for answer in own.answers])
        said.append(own)
    return said


def weigh(handle: Handle, one: Further, found: FurtherVerdicts, floor: float) -> None:
    """Take answers that say nothing about their prompts for evasions, as `look_for_relevance` does."""
    if found.verdicts is not None:
        with behind(handle, one.before):
            found.verdicts = irrelevant(handle, one.prompts, found.answers, found.verdicts, floor)


def also_json(
    sets: Sequence[Further], verdicts: Mapping[str, Sequence[FurtherVerdicts]], measured: Mapping[str, Measurement]
) -> list[dict[str, Any]]:
    """The sets as results.json has them.

    Args:
        sets: that were measured.
        verdicts: of each model by state (original, edited), from `verdicts_on`.
        measured: the same models on the given sets, from which a set may part.
    """
    found = []
    for index, one in enumerate(sets):
        facts: dict[str, Any] = {
            "source": one.prompts.source, "side": one.role, "prompts": len(one.prompts), "sha256": one.prompts.sha256,
        }  # fmt: skip
        own = {state: of[index] for state, of in verdicts.items()}
        for state, said in own.items():
            facts[state] = {"refusal": Rate.of(said.refused).to_json("refused")}
            if said.verdicts is not None:
                facts[state]["not_answered"] = Rate.of(said.missing).to_json()
            if said.second is not None:
                facts[state]["second"] = Rate.of(said.second).to_json("refused")
            facts[state]["gap"] = gap(_given(measured[state], one, said), Rate.of(said.missing))
        if {"original", "edited"} <= set(own):
            facts["paired"] = paired(own["original"].missing, own["edited"].missing)
        found.append(facts)
    return found


def _given(measured: Measurement, one: Further, said: FurtherVerdicts) -> Rate:
    """The rate on the given set of that side that is counted alike."""
    if one.role == "baseline":
        return measured.over_refusal
    if said.verdicts is None or measured.verdicts is None:
        return measured.refusal
    return Rate.of([verdict != "answered" for verdict in measured.verdicts])
