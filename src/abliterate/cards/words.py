"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable

from abliterate.measure.numbers import Share, Span


def percent(share: float) -> str:
    """0.125 as "12.5%"."""
    return f"{share:.1%}"


def number(value: float | None) -> str:
    """A number at three digits; "-" for none."""
    return "-" if value is None else f"{value:.3g}"


def count_of(share: Share | None, *, interval: bool = True) -> str:
    """A share: "3 of 100 = 3.0% (1.0% to 8.5%)"; "-" for none."""
    if share is None:
        return "-"
    text = f"{share.counted} of {share.total}"
    if not interval or not share.total:
        return text
    low, high = share.ci95
    return f"{text} = {percent(share.rate)} ({percent(low)} to {percent(high)})"


def span(strength: Span) -> str:
    """Strengths: "0.25 to 1", or one where they are alike."""
    low, high = f"{strength.min:.3g}", f"{strength.max:.3g}"
    return low if low == high else f"{low} to {high}"


def joined(parts: Iterable[str]) -> str:
    """Parts with commas and a last "and"."""
    items = list(parts)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
