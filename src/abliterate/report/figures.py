"""The charts: each a plotly figure as plain JSON, with a summary in words and its numbers as a table.

Colours are names such as "@target"; whoever draws puts in those of the theme. Only scatter traces and heat maps are
used, so that `stills.py` can draw the same figures without a browser.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from abliterate.report.document import Loaded, Point, WriterStrength, is_chosen, place_name
from abliterate.report.words import count_of, joined, number, percent

SITES_DRAWN = ("pre", "mid")  # `post` of a block is `pre` of the next
SIDES = ("embedding", "attention", "mlp")
# of unlike size: where both sides of a block have one strength, both are seen
SYMBOLS = {"embedding": ("diamond", 10), "attention": ("circle", 11), "mlp": ("square", 6)}
OTHER = ("x", 8)
DIVERGING = [[0.0, "@cold"], [0.5, "@paper"], [1.0, "@warm"]]
Trace = dict[str, Any]


@dataclass
class Table:
    """A chart's numbers: column names and rows of text."""

    header: list[str]
    rows: list[list[str]]


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
        return [{**trace, **part} for trace, part in zip(self.data, frame.data, strict=True)], {
            **self.layout,
            **frame.layout,
        }


def all_figures(loaded: Loaded) -> dict[str, Figure]:
    """Every chart that this run has numbers for, by name."""
    made: list[Figure | None] = [
        outcome(loaded),
        strengths(loaded),
        *separation(loaded),
        projection(loaded),
        cosine_map(loaded),
        frontier(loaded),
        point_strengths(loaded),
        screened(loaded),
        tokens(loaded),
    ]
    return {figure.name: figure for figure in made if figure is not None}


def outcome(loaded: Loaded) -> Figure:
    """Refusals, over-refusals and degenerate answers of every model measured, with intervals."""
    names = {"refusal": "refusals", "over_refusal": "over-refusals", "degenerate": "degenerate answers"}
    kinds = [key for key in names if any(key in state for _, state in loaded.states)]
    data, rows = [], []
    for index, (state, measured) in enumerate(loaded.states):
        step = 0.22 * (index - (len(loaded.states) - 1) / 2)
        rates = [(len(kinds) - 1 - i - step, measured[key]) for i, key in enumerate(kinds) if measured.get(key)]
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": state,
                "x": [100 * rate["rate"] for _, rate in rates], "y": [y for y, _ in rates],
                "error_x": {
                    "type": "data", "symmetric": False, "thickness": 2, "width": 6, "color": f"@{state}",
                    "array": [100 * (rate["ci95"][1] - rate["rate"]) for _, rate in rates],
                    "arrayminus": [100 * (rate["rate"] - rate["ci95"][0]) for _, rate in rates],
                },
                "marker": {"color": f"@{state}", "size": 12, "symbol": ("circle", "square", "diamond")[index]},
                "text": [f"{state}: {count_of(rate)}" for _, rate in rates], "hoverinfo": "text",
            }
        )  # fmt: skip
    for key in kinds:
        rows.append([names[key], *(count_of(m[key]) if m.get(key) else "not measured" for _, m in loaded.states)])
    layout = {
        "xaxis": {"title": {"text": "share of answers, %"}, "range": [-3, 103], "zeroline": False},
        "yaxis": {
            "tickvals": list(range(len(kinds))), "ticktext": [names[key] for key in reversed(kinds)],
            "range": [-0.6, len(kinds) - 0.4], "zeroline": False,
        },
    }  # fmt: skip
    summary = ". ".join(f"{row[0].capitalize()}: " + joined(
        f"{state} {text}" for (state, _), text in zip(loaded.states, row[1:], strict=True)
    ) for row in rows) + ". Bars are 95% Wilson intervals."  # fmt: skip
    header = ["", *(state for state, _ in loaded.states)]
    return Figure("outcome", "Refusals and what may break", summary, data, layout, Table(header, rows), ratio=0.42)


def strengths(loaded: Loaded) -> Figure | None:
    """The recipe's strengths over depth."""
    if not loaded.strengths:
        return None
    data, layout = _strength_traces(loaded.strengths)
    return Figure(
        "strengths", "Strengths over depth", _strength_summary(loaded.strengths, loaded.directions), data, layout,
        _strength_table(loaded.strengths), ratio=0.38,
    )  # fmt: skip


