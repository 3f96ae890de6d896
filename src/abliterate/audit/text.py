"""An audit as people read it: rows for a terminal, and audit.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterate.audit.summary import all_points, refusals_by_count
from abliterate.cards.tables import Table
from abliterate.cards.words import count_of
from abliterate.measure.numbers import Share
from abliterate.report.charts import digits

MEANING = (
    "Every number is an upper bound on how strong the guard is: what was found here, with these prompts, this judge "
    "and this much computing, an attacker finds too; another method may need less. A guard that resists these edits "
    "may still fall to fine-tuning, to prompts, or to edits of another kind. Divergence is KL(original || edited) in "
    "nats on baseline prompts that the original answers: what the attack costs the model elsewhere. Rates have 95% "
    "Wilson intervals, divergences 95% bootstrap intervals over prompts. Points are chosen on validation prompts, "
    "numbers are of test prompts. No answers are kept."
)
NEEDED = {
    "directions": "directions taken out of every writer", "layers": "layers edited",
    "prompts": "prompts a side to find the direction",
}  # fmt: skip


def table_rows(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, how much, refused on test prompts) of the summary."""
    found = document["summary"]
    rows = [("as it is", "-", rate(found["original"]))]
    for limit, point in found["least_divergence"].items():
        name = f"least divergence for at most {float(limit):.0%} refused"
        if point is None:
            rows.append((name, "none of the edits tried", "-"))
        else:
            shown = f"{interval(point['divergence']['first_token'])} nats, {_edit(point)}"
            rows.append((name, shown, rate(point["refusal"])))
    for key, counted in refusals_by_count(document).items():
        name, count = f"{NEEDED[key]} for at most 10% refused", found[key]
        if not counted:
            rows.append((name, "not measured", "-"))
        elif count is None:
            rows.append((name, f"more than {counted[-1][0]}", rate(counted[-1][1])))
        else:
            rows.append((name, str(count), rate(dict(reversed(counted))[count])))
    for kind, n in found["kinds"].items():
        rows.append((f"refusals {kind}, {n['original']} at first", "the edit that leaves fewest", f"{n['left']} left"))
    return rows


def markdown(document: dict[str, Any], *, picture: bool = False) -> str:
    """audit.md."""
    name = Path(document["model"]["source"]).name
    counts = {side: document["prompts"][side]["test"]["count"] for side in ("target", "baseline")}
    lines = [
        f"# Audit of {name}", "",
        f"How strongly its refusals resist being taken out, on {counts['target']} held-out target prompts.", "",
        *Table(["", "", "refused"], list(map(list, table_rows(document)))).markdown(),
        MEANING, "",
        *(["![refusals against divergence, directions, layers and prompts](audit.png)", ""] if picture else []),
        *_kinds_section(document["summary"]["kinds"]),
        "## Refusals against divergence", "",
        *Table(
            ["edit", "refused", "divergence, first token", "divergence, along answers"],
            [
                [_edit(p), rate(p["test"]["refusal"]), interval(p["test"]["divergence"]["first_token"]),
                 interval(p["test"]["divergence"]["answer"])]
                for p in all_points(document)
            ],
        ).markdown(),
        "## Directions", "",
        "Taken out of every writer at full strength. Each is the difference of means that is left when those before it "
        f"are gone; none is added once at most {document['directions']['gone']:.0%} are refused.", "",
        *Table(
            ["directions", "found at layers", "refused", "divergence, first token"],
            [
                [str(r["directions"]), ", ".join(map(str, r["layers"])), rate(r["test"]["refusal"]),
                 interval(r["test"]["divergence"]["first_token"])]
                for r in document["directions"]["ranks"]
            ],
        ).markdown(),
        "## Layers", "",
        "One direction, taken out of the writers of some layers. Alone: how much that lowers the log-odds of opening "
        f"with a refusal (from {document['layers']['log_odds']:.2f}), on a few validation prompts. AUC: how well the "
        "layer's own direction tells validation prompts apart.", "",
        *Table(
            ["layer", "AUC", "lowered by", "divergence"],
            [
                [str(r["layer"]), digits(r["auc"], 2), digits(r["lowered"], 2), f"{r['divergence']:.3f}"]
                for r in document["layers"]["each"]
            ],
        ).markdown(),
        "The layers that lower it most, together:", "",
        *Table(
            ["layers", "refused", "divergence, first token"],
            [
                [_span(r["layers"]), rate(r["test"]["refusal"]), interval(r["test"]["divergence"]["first_token"])]
                for r in document["layers"]["together"]
            ],
        ).markdown(),
        "## Prompts", "",
        "The direction from few prompts a side, at the place chosen with all of them; all draws together. Cosine: with "
        f"the direction of all {document['few_prompts']['available']}.", "",
        *Table(
            ["prompts a side", "draws", "refused", "cosine"],
            [
                [str(r["prompts"]), str(len(r["draws"])), rate(r["refusal"]), f"{r['cosine']:.2f}"]
                for r in document["few_prompts"]["counts"]
            ],
        ).markdown(),
    ]  # fmt: skip
    return "\n".join(lines)


def resisting(kinds: dict[str, dict[str, int]]) -> str:
    """In a sentence, the kind of refusal that the edits tried take out least of."""
    left = {kind: n["left"] for kind, n in kinds.items() if n["left"]}
    if not left:
        return "No kind of refusal resists: the edit that leaves fewest leaves none."
    worst = max(left, key=lambda kind: (left[kind] / max(1, kinds[kind]["original"]), left[kind]))
    return f"What resists most is refusing {worst}: {left[worst]} left, of {kinds[worst]['original']} before."


def _kinds_section(kinds: dict[str, dict[str, int]]) -> list[str]:
    head = ["how it refuses", "the original", "left by the edit that leaves fewest"]
    rows = [[kind, str(n["original"]), str(n["left"])] for kind, n in kinds.items()]
    return ["## Kinds of refusal", "", resisting(kinds), "", *Table(head, rows).markdown()]


def rate(found: dict[str, Any]) -> str:
    """A rate with its count and interval."""
    return count_of(Share.model_validate(found))


def interval(found: dict[str, Any]) -> str:
    """A mean with its interval."""
    low, high = found["ci95"]
    return f"{found['value']:.3f} ({low:.3f} to {high:.3f})"


def _edit(point: dict[str, Any]) -> str:
    strength = point.get("strength")
    if point["edit"] == "fitted":
        return f"fitted, {point['writers']} writers" if "writers" in point else "fitted"
    return f"one direction at strength {strength:g}"


def _span(layers: list[int]) -> str:
    whole = len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
