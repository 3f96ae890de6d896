"""The frontier of refusals against divergence that a search leaves behind, and the choice of one point on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from abliterate.common.errors import AbliterateError
from abliterate.edit.edit import Edit
from abliterate.measure.rates import Rate

STEERS = ("weight", "step", "divergence_along", "scaled")  # what steers a fit, by FrontierPoint's names


class Moment(NamedTuple):
    """When a point was there: readings of time.monotonic() and time.process_time(), in seconds."""

    clock: float
    cpu: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.monotonic(), time.process_time())


@dataclass(frozen=True)
class FrontierPoint:
    """An edit and what it does on validation prompts.

    Attributes:
        edit: what is taken out of which writers.
        refused: of decoded answers to target prompts.
        divergence: from the original on baseline prompts that it answers, in nats.
        note: what else the search says of it; plain JSON.
        also: divergence on further prompts that are to be answered as before (`--keep`), in nats.
        weight, step: of a fit's point: the weight of refusing in its objective, and the gradient step of it.
        scaled: of a gentler edit made from a fit's point: the factor of that point's strengths.
        divergence_along: the divergence averaged along the original's answers, where `divergence` is the first token's.
        found: when this process had it, None for one from an earlier process. It is no part of a recipe, which
            the same seed gives again to the byte.
    """

    edit: Edit
    refused: Rate
    divergence: float
    note: dict[str, Any] = field(default_factory=dict)
    found: Moment | None = field(default=None, compare=False)
    also: float = 0.0
    weight: float | None = None
    step: int | None = None
    scaled: float | None = None
    divergence_along: float | None = None

    @property
    def drift(self) -> float:
        """What points are compared by: the divergence, on baseline prompts and on those that are kept."""
        return self.divergence + self.also

    def to_json(self) -> dict[str, Any]:
        return {"refusal": self.refused.to_json("refused"), "divergence": self.divergence, **self.said}

    @property
    def said(self) -> dict[str, Any]:
        """How the search came to it, and its note: the fields of results.json beside refusals and divergence."""
        steers = {name: getattr(self, name) for name in STEERS}
        return {**{name: value for name, value in steers.items() if value is not None}, **self.note}

    def __str__(self) -> str:
        also = f" and {self.also:.3f} on what is kept" if self.also else ""
        return f"{self.refused.count} of {self.refused.total} refused at divergence {self.divergence:.3f}{also}"


def non_dominated(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points that no other one beats or equals in refusals and drift, fewest refusals first; of twins, the first.

    Example:
        >>> [str(p) for p in non_dominated(points)]
        ['0 of 64 refused at divergence 0.124', '3 of 64 refused at divergence 0.061']
    """
    kept: list[FrontierPoint] = []
    for point in sorted(points, key=_order):  # stable, so the first of twins stays first
        if not kept or point.drift < kept[-1].drift:
            kept.append(point)
    return kept


def choose(
    points: Sequence[FrontierPoint], max_refusal_rate: float | None = None, max_divergence: float | None = None
) -> tuple[FrontierPoint, str]:
    """The point to take, and why.

    With `max_divergence`: the fewest refusals within it. Else with `max_refusal_rate`: the least divergence
    within it. Where no point is within the limit, the one that comes closest. With neither: the knee. Divergence on
    prompts that are kept is added to that on baseline prompts (`FrontierPoint.drift`).

    Raises:
        AbliterateError: when there are no points.
    """
    front = non_dominated(points)
    if not front:
        raise AbliterateError("the search left no edit to choose from; give it more steps or trials")
    if max_divergence is not None:
        within = [p for p in front if p.drift <= max_divergence]
        if not within:
            return front[-1], f"{front[-1]}, the least divergence; none is within {max_divergence:g}"
        return within[0], f"{within[0]}, the fewest refusals within a divergence of {max_divergence:g}"
    if max_refusal_rate is not None:
        within = [p for p in front if p.refused.rate <= max_refusal_rate]
        if not within:
            return front[0], f"{front[0]}, the fewest refusals; none reached {max_refusal_rate:.0%}"
        return within[-1], f"{within[-1]}, the least divergence of those that refuse at most {max_refusal_rate:.0%}"
    best = knee(front)
    return best, f"{best}, the knee of the frontier"


def knee(front: Sequence[FrontierPoint]) -> FrontierPoint:
    """The point farthest below the line between the frontier's ends, both axes scaled to their range.

    After Satopää et al. 2011 ("Finding a kneedle in a haystack"). Where none lies below, the fewest refusals.

    Args:
        front: non-dominated points, fewest refusals first.
    """
    most, least = front[-1], front[0]
    refusals = (most.refused.rate - least.refused.rate) or 1.0
    drift = (least.drift - most.drift) or 1.0

    def below(point: FrontierPoint) -> float:
        x = (point.refused.rate - least.refused.rate) / refusals
        y = (point.drift - most.drift) / drift
        return round(1 - x - y, 9)

    return max(front, key=below)  # the first among equals


def _order(point: FrontierPoint) -> tuple[float, float]:
    return point.refused.rate, point.drift
