"""Is a difference more than chance? Tests on the same questions answered by two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from abliterate.measure.differences import mcnemar

FLIPS = 10_000
EXACT = 14  # differences whose signs are all tried: 2^14 sums
LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """How a model does against the reference on the same items.

    Attributes:
        difference: mean of (model - reference) per item.
        stderr: standard error of that mean; None for one item.
        p: two-sided p-value.
        test: "McNemar, exact" or "sign flips".
        better, worse: items on which the model scores higher and lower.
        items: items compared.
    """

    difference: float
    stderr: float | None
    p: float
    test: str
    better: int
    worse: int
    items: int


def compare(model: Sequence[float], reference: Sequence[float]) -> Comparison:
    """McNemar's exact test where every score is 0 or 1, else a permutation test by sign flips.

    Args:
        model, reference: score per item, of the same items in the same order.

    Raises:
        ValueError: when there are none, or not as many of the one as of the other.
    """
    if not model or len(model) != len(reference):
        raise ValueError(f"{len(model)} and {len(reference)} scores can't be paired")
    differences = [a - b for a, b in zip(model, reference, strict=True)]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    binary = all(score in (0, 1) for score in (*model, *reference))
    p, test = (mcnemar(better, worse), "McNemar, exact") if binary else (sign_flips(differences), "sign flips")
    return Comparison(mean(differences), stderr(differences), p, test, better, worse, len(differences))


def sign_flips(differences: Sequence[float], *, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p-value of a sum of differences when each could as well have had the other sign (Fisher 1935).

    All 2^n signs are tried for few differences, else `flips` drawn at random, counted with the one observed.
    """
    import numpy as np

    values = np.array([d for d in differences if d], dtype=np.float64)
    if not len(values):
        return 1.0
    observed = abs(values.sum()) * (1 - 1e-9)  # equal sums differ by rounding
    if len(values) <= EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
        return float((abs(signs @ values) >= observed).mean())
    generator = np.random.default_rng(seed)
    chunk = max(1, 10_000_000 // len(values))
    hits = done = 0
    while done < flips:
        rows = min(chunk, flips - done)
        signs = 1 - 2 * generator.integers(0, 2, (rows, len(values)), dtype=np.int8)
        hits += int((abs(signs @ values) >= observed).sum())
        done += rows
    return (1 + hits) / (1 + flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for how many there are (Holm 1979), in the order given.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean, with the sample's variance; None for fewer than two."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))
