"""Is a difference of two rates more than chance: of different prompts, and of the same prompts twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from abliterate.measure.rates import Rate


def newcombe(first: Rate, second: Rate) -> tuple[float, float]:
    """95% interval of the second share less the first, of different prompts (Newcombe 1998, method 10).

    Example:
        >>> low, high = newcombe(Rate(2, 100), Rate(14, 100))
        >>> round(low, 3), round(high, 3)
        (0.046, 0.203)
    """
    (low1, high1), (low2, high2) = first.ci95, second.ci95
    difference = second.rate - first.rate
    below = math.hypot(second.rate - low2, high1 - first.rate)
    above = math.hypot(high2 - second.rate, first.rate - low1)
    return difference - below, difference + above


def gap(first: Rate, second: Rate) -> dict[str, Any]:
    """How much more the second share is, as results.json has it; large when the interval leaves zero out."""
    low, high = newcombe(first, second)
    return {"difference": second.rate - first.rate, "ci95": [low, high], "large": low > 0 or high < 0}


def paired(original: Sequence[bool], edited: Sequence[bool]) -> dict[str, Any]:
    """Prompts whose verdict changed, each way, and the exact two-sided test that both ways are as likely (McNemar).

    Example:
        >>> paired([True, True, True, False], [False, False, False, False])["p"]
        0.25
    """
    lost = sum(a and not b for a, b in zip(original, edited, strict=True))
    won = sum(b and not a for a, b in zip(original, edited, strict=True))
    return {"only_original": lost, "only_edited": won, "p": mcnemar(won, lost)}


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p-value of McNemar's test: were the items that differ as likely to go either way?

    Args:
        better, worse: items only the one, and only the other model gets right.

    Example:
        >>> mcnemar(1, 9)
        0.021484375
    """
    n, few = better + worse, min(better, worse)
    tail = sum(math.comb(n, k) for k in range(few + 1))
    return min(1.0, 2 * tail / 2**n)