def point_strengths(loaded: Loaded) -> Figure | None:
    """The strengths of each point of the frontier; a click on a point, or the list, chooses."""
    known = [point for point in loaded.points if point.strengths]
    if len(known) != len(loaded.points) or not known:
        return None
    frames = []
    for point in known:
        assert point.strengths is not None
        traces, layout = _strength_traces(point.strengths)
        words = f"{_point_words(point)}. {_strength_summary(point.strengths)}"
        frames.append(Frame(f"{point.label}{' (chosen)' if point.chosen else ''}", words, traces, layout))
    shown = next((i for i, point in enumerate(known) if point.chosen), 0)
    header = ["point", "refusals", "divergence", "least strength", "largest strength", "writers"]
    rows = [[p.label, count_of(p.refusal), number(p.divergence), *_extremes(p.strengths or ())] for p in known]
    return Figure(
        "point-strengths", "Strengths of the point picked", frames[shown].summary, frames[shown].data,
        frames[shown].layout, Table(header, rows), frames, shown, "select", "point", ratio=0.38,
    )  # fmt: skip


def separation(loaded: Loaded) -> list[Figure]:
    """How far apart target and baseline prompts lie, per layer and site: four charts."""
    table = loaded.seen("separation")
    if not table:
        return []
    metrics = (
        ("auc", "AUC along the direction", "AUC", "1 tells every target prompt from every baseline prompt, 0.5 none"),
        ("silhouette", "Silhouette", "silhouette", "1 is two tight clusters far apart, 0 is one cloud"),
        ("cosine", "Cosine of the two means", "cosine", "1 is the same direction"),
    )
    figures = [_by_layer(loaded, key, title, axis, meaning) for key, title, axis, meaning in metrics]
    return [*figures, _norms(loaded)]


def projection(loaded: Loaded) -> Figure | None:
    """Every prompt in the plane of largest variance, layer by layer."""
    found = loaded.seen("projection")
    if not found:
        return None
    sides = ("target", "baseline")
    points = [p for side in sides for plane in found[side] for p in plane]
    reach = 1.05 * max((abs(v) for p in points for v in p), default=1.0)
    shown = loaded.seen("place", "layer")
    frames = []
    for layer, share in enumerate(found["shares"]):
        traces = [{"x": [p[0] for p in found[side][layer]], "y": [p[1] for p in found[side][layer]]} for side in sides]
        chosen = " (chosen)" if layer == shown else ""
        seen = sum(v or 0 for v in share)
        words = (
            f"Layer {layer}, site {found['site']}{chosen}: the plane holds {percent(seen)} of the variance; the two "
            f"sides' centres are {number(_centre_distance(found, layer))} apart, where 1 is the root mean square "
            "distance of a prompt from the middle."
            if seen
            else f"Layer {layer}, site {found['site']}{chosen}: every prompt has the same vector here."
        )
        frames.append(Frame(f"layer {layer}{chosen}", words, traces))
    data: list[Trace] = [
        {
            "type": "scatter", "mode": "markers", "name": f"{side} prompts", "x": [], "y": [],
            "marker": {"color": f"@{side}", "size": 8, "opacity": 0.75, "symbol": symbol},
            "text": found["prompts"][side], "hoverinfo": "text",
        }
        for side, symbol in zip(sides, ("circle", "diamond"), strict=True)
    ]  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "first axis"}, "range": [-reach, reach], "zeroline": False},
        "yaxis": {"title": {"text": "second axis"}, "range": [-reach, reach], "zeroline": False},
    }
    header = ["layer", "variance on the first axis", "on the second", "distance of the centres"]
    rows = [
        [str(layer), percent(share[0] or 0), percent(share[1] or 0), number(_centre_distance(found, layer))]
        for layer, share in enumerate(found["shares"])
    ]
    return Figure(
        "projection", "Prompts, seen by their activations", frames[shown].summary, data, layout, Table(header, rows),
        frames, shown, "slider", "layer", ratio=0.6,
    )  # fmt: skip


