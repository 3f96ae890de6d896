"""The numbers of results.json as types: shares and their intervals, what was measured of a model, a search's points."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["answered", "refused", "evaded"]
"""On an answer to a target prompt; docs/verdicts.md."""


class Part(BaseModel):
    """An object of results.json."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)


class Share(Part):
    """A count of a total with its 95% Wilson interval; what is counted has one of three names."""

    refused: int | None = None
    answered: int | None = None
    count: int | None = None
    total: int
    rate: float
    ci95: tuple[float, float]

    @property
    def counted(self) -> int:
        """How many, whatever the name."""
        return next((n for n in (self.refused, self.answered, self.count) if n is not None), 0)


class DivergenceNumbers(Part):
    """KL(original || model) in nats per token."""

    first_token: float
    answer: float
    prompts: int | None = None


class Loss(Part):
    """Mean negative log-likelihood in nats per token."""

    baseline_answers: float


class BySide(Part):
    """A number for target and for baseline prompts."""

    target: float
    baseline: float


class Disagreement(Part):
    """A prompt of the test split on which the judges differ: its side, its place there, and what each said."""

    side: str
    index: int
    panel: str
    judge: str


class SecondOpinion(Part):
    """What a judge says that choosing never saw.

    Attributes:
        judge: its name.
        refusal, over_refusal: target and baseline prompts refused.
        not_answered: target prompts that it or the panel doesn't take for answered.
        agree: answers, of both sides, on which it and the panel agree whether they refuse.
        disagreements: the others.
    """

    judge: str
    refusal: Share
    over_refusal: Share
    not_answered: Share
    agree: Share
    disagreements: list[Disagreement]


class Measured(Part):
    """One model's numbers on the test split: the JSON part of `measure.Measurement`.

    Attributes:
        refusal, over_refusal: target and baseline prompts that show the behaviour (by default: refused).
        divergence: from the original; None for the original itself.
        degenerate, degenerate_on_target: of answers to baseline prompts, and to target prompts that don't show it.
        loss: on the original's answers.
        answered, evaded: target prompts that are answered, and that are neither answered nor refused.
        not_answered: refused or evaded.
        collapse: answers mostly made of what answers to other prompts say too.
        second: what a judge says that choosing never saw.
        coherent, score: of a style: shown and not degenerate; the judge's mean score.
        coherent_over_refusal: of induced refusals: baseline prompts refused in whole sentences.
    """

    refusal: Share
    over_refusal: Share | None = None
    divergence: DivergenceNumbers | None = None
    degenerate: Share | None = None
    degenerate_on_target: Share | None = None
    loss: Loss | None = None
    answered: Share | None = None
    evaded: Share | None = None
    not_answered: Share | None = None
    collapse: BySide | None = None
    second: SecondOpinion | None = None
    coherent: Share | None = None
    score: BySide | None = None
    coherent_over_refusal: Share | None = None


class Gap(Part):
    """The share of a further set less that of the given one; large when the 95% interval (Newcombe) leaves zero out."""

    difference: float
    ci95: tuple[float, float]
    large: bool


class AlsoNumbers(Part):
    """One model's numbers on a further set, and how far they part from those on the given set of that side.

    Attributes:
        refusal: prompts refused.
        not_answered: target prompts refused or evaded, where the judges say so; then the gap is of these.
        second: prompts refused as a judge says that choosing never saw.
    """

    refusal: Share
    not_answered: Share | None = None
    second: Share | None = None
    gap: Gap


class Paired(Part):
    """Prompts counted for one model only, and McNemar's exact test."""

    only_original: int
    only_edited: int
    p: float


class AlsoSet(Part):
    """A further set of prompts that was only measured.

    Attributes:
        side: target or baseline.
        prompts, sha256: how many there were, and which.
    """

    source: str
    side: str
    prompts: int
    sha256: str
    original: AlsoNumbers | None = None
    edited: AlsoNumbers | None = None
    healed: AlsoNumbers | None = None
    paired: Paired | None = None


class ThinkingNumbers(Part):
    """Of one side's answers, decoded with the reasoning left open (`--think`).

    Attributes:
        reasoned: answers with reasoning before them.
        refused_inside: of these, those that refuse in a sentence of it, whatever follows.
        unclosed: answers that came to the limit of tokens, or ended, inside the reasoning: they say nothing.
    """

    reasoned: Share
    refused_inside: Share
    unclosed: Share


class ThinkingSides(Part):
    """The same for target and for baseline prompts."""

    target: ThinkingNumbers
    baseline: ThinkingNumbers


class KindCount(Part):
    """How many obligations of a kind there are, and how many each model keeps."""

    total: int
    original: int | None = None
    edited: int | None = None
    healed: int | None = None


class ObligationNumbers(Part):
    """System prompts whose keeping can be checked.

    Attributes:
        prompts: how many.
        role: who instructs: system, or user where the chat template knows no system prompt.
        original, edited, healed: those that the model keeps.
        kinds: the same of each kind.
    """

    prompts: int
    role: str
    original: Share | None = None
    edited: Share | None = None
    healed: Share | None = None
    paired: Paired | None = None
    kinds: dict[str, KindCount] = Field(default_factory=dict)


class Span(Part):
    """The least and the largest of some numbers."""

    min: float
    max: float


class PlaceOf(Part):
    """Where in the stream a direction was found."""

    layer: int
    site: str
    position: int


class Candidate(Part):
    """A direction that a search looked at and what it found of it; `stage` says how far it came.

    `source` and the fields after it are of shifts that induce refusals.
    """

    layer: int
    site: str
    position: int | None = None
    second: PlaceOf | None = None
    strength: float | None = None
    separation: float | None = None
    bypass: float | None = None
    induce: float | None = None
    divergence: float | None = None
    refusal: Share | None = None
    stage: str | None = None
    note: str = ""
    source: str | None = None
    size: float | None = None
    loss: float | None = None
    cosine: float | None = None
    coherent_refusal: Share | None = None
    degenerate: Share | None = None

    def is_at(self, other: Candidate) -> bool:
        """Whether both are the same direction at the same strength."""
        return all(
            getattr(self, name) == getattr(other, name) for name in ("layer", "site", "position", "second", "strength")
        )


class FrontierPoint(Part):
    """An edit on the frontier and what validation found.

    Attributes:
        refusal: of target prompts.
        not_answered: refused or evaded.
        evaded, collapse: how many are evaded; share of alike answers beyond what the original has.
        divergence: from the original at the first answer token, in nats.
        divergence_along: the same along its answers.
        weight, step: what the fit weighed refusals with to get there, and the gradient step.
        scaled: of a fitted edit's strengths, where the point is such an edit made lighter.
        trial, parameters, objectives: of a search by trials.
        score, degenerate: of a style.
        seconds, cpu_seconds: after the run's start, and of the process, when it was there.
        recipe: its file beside results.json.
        strengths: writer to strength, where no recipe holds them.
        chosen: whether the run took it; None where the file doesn't say.
    """

    refusal: Share
    divergence: float
    not_answered: Share | None = None
    evaded: int | None = None
    collapse: float | None = None
    divergence_along: float | None = None
    weight: float | None = None
    step: int | None = None
    scaled: float | None = None
    trial: int | None = None
    parameters: dict[str, Any] | None = None
    objectives: dict[str, float] | None = None
    score: float | None = None
    degenerate: Share | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    recipe: str | None = None
    strengths: dict[str, Any] | None = None
    chosen: bool | None = None
