"""The charts of a run's results: rates, strengths, the frontier, the candidates; and the list of all charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from abliterate.cards.tables import Table
from abliterate.cards.words import count_of, joined, number
from abliterate.measure.numbers import Candidate
from abliterate.report.charts import Figure, Frame, Trace, axis, bars, digits, layer_axis, ring, scatter
from abliterate.report.document import Loaded, Point, WriterStrength, place_name
from abliterate.report.streams import cosine_map, projection, separation, tokens

SIDES = ("embedding", "attention", "mlp")
# of unlike size: where both sides of a block have one strength, both are seen
SYMBOLS = {"embedding": ("diamond", 10), "attention": ("circle", 11), "mlp": ("square", 6)}
OTHER = ("x", 8)
RATES = {
    "refusal": "refusals",
    "evaded": "evasions",
    "over_refusal": "over-refusals",
    "degenerate": "degenerate answers",
}
STAGES = {"screened": ("@muted", 8), "scored": ("@accent", 11), "decoded": ("@edited", 11)}


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
    states = loaded.results.states
    about = loaded.results.about.words
    names = {**RATES, "refusal": about.rate, "over_refusal": about.over}
    kinds = [key for key in RATES if any(getattr(measured, key) for measured in states.values())]
    data = []
    for index, (state, measured) in enumerate(states.items()):
        step = 0.22 * (index - (len(states) - 1) / 2)
        found = [(len(kinds) - 1 - i - step, getattr(measured, key)) for i, key in enumerate(kinds)]
        rates = [(y, share) for y, share in found if share]
        shares = [share for _, share in rates]
        data.append(
            scatter(
                state, [100 * share.rate for share in shares], [y for y, _ in rates],
                error_x=bars(shares, thickness=2, width=6, color=f"@{state}"),
                marker={"color": f"@{state}", "size": 12, "symbol": ("circle", "square", "diamond")[index]},
                text=[f"{state}: {count_of(share)}" for share in shares],
            )
        )  # fmt: skip
    rows = [
        [names[key], *(count_of(share) if (share := getattr(m, key)) else "not measured" for m in states.values())]
        for key in kinds
    ]
    layout = {
        "xaxis": axis("share of answers, %", range=[-3, 103], zeroline=False),
        "yaxis": {
            "tickvals": list(range(len(kinds))), "ticktext": [names[key] for key in reversed(kinds)],
            "range": [-0.6, len(kinds) - 0.4], "zeroline": False,
        },
    }  # fmt: skip
    words = [
        f"{name.capitalize()}: {joined(f'{state} {text}' for state, text in zip(states, texts, strict=True))}"
        for name, *texts in rows
    ]
    summary = ". ".join([*words, "Bars are 95% Wilson intervals."])
    return Figure(
        "outcome", "Refusals and what may break", summary, data, layout, Table(["", *states], rows), ratio=0.42
    )


def strengths(loaded: Loaded) -> Figure | None:
    """The recipe's strengths over depth."""
    if not loaded.strengths:
        return None
    data, layout = _strength_traces(loaded.strengths)
    header = ["writer", "layer", "side", "strengths that aren't zero"]
    rows = [
        [row.name, "" if row.layer is None else str(row.layer), row.side, ", ".join(f"{s:.4g}" for s in row.strengths)]
        for row in loaded.strengths
    ]
    return Figure(
        "strengths", "Strengths over depth", _strength_summary(loaded.strengths, loaded.directions), data, layout,
        Table(header, rows), ratio=0.38,
    )  # fmt: skip


def point_strengths(loaded: Loaded) -> Figure | None:
    """The strengths of each point of the frontier; a click on a point, or the list, chooses."""
    known = [(point, point.strengths) for point in loaded.points if point.strengths]
    if len(known) != len(loaded.points) or not known:
        return None
    frames, rows = [], []
    for point, found in known:
        traces, layout = _strength_traces(found)
        words = f"{_point_words(point)}. {_strength_summary(found)}"
        frames.append(Frame(f"{point.label}{' (chosen)' if point.chosen else ''}", words, traces, layout))
        values = [row.largest for row in found if row.strengths] or [0.0]
        extremes = [f"{min(values):.3g}", f"{max(values):.3g}", str(len(values))]
        rows.append([point.label, count_of(point.refusal), number(point.divergence), *extremes])
    shown = next((i for i, (point, _) in enumerate(known) if point.chosen), 0)
    header = ["point", "not answered", "divergence", "least strength", "largest strength", "writers"]
    return Figure(
        "point-strengths", "Strengths of the point picked", frames[shown].summary, frames[shown].data,
        frames[shown].layout, Table(header, rows), frames, shown, "select", "point", ratio=0.38,
    )  # fmt: skip