def cosine_map(loaded: Loaded) -> Figure | None:
    """Cosine between the directions of every two layers."""
    found = loaded.seen("cosines")
    if not found:
        return None
    sites = [site for site in SITES_DRAWN if site in found]
    chosen = loaded.seen("place", "layer")
    frames = []
    for site in sites:
        near = [row[i + 1] for i, row in enumerate(found[site][:-1]) if row[i + 1] is not None]
        words = (
            f"Site {site}: neighbouring layers' directions have a cosine of {number(min(near))} to "
            f"{number(max(near))}; {_alike(found[site], chosen)}"
            if near
            else f"Site {site}: no two neighbouring layers have a direction."
        )
        frames.append(Frame(f"site {site}", words, [{"z": found[site]}]))
    layers = list(range(len(found[sites[0]])))
    data: list[Trace] = [
        {
            "type": "heatmap", "z": [], "x": layers, "y": layers, "zmin": -1, "zmax": 1, "colorscale": DIVERGING,
            "colorbar": {"title": {"text": "cosine"}, "thickness": 12},
            "hovertemplate": "layers %{y} and %{x}: %{z:.2f}<extra></extra>",
        }
    ]  # fmt: skip
    layout = {
        "xaxis": {**_layer_axis(len(layers)), "constrain": "domain", "showgrid": False},
        "yaxis": {**_layer_axis(len(layers)), "showgrid": False},
    }
    shown = sites.index(loaded.seen("place", "site")) if loaded.seen("place", "site") in sites else 0
    header = ["layer", *(f"{site}, with the next layer's" for site in sites)]
    rows = [
        [str(layer), *(_text(found[site][layer][layer + 1], 3) for site in sites)] for layer in layers[:-1]
    ]  # fmt: skip
    return Figure(
        "cosines", "Do layers share a direction?", frames[shown].summary, data, layout, Table(header, rows), frames,
        shown, "select", "site", ratio=0.62,
    )  # fmt: skip


def frontier(loaded: Loaded) -> Figure | None:
    """Refusals against divergence of the edits whose answers were decoded."""
    points = loaded.points
    if not points:
        return None
    x, y = [p.divergence for p in points], [100 * p.refusal["rate"] for p in points]
    marked = [i for i, p in enumerate(points) if p.chosen]
    data: list[Trace] = [
        {
            "type": "scatter", "mode": "lines+markers" if loaded.has_frontier else "markers",
            "name": "frontier" if loaded.has_frontier else "candidates", "x": x, "y": y,
            "line": {"color": "@muted", "width": 1},
            "marker": {"color": "@accent", "size": 13, "symbol": "circle"},
            "error_y": {
                "type": "data", "symmetric": False, "thickness": 1.2, "width": 4, "color": "@muted",
                "array": [100 * (p.refusal["ci95"][1] - p.refusal["rate"]) for p in points],
                "arrayminus": [100 * (p.refusal["rate"] - p.refusal["ci95"][0]) for p in points],
            },
            "text": [_point_words(p) for p in points], "hoverinfo": "text",
        },
        _ring([(x[i], y[i]) for i in marked]),
    ]  # fmt: skip
    layout = {
        "xaxis": {
            "title": {"text": "divergence, nats (cost)"}, "range": [-0.04 * max(x), 1.08 * max(x)], "zeroline": False,
        },
        "yaxis": {"title": {"text": "refused, %"}, "range": [-4, 104], "zeroline": False},
    }  # fmt: skip
    what = "edits that no other beats in both" if loaded.has_frontier else "candidates whose answers were decoded"
    fewest = min(points, key=lambda p: (p.refusal["rate"], p.divergence))
    summary = f"{len(points)} {what}, on validation prompts. Fewest refusals: {_point_words(fewest)}."
    if marked:
        summary += f" Chosen: {_point_words(points[marked[0]])}."
    header = ["point", "refusals", "divergence", "chosen"]
    rows = [[p.label, count_of(p.refusal), number(p.divergence), "yes" if p.chosen else ""] for p in points]
    title = "The frontier" if loaded.has_frontier else "Candidates: refusals against divergence"
    return Figure("frontier", title, summary, data, layout, Table(header, rows), picks="point-strengths", ratio=0.5)


