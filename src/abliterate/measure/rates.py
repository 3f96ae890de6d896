"""Counts as rates with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Z95 = 1.959963984540054
Z80 = 0.8416212335729143  # one-sided: four times of five, the true share is below


@dataclass(frozen=True)
class Rate:
    """`count` of `total`, with the share and its 95% Wilson interval."""

    count: int
    total: int

    @classmethod
    def of(cls, shown: Sequence[bool]) -> Rate:
        """How many are true of how many there are."""
        return cls(sum(shown), len(shown))

    @property
    def rate(self) -> float:
        return self.count / self.total if self.total else 0.0

    @property
    def ci95(self) -> tuple[float, float]:
        return wilson(self.count, self.total)

    def to_json(self, counted_as: str = "count") -> dict[str, Any]:
        low, high = self.ci95
        return {counted_as: self.count, "total": self.total, "rate": self.rate, "ci95": [low, high]}


def wilson(count: int, total: int) -> tuple[float, float]:
    """95% interval of a share after Wilson (1927); (0, 1) when nothing was counted.

    Example:
        >>> low, high = wilson(5, 100)
        >>> round(low, 3), round(high, 3)
        (0.022, 0.112)
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = count / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * (share * (1 - share) / total + z2 / (4 * total**2)) ** 0.5 / (1 + z2 / total)
    # at the ends the formula is exact but for rounding
    return (0.0 if count == 0 else centre - half), (1.0 if count == total else centre + half)


def upper80(share: float, total: int) -> float:
    """Below this the true share lies with a probability of 80%: the upper end of Wilson's one-sided interval.

    Args:
        share: the share found, or estimated.
        total: how many were counted.
    """
    if total == 0:
        return 1.0
    z2 = Z80**2
    centre = share + z2 / (2 * total)
    return (centre + Z80 * (share * (1 - share) / total + z2 / (4 * total**2)) ** 0.5) / (1 + z2 / total)


def prompts_needed(share: float, limit: float) -> int | None:
    """How many must be counted for `upper80` of a share to be at most a limit; None where the share is over it.

    Example:
        >>> prompts_needed(0.0, 0.05), prompts_needed(0.02, 0.05)
        (14, 38)
    """
    return math.ceil(Z80**2 * limit * (1 - limit) / (limit - share) ** 2) if share < limit else None