def frontier(loaded: Loaded) -> Figure | None:
    """Refusals against divergence of the edits whose answers were decoded."""
    points = loaded.points
    if not points:
        return None
    x, y = [p.divergence for p in points], [100 * p.refusal.rate for p in points]
    chosen = [i for i, p in enumerate(points) if p.chosen]
    name, mode = ("frontier", "lines+markers") if loaded.has_frontier else ("candidates", "markers")
    data = [
        scatter(
            name, x, y, mode=mode, line={"color": "@muted", "width": 1},
            marker={"color": "@accent", "size": 13, "symbol": "circle"},
            error_y=bars([p.refusal for p in points], thickness=1.2, width=4, color="@muted"),
            text=[_point_words(p) for p in points],
        ),
        ring([(x[i], y[i]) for i in chosen]),
    ]  # fmt: skip
    layout = {
        "xaxis": axis("divergence, nats (cost)", range=[-0.04 * max(x), 1.08 * max(x)], zeroline=False),
        "yaxis": axis("refused or evaded, %", range=[-4, 104], zeroline=False),
    }
    what = "edits that the search judged" if loaded.has_frontier else "candidates whose answers were decoded"
    fewest = min(points, key=lambda p: (p.refusal.rate, p.divergence))
    summary = f"{len(points)} {what}, on validation prompts. Fewest not answered: {_point_words(fewest)}."
    if chosen:
        summary += f" Chosen: {_point_words(points[chosen[0]])}."
    header = ["point", "not answered", "divergence", "chosen"]
    rows = [[p.label, count_of(p.refusal), number(p.divergence), "yes" if p.chosen else ""] for p in points]
    title = "The frontier" if loaded.has_frontier else "Candidates: refusals against divergence"
    return Figure("frontier", title, summary, data, layout, Table(header, rows), picks="point-strengths", ratio=0.5)


def screened(loaded: Loaded) -> Figure | None:
    """Every candidate: refusal log-odds at the first token against divergence."""
    found = [
        (c, c.bypass, c.divergence)
        for c in loaded.results.candidates
        if c.bypass is not None and c.divergence is not None
    ]
    if len(found) < 2:
        return None
    winner = loaded.winner
    data: list[Trace] = []
    for stage, (colour, size) in STAGES.items():
        mine = [one for one in found if one[0].stage == stage]
        if mine:
            data.append(
                scatter(
                    stage, [max(cost, 1e-4) for _, _, cost in mine], [odds for _, odds, _ in mine],
                    text=[
                        f"{place_name(c)}: log-odds {number(odds)}, divergence {number(cost)}" for c, odds, cost in mine
                    ],
                    marker={"color": colour, "size": size, "opacity": 0.8},
                )
            )  # fmt: skip
    counts = joined(f"{len(trace['x'])} {trace['name']}" for trace in data)
    data.append(ring([(max(cost, 1e-4), odds) for c, odds, cost in found if winner and c.is_at(winner)]))
    layout = {
        "xaxis": axis("divergence, nats (log scale)", type="log", dtick="D2"),
        "yaxis": axis("refusal log-odds at the first token", zeroline=False),
    }
    summary = f"{len(found)} candidates ({counts}). Lower left is better: opens fewer refusals, changes less."
    if winner and winner.note:
        summary += f" The winner, {place_name(winner)}: {winner.note}."
    header = ["candidate", "stage", "log-odds", "induce", "divergence", "refusals", "note"]
    ordered = sorted((c for c, _, _ in found), key=lambda c: (c.layer, c.site, c.position or 0))
    return Figure(
        "candidates",
        "All candidates",
        summary,
        data,
        layout,
        Table(header, list(map(_candidate_row, ordered))),
        ratio=0.5,
    )


def _candidate_row(c: Candidate) -> list[str]:
    refusals = count_of(c.refusal) if c.refusal else ""
    odds = [digits(c.bypass, 3), digits(c.induce, 3)]
    return [place_name(c), c.stage or "", *odds, number(c.divergence), refusals, c.note]


def _strength_traces(rows: Sequence[WriterStrength]) -> tuple[list[Trace], dict[str, Any]]:
    data = []
    for side in (*SIDES, *_other_sides(rows)):
        mine = sorted((row for row in rows if row.side == side), key=lambda row: -1 if row.layer is None else row.layer)
        colour, (symbol, size) = f"@{side if side in SIDES else 'muted'}", SYMBOLS.get(side, OTHER)
        data.append(
            scatter(
                side or "writers", [-1 if row.layer is None else row.layer for row in mine],
                [row.largest for row in mine], mode="lines+markers",
                text=[f"{row.name}: {', '.join(f'{s:.3g}' for s in row.strengths) or '0'}" for row in mine],
                line={"color": colour, "width": 1.5}, marker={"color": colour, "size": size, "symbol": symbol},
            )
        )  # fmt: skip
    values = [row.largest for row in rows]
    low, high = min(0.0, *values), max(1.0, *values)
    margin = 0.08 * (high - low)
    layout = {
        "xaxis": layer_axis(1 + max(row.layer or 0 for row in rows), "layer (-1: embedding)"),
        "yaxis": axis("strength", range=[low - margin, high + margin]),
    }
    return data, layout


def _strength_summary(rows: Sequence[WriterStrength], directions: int = 0) -> str:
    parts = []
    for side in (*SIDES, *_other_sides(rows)):
        values = [row.largest for row in rows if row.side == side]
        if values:
            low, high = f"{min(values):.3g}", f"{max(values):.3g}"
            parts.append(f"{side or 'writers'} {low if low == high else f'{low} to {high}'} ({len(values)})")
    several = f" The edit has {directions} directions; a writer's largest strength is drawn." if directions > 1 else ""
    return f"1 removes a direction, 0 leaves a writer alone. {joined(parts).capitalize()}.{several}"


def _other_sides(rows: Iterable[WriterStrength]) -> list[str]:
    return sorted({row.side for row in rows} - set(SIDES))


def _point_words(point: Point) -> str:
    return (
        f"{point.label}: {count_of(point.refusal, interval=False)} not answered, divergence {number(point.divergence)}"
    )