def screened(loaded: Loaded) -> Figure | None:
    """Every candidate: refusal log-odds at the first token against divergence."""
    found = [c for c in loaded.results.get("candidates") or () if _both(c)]
    if len(found) < 2:
        return None
    winner = loaded.get("recipe", "direction") or {}
    stages = [stage for stage in ("screened", "scored", "decoded") if any(c["stage"] == stage for c in found)]
    colours = {"screened": "@muted", "scored": "@accent", "decoded": "@edited"}
    data = [
        {
            "type": "scatter", "mode": "markers", "name": stage, "hoverinfo": "text",
            "x": [max(c["divergence"], 1e-4) for c in found if c["stage"] == stage],
            "y": [c["bypass"] for c in found if c["stage"] == stage],
            "text": [
                f"{place_name(c)}: log-odds {number(c['bypass'])}, divergence {number(c['divergence'])}"
                for c in found if c["stage"] == stage
            ],
            "marker": {"color": colours[stage], "size": 8 if stage == "screened" else 11, "opacity": 0.8},
        }
        for stage in stages
    ]  # fmt: skip
    data.append(_ring([(max(c["divergence"], 1e-4), c["bypass"]) for c in found if is_chosen(c, winner)]))
    layout = {
        "xaxis": {"title": {"text": "divergence, nats (log scale)"}, "type": "log", "dtick": "D2"},
        "yaxis": {"title": {"text": "refusal log-odds at the first token"}, "zeroline": False},
    }
    counts = joined(f"{sum(c['stage'] == stage for c in found)} {stage}" for stage in stages)
    summary = f"{len(found)} candidates ({counts}). Lower left is better: opens fewer refusals, changes less."
    if winner.get("note"):
        summary += f" The winner, {place_name(winner)}: {winner['note']}."
    header = ["candidate", "stage", "log-odds", "induce", "divergence", "refusals", "note"]
    rows = [
        [
            place_name(c), c["stage"], _text(c["bypass"], 3), _text(c.get("induce"), 3), number(c["divergence"]),
            count_of(c["refusal"]) if c.get("refusal") else "", c.get("note", ""),
        ]
        for c in sorted(found, key=lambda c: (c["layer"], c["site"], c["position"]))
    ]  # fmt: skip
    return Figure("candidates", "All candidates", summary, data, layout, Table(header, rows), ratio=0.5)


def tokens(loaded: Loaded) -> Figure | None:
    """The direction's share of the stream at every token of a few prompts, by layer."""
    found = loaded.seen("tokens")
    if not found:
        return None
    frames = []
    reach = max((abs(v) for e in found for s in ("original", "edited") for v in _values(e.get(s))), default=1.0) or 1.0
    for entry in found:
        labels = [_visible(token) for token in entry["tokens"]]
        axis = {"tickvals": list(range(len(labels))), "ticktext": labels}
        for state in ("original", "edited"):
            if not entry.get(state):
                continue
            words = f"{entry['side'].capitalize()} prompt, {state}: {_token_words(entry, state, labels)}"
            hover = [[f"layer {i}, {label}: {_text(v, 3)}" for label, v in zip(labels, row or [], strict=False)]
                     for i, row in enumerate(entry[state])]  # fmt: skip
            frames.append(
                Frame(
                    f"{entry['side']}: {_cut(entry['prompt'])} ({state})", words,
                    [{"z": entry[state], "x": list(range(len(labels))), "text": hover}],
                    {"xaxis": {"title": {"text": "token"}, "tickangle": -60, "showgrid": False, "zeroline": False,
                               **axis}},
                )
            )  # fmt: skip
    data: list[Trace] = [
        {
            "type": "heatmap", "z": [], "x": [], "y": list(range(loaded.seen("layers"))), "zmin": -reach, "zmax": reach,
            "colorscale": DIVERGING, "colorbar": {"title": {"text": "share"}, "thickness": 12}, "hoverinfo": "text",
        }
    ]  # fmt: skip
    layout = {"yaxis": {**_layer_axis(loaded.seen("layers")), "showgrid": False}}
    header = ["prompt", "model", "last token, largest share", "at layer"]
    rows = []
    for entry in found:
        for state in ("original", "edited"):
            if entry.get(state):
                value, layer = _largest_at_last(entry[state])
                rows.append([f"{entry['side']}: {_cut(entry['prompt'])}", state, _text(value, 3), str(layer)])
    return Figure(
        "tokens", "The direction along a prompt's tokens", frames[0].summary, data, layout, Table(header, rows), frames,
        0, "select", "prompt and model", ratio=0.62,
    )  # fmt: skip


