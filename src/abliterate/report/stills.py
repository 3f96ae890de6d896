"""The charts as still pictures, drawn by matplotlib from the same figures that the page draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abliterate.report.charts import Figure

COLOURS = {
    "@target": "#c2410c", "@baseline": "#1d64b4", "@original": "#6b7280", "@edited": "#15803d", "@healed": "#7e3fb3",
    "@accent": "#1d64b4", "@pre": "#1d64b4", "@mid": "#b45309", "@post": "#6b7280", "@muted": "#6b7280",
    "@embedding": "#7e3fb3", "@attention": "#1d64b4", "@mlp": "#b45309", "@paper": "#ffffff", "@cold": "#1d64b4",
    "@warm": "#c2410c",
}  # fmt: skip
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "star": "*", "circle-open": "o", "x": "x"}
STYLES = {"solid": "-", "dot": ":", "dash": "--"}


def draw(figure: Figure, path: Path, *, title: str = "", said: str = "", numbers: Sequence[Sequence[str]] = ()) -> None:
    """Write one figure as a PNG; one with frames shows the chosen one.

    Args:
        figure: what to draw.
        path: the file.
        title, said: a heading above, and a sentence instead of the figure's title.
        numbers: a text for each point of each trace, written beside it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9, max(3.2, 9 * figure.ratio)), dpi=130, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    data, layout = figure.at(figure.shown)
    if title:
        canvas.suptitle(_as_text(title), x=0.01, ha="left", fontweight="bold")
    style = ("normal", "medium") if said else ("bold", "large")
    axes.set_title(_as_text(said or figure.title), loc="left", wrap=True, fontweight=style[0], fontsize=style[1])
    for trace in data:
        if trace["type"] == "heatmap":
            _heatmap(canvas, axes, trace)
        else:
            _scatter(axes, trace)
    _axis(axes, "x", layout.get("xaxis", {}))
    _axis(axes, "y", layout.get("yaxis", {}))
    if any(trace["type"] == "scatter" for trace in data):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        handles = axes.get_legend_handles_labels()
        canvas.legend(*handles, frameon=False, fontsize="small", loc="outside lower left", ncols=4)
    for trace, texts in zip(data, numbers, strict=False):
        _beside_points(axes, trace, texts)
    canvas.savefig(path, format="png", metadata={"Software": None})


def _beside_points(axes: Any, trace: dict[str, Any], texts: Sequence[str]) -> None:
    """A text behind each point's interval, or before it where that ends at the right."""
    bars = trace["error_x"]
    for x, y, below, above, text in zip(trace["x"], trace["y"], bars["arrayminus"], bars["array"], texts, strict=True):
        left = x < 50
        style = {"ha": "left" if left else "right", "va": "center", "fontsize": "small"}
        place = (x + above if left else x - below, y), (6 if left else -6, 0)
        axes.annotate(text, *place, textcoords="offset points", color=COLOURS[trace["marker"]["color"]], **style)


def _scatter(axes: Any, trace: dict[str, Any]) -> None:
    marker = trace.get("marker", {})
    line = trace.get("line", {})
    x, y = _plain(trace["x"]), _plain(trace["y"])
    colour = COLOURS[marker.get("color") or line.get("color")]
    hollow = str(marker.get("symbol", "")).endswith("-open")
    drawn: dict[str, Any] = {
        "marker": MARKERS[marker.get("symbol", "circle")] if "markers" in trace["mode"] else None,
        "markersize": 0.7 * marker.get("size", 6), "color": colour, "label": _as_text(trace.get("name", "")),
        "markerfacecolor": "none" if hollow else colour, "alpha": marker.get("opacity", 1),
        "linestyle": STYLES[line.get("dash", "solid")] if "lines" in trace["mode"] else "none",
        "linewidth": line.get("width", 1.5),
    }  # fmt: skip
    bars = {
        f"{axis}err": [trace[f"error_{axis}"]["arrayminus"], trace[f"error_{axis}"]["array"]]
        for axis in ("x", "y")
        if f"error_{axis}" in trace
    }
    if bars and x:
        axes.errorbar(x, y, **bars, **drawn, capsize=3, elinewidth=1.5)
    else:
        axes.plot(x, y, **drawn)


def _heatmap(canvas: Any, axes: Any, trace: dict[str, Any]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    width = max((len(row) for row in trace["z"] if row), default=1)
    rows = [_plain(row or [None] * width) for row in trace["z"]]
    map_ = LinearSegmentedColormap.from_list("diverging", [(at, COLOURS[name]) for at, name in trace["colorscale"]])
    image = axes.imshow(
        rows, origin="lower", aspect="auto", cmap=map_, vmin=trace["zmin"], vmax=trace["zmax"], interpolation="nearest"
    )
    canvas.colorbar(image, ax=axes, label=trace["colorbar"]["title"]["text"], fraction=0.04)


def _axis(axes: Any, which: str, settings: dict[str, Any]) -> None:
    from matplotlib.ticker import MultipleLocator

    if settings.get("type") == "log":
        getattr(axes, f"set_{which}scale")("log")
    if "title" in settings:
        getattr(axes, f"set_{which}label")(_as_text(settings["title"]["text"]))
    if "range" in settings:
        getattr(axes, f"set_{which}lim")(*settings["range"])
    elif isinstance(settings.get("dtick"), int):
        getattr(axes, f"{which}axis").set_major_locator(MultipleLocator(settings["dtick"]))
    if "ticktext" in settings:
        turned = {"rotation": 60, "ha": "right", "fontsize": "x-small"} if "tickangle" in settings else {}
        labels = [_as_text(text) for text in settings["ticktext"]]
        getattr(axes, f"set_{which}ticks")(settings["tickvals"], labels, **turned)


def _as_text(text: str) -> str:
    """Text as it is: matplotlib would read mathematics between dollar signs."""
    return text.replace("$", r"\$")


def _plain(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
