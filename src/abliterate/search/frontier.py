"""The frontier of refusals against divergence that a search leaves behind, and the choice of one point on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from abliterate.common.errors import AbliterateError
from abliterate.edit.edit import Edit
from abliterate.measure.rates import Rate, prompts_needed, upper80

STEERS = ("weight", "step", "divergence_along", "scaled", "evaded", "collapse")  # by FrontierPoint's names
EMPTY = ("evaded", "collapse")  # not said where there are none
MOST_ALIKE = 0.05  # of answers, that are alike beyond what the original's are
PATH = 16.0  # prompts that the path as a whole is worth in the estimate of a point
PRIOR = 4.0  # standard deviation of the regression's weights
LEAST_DRIFT = 1e-5  # nats
TOLERANCE = 0.005  # of estimated shares that are as good as equal


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
        evaded: answers to target prompts that neither refuse nor answer (`measure.verdicts`).
        collapse: share of answers to target prompts that are no refusals and alike, beyond what the original's are;
            over `MOST_ALIKE` a point is never chosen.
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
    evaded: int = 0
    collapse: float = 0.0
    weight: float | None = None
    step: int | None = None
    scaled: float | None = None
    divergence_along: float | None = None

    @property
    def not_answered(self) -> Rate:
        """Refused or evaded: what is to become rare."""
        return Rate(self.refused.count + self.evaded, self.refused.total)

    @property
    def drift(self) -> float:
        """What points are compared by: the divergence, on baseline prompts and on those that are kept."""
        return self.divergence + self.also

    @property
    def noticed(self) -> float:
        """The larger of the drift at the first token and along the answers: what somebody may notice."""
        return max(self.drift, self.divergence_along or 0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "refusal": self.refused.to_json("refused"),
            "not_answered": self.not_answered.to_json(),
            "divergence": self.divergence,
            **self.said,
        }

    @property
    def said(self) -> dict[str, Any]:
        """How the search came to it, and its note: the fields of results.json beside refusals and divergence."""
        steers = {name: getattr(self, name) for name in STEERS}
        kept = {name: value for name, value in steers.items() if value is not None and (value or name not in EMPTY)}
        return {**kept, **self.note}

    def __str__(self) -> str:
        also = f" and {self.also:.3f} on what is kept" if self.also else ""
        evaded = f" and {self.evaded} evaded" if self.evaded else ""
        refused = f"{self.refused.count} of {self.refused.total} refused{evaded}"
        return f"{refused} at divergence {self.divergence:.3f}{also}"


def non_dominated(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points that no other one beats or equals in answers missing and drift, fewest first; of twins, the first.

    Example:
        >>> [str(p) for p in non_dominated(points)]
        ['0 of 64 refused at divergence 0.124', '3 of 64 refused at divergence 0.061']
    """
    kept: list[FrontierPoint] = []
    # stable, so the first of twins stays first
    for point in sorted(points, key=lambda p: (p.not_answered.rate, p.drift)):
        if not kept or point.drift < kept[-1].drift:
            kept.append(point)
    return kept


def estimated(points: Sequence[FrontierPoint]) -> list[float]:
    """For each point the share of target prompts not answered, estimated from all points together.

    A count of one or two of some dozen prompts says little, and a search has ten such counts along one path: the more
    it drifts, the less is refused. A binomial regression of them on the drift's logarithm (logistic, its slope at
    most 0, with a weak Gaussian prior) is worth `PATH` prompts beside a point's own count, fewer where it fits badly.
    """
    rates = [p.not_answered for p in points]
    hits, totals = (np.array(n, dtype=float) for n in ([r.count for r in rates], [r.total for r in rates]))
    x = np.log([max(p.noticed, LEAST_DRIFT) for p in points])
    along = _regressed(x - x.mean(), hits, totals)
    off = float(np.sum((hits - totals * along) ** 2 / (totals * along * (1 - along) + 1e-9)))
    worth = PATH / max(1.0, off / max(1, len(points) - 2))
    return list((hits + worth * along) / (totals + worth))