def _by_layer(loaded: Loaded, key: str, title: str, axis: str, meaning: str) -> Figure:
    table = loaded.seen("separation")
    sites = [site for site in SITES_DRAWN if any(v is not None for v in table[site][key])]
    data = [_site_line(site, table[site][key]) for site in sites]
    marks = [(place["layer"], table[place["site"]][key][place["layer"]]) for place in _chosen(loaded)]
    data.append(_marks(marks))
    found = [(v, layer, site) for site in sites for layer, v in enumerate(table[site][key]) if v is not None]
    summary = f"{meaning}."
    if found and key == "cosine":
        value, layer, site = min(found)
        summary += f" Least alike: {value:.3f} at layer {layer} {site}."
    elif found:
        value, layer, site = max(found, key=lambda one: (one[0], -one[1]))
        summary += f" Highest: {value:.3f}, first at layer {layer} {site}."
    for place, (mark, height) in zip(_chosen(loaded), marks, strict=True):
        summary += f" Chosen, layer {mark} {place['site']}: {_text(height, 3)}."
    rows = [
        [str(layer), *(_text(table[site][key][layer], 4) for site in table)] for layer in range(loaded.seen("layers"))
    ]
    layout = {"xaxis": _layer_axis(loaded.seen("layers")), "yaxis": {"title": {"text": axis}}}
    return Figure(f"separation-{key}", title, summary, data, layout, Table(["layer", *table], rows), ratio=0.6)


def _norms(loaded: Loaded) -> Figure:
    table = loaded.seen("separation")
    site = loaded.seen("place", "site")
    data = [
        {**_site_line(site, table[site][f"{side}_norm"]), "name": side, "line": {"color": f"@{side}"},
         "marker": {"color": f"@{side}", "size": 4}}
        for side in ("target", "baseline")
    ]  # fmt: skip
    chosen = loaded.seen("place", "layer")
    data.append(_marks([(chosen, table[site]["target_norm"][chosen])]))
    values = {side: table[site][f"{side}_norm"][chosen] for side in ("target", "baseline")}
    summary = (
        f"Mean length of the vectors at site {site}. At the chosen layer {chosen}: {_text(values['target'], 2)} for "
        f"target prompts, {_text(values['baseline'], 2)} for baseline prompts."
    )
    rows = [
        [str(layer), *(_text(table[s][f"{side}_norm"][layer], 2) for s in table for side in ("target", "baseline"))]
        for layer in range(loaded.seen("layers"))
    ]
    header = ["layer", *(f"{s}, {side}" for s in table for side in ("target", "baseline"))]
    axis = {"title": {"text": "norm"}, "type": "log", "dtick": "D2"}
    layout = {"xaxis": _layer_axis(loaded.seen("layers")), "yaxis": axis}
    return Figure("separation-norm", "Norms", summary, data, layout, Table(header, rows), ratio=0.6)


