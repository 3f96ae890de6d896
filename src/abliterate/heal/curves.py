"""A picture of a training: loss, and where there are rewards their margin and accuracy, over the steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.common.files import whole_file

COLOUR, SMOOTH_COLOUR = "#93b5dd", "#1d64b4"
PANELS = {
    "loss": "loss", "rewards/margins": "reward margin, chosen - rejected",
    "rewards/accuracies": "pairs with the higher reward for the chosen answer", "divergence": "divergence, nats",
}  # fmt: skip
"""What is drawn, if a training logs it, and its title."""
SMOOTH_FROM = 20  # points from which a running mean is drawn too


def curves_missing() -> str | None:
    """What drawing needs and isn't installed; None when nothing is."""
    if importlib.util.find_spec("matplotlib") is None:
        return "the picture of the training needs matplotlib: pip install 'abliterate[heal]'"
    return None


def curve(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number in a Trainer's history; points without it are left out.

    A step that was done twice, before a kill and after, counts as it was done last.
    """
    found = {int(point["step"]): float(point[key]) for point in history if key in point and "step" in point}
    return sorted(found), [found[step] for step in sorted(found)]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and up to `width - 1` before it."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw a training's curves, one panel each, as the picture that `path` names (.png or .svg).

    Args:
        history: a Trainer's log, as `Training.history`.
        path: replaced when it is there.

    Returns:
        Whether there was anything to draw: at least two points of a curve.

    Raises:
        OutputError: the file can't be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = {key: curve(history, key) for key in PANELS}
    drawn = {key: found for key, found in drawn.items() if len(found[0]) > 1}
    if not drawn:
        return False
    figure = Figure(figsize=(9, 2.6 * len(drawn)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (key, (steps, values)) in zip(panels, drawn.items(), strict=True):
        axes.plot(steps, values, color=COLOUR, linewidth=1.2)
        if len(values) >= SMOOTH_FROM:
            axes.plot(steps, running_mean(values, len(values) // 10), color=SMOOTH_COLOUR, linewidth=1.8)
        axes.set_title(PANELS[key], loc="left", fontsize="medium", fontweight="bold")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "rewards/accuracies":
            axes.set_ylim(-0.03, 1.03)
    panels[-1].set_xlabel("step")
    kind = path.suffix.removeprefix(".") or "png"
    # the same history gives the same bytes: no date, version or random ids
    marks: dict[str, Any] = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with whole_file(path) as temporary, rc_context({"svg.hashsalt": "abliterate"}):
        figure.savefig(temporary, format=kind, metadata=marks)
    return True
