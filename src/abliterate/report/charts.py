"""What a chart is: a plotly figure as plain JSON, with a summary in words and its numbers as a table.

Colours are names such as "@target"; whoever draws puts in those of the theme. Only scatter traces and heat maps are
used, so that `stills.py` can draw the same figures without a browser.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from abliterate.cards.tables import Table
from abliterate.measure.numbers import Share

DIVERGING = [[0.0, "@cold"], [0.5, "@paper"], [1.0, "@warm"]]
Trace = dict[str, Any]


@dataclass
class Frame:
    """One setting of a chart's control: what replaces part of each trace, its name and its summary."""

    label: str
    summary: str
    data: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)


@dataclass
class Figure:
    """A chart.

    Attributes:
        name: id in the page and file name of its picture.
        title: heading.
        summary: what it shows, in words and numbers.
        data, layout: plotly's, with colour names for colours.
        table: the numbers drawn.
        frames: what a slider or a list chooses among; `shown` is the first one drawn.
        control: "slider" or "select", and the control's label.
        picks: name of the chart whose frame a click on point i chooses.
        ratio: height over width, on a wide screen.
    """

    name: str
    title: str
    summary: str
    data: list[Trace]
    layout: dict[str, Any]
    table: Table | None = None
    frames: list[Frame] = field(default_factory=list)
    shown: int = 0
    control: str = ""
    control_label: str = ""
    picks: str = ""
    ratio: float = 0.5

    def at(self, index: int) -> tuple[list[Trace], dict[str, Any]]:
        """Data and layout with one of the frames put in."""
        if not self.frames:
            return self.data, self.layout
        frame = self.frames[index]
        data = [{**trace, **part} for trace, part in zip(self.data, frame.data, strict=True)]
        return data, {**self.layout, **frame.layout}


def scatter(name: str, x: Iterable[Any], y: Iterable[Any], *, mode: str = "markers", **more: Any) -> Trace:
    """A scatter trace; with `text`, that is what a pointer shows."""
    shown = {"hoverinfo": "text"} if "text" in more else {}
    return {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": list(y), **shown, **more}


def heat(rows: int, columns: Sequence[int], reach: float, title: str, **more: Any) -> Trace:
    """A heat map's trace without its values, which its frames bring; both ends of its colours at `reach`."""
    return {
        "type": "heatmap", "z": [], "x": list(columns), "y": list(range(rows)), "zmin": -reach, "zmax": reach,
        "colorscale": DIVERGING, "colorbar": {"title": {"text": title}, "thickness": 12}, **more,
    }  # fmt: skip


def mark(points: Sequence[tuple[float, float | None]], symbol: str, size: int, colour: str, width: int) -> Trace:
    """What was chosen: a star on a line, or a ring around a point."""
    line = {"width": width, "color": colour}
    marker = {"color": "@edited", "size": size, "symbol": symbol, "line": line}
    return scatter("chosen", (x for x, _ in points), (y for _, y in points), hoverinfo="skip", marker=marker)


def ring(points: Sequence[tuple[float, float | None]]) -> Trace:
    return mark(points, "circle-open", 22, "@edited", 3)


def stars(points: Sequence[tuple[float, float | None]]) -> Trace:
    return mark(points, "star", 15, "@paper", 1)


def bars(shares: Sequence[Share], **style: Any) -> dict[str, Any]:
    """Error bars of shares' intervals, in per cent."""
    return {
        "type": "data", "symmetric": False, **style,
        "array": [100 * (s.ci95[1] - s.rate) for s in shares],
        "arrayminus": [100 * (s.rate - s.ci95[0]) for s in shares],
    }  # fmt: skip


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def layer_axis(layers: int, title: str = "layer", **more: Any) -> dict[str, Any]:
    """An axis with ticks at whole layers, about ten."""
    return axis(title, tick0=0, dtick=max(1, -(-layers // 10)), zeroline=False, **more)


def digits(value: float | None, count: int) -> str:
    """A number at so many decimals; "-" for none."""
    return "-" if value is None else f"{value:.{count}f}"
