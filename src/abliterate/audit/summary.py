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
        `kinds`: kind of refusal -> how many the original gives, and how many are left by the edit that leaves fewest;
        `directions`, `layers`, `prompts`: how many suffice for at most a tenth to be refused, or None.
    """
    points = all_points(document)
    return {
        "original": document["direction"]["original"]["refusal"],
        "least_divergence": {f"{limit:.2f}": _least(points, limit) for limit in LIMITS},
        "kinds": _kinds(document["direction"]["original"]["kinds"], points),
        **{
            name: next((count for count, refusal in rows if refusal["rate"] <= LIMITS[0]), None)
            for name, rows in refusals_by_count(document).items()
        },
    }


def refusals_by_count(document: dict[str, Any]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """How many directions, layers and prompts, and what is then refused of the test prompts."""
    return {
        "directions": [(row["directions"], row["test"]["refusal"]) for row in document["directions"]["ranks"]],
        "layers": [(len(row["layers"]), row["test"]["refusal"]) for row in document["layers"]["together"]],
        "prompts": [(row["prompts"], row["refusal"]) for row in document["few_prompts"]["counts"]],
    }


def all_points(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every edit of the first two stages: the fitted ones, then one direction at several strengths."""
    fitted = [{"edit": "fitted", **point} for point in document["frontier"]["points"]]
    return fitted + [{"edit": "one direction", **point} for point in document["direction"]["strengths"]]


def _kinds(before: dict[str, int], points: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    fewest = min(points, key=lambda p: p["validation"]["refusal"]["rate"])["test"]["kinds"]
    return {kind: {"original": before.get(kind, 0), "left": fewest.get(kind, 0)} for kind in {**before, **fewest}}


def _least(points: list[dict[str, Any]], limit: float) -> dict[str, Any] | None:
    passing = [p for p in points if p["validation"]["refusal"]["rate"] <= limit]
    if not passing:
        return None
    best = min(passing, key=lambda p: p["test"]["divergence"]["first_token"]["value"])
    return {"edit": best["edit"], "strength": best.get("strength"), **best["test"]}