def _regressed(x: NDArray[np.float64], hits: NDArray[np.float64], totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fitted shares of a logistic regression of hits of totals on x, by Newton's method; no slope where it'd be > 0."""
    for columns in (np.stack([np.ones_like(x), x], 1), np.ones((len(x), 1))):
        weights = np.zeros(columns.shape[1])
        for _ in range(50):
            share = 1 / (1 + np.exp(-columns @ weights))
            gradient = columns.T @ (hits - totals * share) - weights / PRIOR**2
            curvature = (columns.T * (totals * share * (1 - share))) @ columns + np.eye(len(weights)) / PRIOR**2
            step = np.linalg.solve(curvature, gradient)
            weights = weights + step * min(1.0, 2.0 / max(1e-9, np.abs(step).max()))
        if len(weights) == 1 or weights[1] <= 0:
            break
    return np.asarray(1 / (1 + np.exp(-columns @ weights)))


def choose(
    points: Sequence[FrontierPoint], max_refusal_rate: float | None = None, max_divergence: float | None = None,
    *, free_divergence: float = 0.0,
) -> tuple[FrontierPoint, str]:  # fmt: skip
    """The point to take, and why.

    With `max_divergence`: the fewest target prompts not answered within it. Else with `max_refusal_rate`: a point whose
    share not answered is at most that, four times of five (`estimated`, `rates.upper80`). Of those that drift no
    further than `free_divergence`, which nobody notices, the fewest not answered; else the least divergence.
    Where no point is within the limit: the fewest not answered; where the prompts are too few to show it, of those of
    free divergence if there are any. With neither: the knee. Divergence on prompts that are kept is added to that on
    baseline prompts (`FrontierPoint.drift`). A point whose answers collapse is never chosen while there is another.

    Args:
        points: all that a search judged.
        max_refusal_rate, max_divergence: the limits.
        free_divergence: in nats, at the first token and along the answers.

    Raises:
        AbliterateError: when there are no points.
    """
    points = [p for p in points if p.collapse <= MOST_ALIKE] or list(points)
    if not points:
        raise AbliterateError("the search left no edit to choose from; give it more steps or trials")
    if max_divergence is None and max_refusal_rate is None:
        best = knee(non_dominated(points))
        return best, f"{best}, the knee of the frontier"
    shares = dict(zip(map(id, points), estimated(points), strict=True))

    def strongest(among: Sequence[FrontierPoint]) -> FrontierPoint:
        least = min(shares[id(p)] for p in among)
        return min((p for p in among if shares[id(p)] <= least + TOLERANCE), key=lambda p: p.drift)

    if max_divergence is not None:
        within = [p for p in points if p.drift <= max_divergence]
        if not within:
            best = min(points, key=lambda p: p.drift)
            return best, f"{best}, the least divergence; none is within {max_divergence:g}"
        best = strongest(within)
        return best, f"{best}, the fewest not answered within a divergence of {max_divergence:g}"
    assert max_refusal_rate is not None
    free = [p for p in points if p.noticed <= free_divergence]
    within = [p for p in points if upper80(shares[id(p)], p.refused.total) <= max_refusal_rate]
    if not within:
        needed = prompts_needed(min(shares.values()), max_refusal_rate)
        best = strongest((needed and free) or points)
        if needed is None:
            return best, f"{best}, the fewest not answered; none reached {max_refusal_rate:.0%}"
        among = f" of those within a divergence of {free_divergence:g}, which nobody notices" if best in free else ""
        return best, (
            f"{best}, the fewest not answered{among}; to show at most {max_refusal_rate:.0%} takes about {needed} "
            f"validation prompts, and there are {best.refused.total}"
        )
    unnoticed = [p for p in within if p in free]
    best = strongest(unnoticed) if unnoticed else min(within, key=lambda p: p.drift)
    of = f"of those where at most {max_refusal_rate:.0%} are, four times of five"
    if unnoticed:
        return best, f"{best}, the fewest not answered {of}, within a divergence of {free_divergence:g}"
    return best, f"{best}, the least divergence {of}"


def knee(front: Sequence[FrontierPoint]) -> FrontierPoint:
    """The point farthest below the line between the frontier's ends, both axes scaled to their range.

    After Satopää et al. 2011 ("Finding a kneedle in a haystack"). Where none lies below, the fewest refusals.

    Args:
        front: non-dominated points, fewest refusals first.
    """
    most, least = front[-1], front[0]
    refusals = (most.not_answered.rate - least.not_answered.rate) or 1.0
    drift = (least.drift - most.drift) or 1.0

    def below(point: FrontierPoint) -> float:
        x = (point.not_answered.rate - least.not_answered.rate) / refusals
        y = (point.drift - most.drift) / drift
        return round(1 - x - y, 9)

    return max(front, key=below)  # the first among equals
