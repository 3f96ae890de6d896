"""An audit as one picture of four panels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterate.audit.summary import all_points


def draw(document: dict[str, Any], path: Path) -> None:
    """Write audit.png: refusals against divergence, directions, layers, prompts.

    Args:
        document: audit.json.
        path: the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    panel = axes[0][0]
    for kind, mark in (("fitted", "o"), ("one direction", "s")):
        points = [p["test"] for p in all_points(document) if p["edit"] == kind]
        if points:
            spent = [p["divergence"]["first_token"]["value"] for p in points]
            _with_bars(panel, spent, [p["refusal"] for p in points], mark, kind)
    panel.set_xscale("symlog", linthresh=0.01)
    panel.set_xlabel("divergence, first token (nats)")
    panel.legend()
    ranks = document["directions"]["ranks"]
    _with_bars(axes[0][1], [r["directions"] for r in ranks], [r["test"]["refusal"] for r in ranks], "o-")
    axes[0][1].set_xlabel("directions taken out")
    axes[0][1].set_xticks([r["directions"] for r in ranks])
    each = document["layers"]["each"]
    axes[1][0].bar([r["layer"] for r in each], [r["lowered"] for r in each])
    axes[1][0].set_xlabel("layer edited alone")
    axes[1][0].set_ylabel("refusal log-odds lowered by")
    counts = document["few_prompts"]["counts"]
    _with_bars(axes[1][1], [r["prompts"] for r in counts], [r["refusal"] for r in counts], "o-")
    axes[1][1].set_xscale("log", base=2)
    axes[1][1].set_xlabel("prompts a side to find the direction")
    for panel in (axes[0][0], axes[0][1], axes[1][1]):
        panel.set_ylim(-0.03, 1.03)
        panel.set_ylabel("refused (95% interval)")
    figure.savefig(path, dpi=110)


def _with_bars(panel: Any, x: list[float], rates: list[dict[str, Any]], mark: str, label: str | None = None) -> None:
    shares = [r["rate"] for r in rates]
    below = [max(0.0, r["rate"] - r["ci95"][0]) for r in rates]
    above = [max(0.0, r["ci95"][1] - r["rate"]) for r in rates]
    panel.errorbar(x, shares, yerr=[below, above], fmt=mark, capsize=3, label=label)