def _layer_axis(layers: int) -> dict[str, Any]:
    """An axis with ticks at whole layers, about ten."""
    return {"title": {"text": "layer"}, "tick0": 0, "dtick": max(1, -(-layers // 10)), "zeroline": False}


def _site_line(site: str, values: Sequence[float | None]) -> Trace:
    return {
        "type": "scatter", "mode": "lines+markers", "name": site, "x": list(range(len(values))), "y": list(values),
        "line": {"color": f"@{site}", "dash": "solid" if site == "pre" else "dot"},
        "marker": {"color": f"@{site}", "size": 5, "symbol": "circle" if site == "pre" else "square"},
        "hovertemplate": "layer %{x}: %{y:.4g}",
    }  # fmt: skip


def _marks(places: Sequence[tuple[int, float | None]]) -> Trace:
    return {
        "type": "scatter", "mode": "markers", "name": "chosen", "x": [layer for layer, _ in places],
        "y": [value for _, value in places], "hoverinfo": "skip",
        "marker": {"color": "@edited", "size": 15, "symbol": "star", "line": {"width": 1, "color": "@paper"}},
    }  # fmt: skip


def _ring(points: Sequence[tuple[float, float]]) -> Trace:
    return {
        "type": "scatter", "mode": "markers", "name": "chosen", "hoverinfo": "skip",
        "x": [x for x, _ in points], "y": [y for _, y in points],
        "marker": {"color": "@edited", "size": 22, "symbol": "circle-open", "line": {"width": 3, "color": "@edited"}},
    }  # fmt: skip


def _chosen(loaded: Loaded) -> list[dict[str, Any]]:
    second = loaded.get("recipe", "direction", "second")
    return [loaded.seen("place"), *([second] if second else [])]


def _strength_traces(rows: Sequence[WriterStrength]) -> tuple[list[Trace], dict[str, Any]]:
    others = sorted({row.side for row in rows} - set(SIDES))
    data = []
    for side in (*SIDES, *others):
        mine = sorted((row for row in rows if row.side == side), key=lambda row: -1 if row.layer is None else row.layer)
        data.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": side or "writers",
                "x": [-1 if row.layer is None else row.layer for row in mine], "y": [row.largest for row in mine],
                "text": [f"{row.name}: {', '.join(f'{s:.3g}' for s in row.strengths) or '0'}" for row in mine],
                "hoverinfo": "text", "line": {"color": f"@{side if side in SIDES else 'muted'}", "width": 1.5},
                "marker": {
                    "color": f"@{side if side in SIDES else 'muted'}", "size": SYMBOLS.get(side, OTHER)[1],
                    "symbol": SYMBOLS.get(side, OTHER)[0],
                },
            }
        )  # fmt: skip
    values = [row.largest for row in rows]
    low, high = min(0.0, *values), max(1.0, *values)
    margin = 0.08 * (high - low)
    layout = {
        "xaxis": {
            **_layer_axis(1 + max(row.layer or 0 for row in rows)),
            "title": {"text": "layer (-1: embedding)"},
        },
        "yaxis": {"title": {"text": "strength"}, "range": [low - margin, high + margin]},
    }
    return data, layout


def _strength_summary(rows: Sequence[WriterStrength], directions: int = 0) -> str:
    parts = []
    for side in (*SIDES, *sorted({row.side for row in rows} - set(SIDES))):
        mine = [row for row in rows if row.side == side]
        if not mine:
            continue
        low, high = min(row.largest for row in mine), max(row.largest for row in mine)
        span = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        parts.append(f"{side or 'writers'} {span} ({len(mine)})")
    several = f" The edit has {directions} directions; a writer's largest strength is drawn." if directions > 1 else ""
    return f"1 removes a direction, 0 leaves a writer alone. {joined(parts).capitalize()}.{several}"


def _strength_table(rows: Sequence[WriterStrength]) -> Table:
    return Table(
        ["writer", "layer", "side", "strengths that aren't zero"],
        [
            [row.name, "" if row.layer is None else str(row.layer), row.side,
             ", ".join(f"{s:.4g}" for s in row.strengths)]
            for row in rows
        ],
    )  # fmt: skip


def _extremes(rows: Iterable[WriterStrength]) -> list[str]:
    values = [row.largest for row in rows if row.strengths] or [0.0]
    return [f"{min(values):.3g}", f"{max(values):.3g}", str(len(values))]


def _point_words(point: Point) -> str:
    return f"{point.label}: {count_of(point.refusal, interval=False)} refused, divergence {number(point.divergence)}"


def _centre_distance(found: dict[str, Any], layer: int) -> float:
    centres = []
    for side in ("target", "baseline"):
        plane = found[side][layer]
        centres.append([sum(p[axis] for p in plane) / len(plane) for axis in (0, 1)])
    return float(sum((a - b) ** 2 for a, b in zip(*centres, strict=True)) ** 0.5)


def _alike(rows: Sequence[Sequence[float | None]], chosen: int) -> str:
    near = [layer for layer, value in enumerate(rows[chosen]) if value is not None and value >= 0.8]
    if not near:
        return "the chosen layer has none at this site."
    return f"layers within a cosine of 0.8 of the chosen layer {chosen}, itself counted: {len(near)} of {len(rows)}."


def _both(candidate: dict[str, Any]) -> bool:
    return candidate.get("bypass") is not None and candidate.get("divergence") is not None


def _values(rows: Any) -> Iterable[float]:
    return (v for row in rows or () for v in row or () if v is not None)


def _largest_at_last(rows: Sequence[Sequence[float | None] | None]) -> tuple[float | None, int]:
    last = [(row[-1], layer) for layer, row in enumerate(rows) if row and row[-1] is not None]
    return max(last, key=lambda pair: abs(pair[0] or 0), default=(None, 0))


def _token_words(entry: dict[str, Any], state: str, labels: Sequence[str]) -> str:
    peak, layer, place = max(
        (
            (abs(v), layer, i)
            for layer, row in enumerate(entry[state])
            for i, v in enumerate(row or ())
            if v is not None
        ),
        default=(0.0, 0, 0),
    )
    last, where = _largest_at_last(entry[state])
    return (
        f"the direction's share of the stream (r·h/|h|) is largest at token {place + 1} of {len(labels)}, "
        f"“{labels[place]}”, layer {layer}: {peak:.3f}; at the last token it reaches {_text(last, 3)} at layer {where}."
    )


def _visible(token: str) -> str:
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    return ("␣" if shown.startswith(" ") and not shown.strip() else "") + (shown.strip() or ("" if shown else "∅"))


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 48 else line[:47] + "…"


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
