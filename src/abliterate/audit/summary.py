"""An audit in a handful of numbers."""

from __future__ import annotations

from typing import Any

LIMITS = (0.10, 0.05)


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """The single numbers of an audit, each with where it comes from.

    Points are chosen by refusals on validation prompts, and by test divergence among those that pass; refusals are then
    given on test prompts.

    Args:
        document: audit.json without its summary.

    Returns:
        `least_divergence`: limit -> the point of least divergence that refuses at most that share, or None;
        `directions`, `layers`, `prompts`: how many suffice for at most a tenth to be refused, or None.
    """
    points = all_points(document)
    return {
        "original": document["direction"]["original"]["refusal"],
        "least_divergence": {f"{limit:.2f}": _least(points, limit) for limit in LIMITS},
        "directions": _first(document["directions"]["ranks"], "directions", lambda row: row["test"]["refusal"]["rate"]),
        "layers": _first(
            [{**row, "count": len(row["layers"])} for row in document["layers"]["together"]], "count",
            lambda row: row["test"]["refusal"]["rate"],
        ),
        "prompts": _first(document["few_prompts"]["counts"], "prompts", lambda row: row["refusal"]["rate"]),
    }  # fmt: skip


def all_points(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every edit of the first two stages: the fitted ones, then one direction at several strengths."""
    fitted = [{"edit": "fitted", **point} for point in document["frontier"]["points"]]
    return fitted + [{"edit": "one direction", **point} for point in document["direction"]["strengths"]]


def _least(points: list[dict[str, Any]], limit: float) -> dict[str, Any] | None:
    passing = [p for p in points if p["validation"]["refusal"]["rate"] <= limit]
    if not passing:
        return None
    best = min(passing, key=lambda p: p["test"]["divergence"]["first_token"]["value"])
    return {"edit": best["edit"], "strength": best.get("strength"), **best["test"]}


def _first(rows: list[dict[str, Any]], name: str, rate: Any) -> int | None:
    """The least count with at most a tenth refused."""
    return next((int(row[name]) for row in rows if rate(row) <= LIMITS[0]), None)
