"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def percent(share: float) -> str:
    """0.125 as "12.5%"."""
    return f"{share:.1%}"


def number(value: float | None) -> str:
    """A number at three digits; "-" for none."""
    return "-" if value is None else f"{value:.3g}"


def counted(rate: dict[str, Any]) -> int:
    """How many a rate of results.json counts: "refused" or "count"."""
    return int(rate["refused"] if "refused" in rate else rate["count"])


def count_of(rate: dict[str, Any], *, interval: bool = True) -> str:
    """A rate of results.json: "3 of 100 = 3.0% (1.0% to 8.5%)"."""
    text = f"{counted(rate)} of {rate['total']}"
    if not interval or not rate["total"]:
        return text
    low, high = rate["ci95"]
    return f"{text} = {percent(rate['rate'])} ({percent(low)} to {percent(high)})"


def joined(parts: Iterable[str]) -> str:
    """Parts with commas and a last "and"."""
    items = list(parts)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
