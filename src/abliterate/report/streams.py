"""The charts of the residual stream, from report-data.json: separation, projection, cosines, the view by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from abliterate.cards.tables import Table
from abliterate.cards.words import number, percent
from abliterate.common.errors import shorten
from abliterate.measure.numbers import PlaceOf
from abliterate.report.charts import Figure, Frame, Trace, axis, digits, heat, layer_axis, scatter, stars
from abliterate.report.document import Loaded

SITES_DRAWN = ("pre", "mid")  # `post` of a block is `pre` of the next
PROMPT_SIDES = ("target", "baseline")
READ = ("original", "edited")


def separation(loaded: Loaded) -> list[Figure]:
    """How far apart target and baseline prompts lie, per layer and site: four charts."""
    if not loaded.seen("separation"):
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
    points = [p for side in PROMPT_SIDES for plane in found[side] for p in plane]
    reach = 1.05 * max((abs(v) for p in points for v in p), default=1.0)
    shown = loaded.seen("place", "layer")
    frames, rows = [], []
    for layer, share in enumerate(found["shares"]):
        planes = [found[side][layer] for side in PROMPT_SIDES]
        traces = [{"x": [p[0] for p in plane], "y": [p[1] for p in plane]} for plane in planes]
        chosen, seen, apart = " (chosen)" if layer == shown else "", sum(v or 0 for v in share), _apart(*planes)
        words = (
            f"Layer {layer}, site {found['site']}{chosen}: the plane holds {percent(seen)} of the variance; the two "
            f"sides' centres are {number(apart)} apart, where 1 is the root mean square distance of a prompt from the "
            "middle."
            if seen
            else f"Layer {layer}, site {found['site']}{chosen}: every prompt has the same vector here."
        )
        frames.append(Frame(f"layer {layer}{chosen}", words, traces))
        rows.append([str(layer), percent(share[0] or 0), percent(share[1] or 0), number(apart)])
    data = [
        scatter(
            f"{side} prompts", [], [], text=found["prompts"][side],
            marker={"color": f"@{side}", "size": 8, "opacity": 0.75, "symbol": symbol},
        )
        for side, symbol in zip(PROMPT_SIDES, ("circle", "diamond"), strict=True)
    ]  # fmt: skip
    layout = {
        f"{letter}axis": axis(f"{which} axis", range=[-reach, reach], zeroline=False)
        for letter, which in (("x", "first"), ("y", "second"))
    }
    header = ["layer", "variance on the first axis", "on the second", "distance of the centres"]
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
    chosen, layers = loaded.seen("place", "layer"), list(range(len(found[sites[0]])))
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
    hover = "layers %{y} and %{x}: %{z:.2f}<extra></extra>"
    data = [heat(len(layers), layers, 1, "cosine", hovertemplate=hover)]
    layout = {
        "xaxis": layer_axis(len(layers), constrain="domain", showgrid=False),
        "yaxis": layer_axis(len(layers), showgrid=False),
    }
    shown = sites.index(loaded.seen("place", "site")) if loaded.seen("place", "site") in sites else 0
    header = ["layer", *(f"{site}, with the next layer's" for site in sites)]
    rows = [[str(n), *(digits(found[site][n][n + 1], 3) for site in sites)] for n in layers[:-1]]
    return Figure(
        "cosines", "Do layers share a direction?", frames[shown].summary, data, layout, Table(header, rows), frames,
        shown, "select", "site", ratio=0.62,
    )  # fmt: skip


def tokens(loaded: Loaded) -> Figure | None:
    """The direction's share of the stream at every token of a few prompts, by layer."""
    found = loaded.seen("tokens")
    if not found:
        return None
    reach = max((abs(v) for e in found for s in READ for _, _, v in _cells(e.get(s) or ())), default=1.0) or 1.0
    frames, rows = [], []
    for entry in found:
        labels = [_visible(token) for token in entry["tokens"]]
        prompt = f"{entry['side']}: {shorten(entry['prompt'], 48)}"
        ticks = {"tickvals": list(range(len(labels))), "ticktext": labels}
        across = {"xaxis": axis("token", tickangle=-60, showgrid=False, zeroline=False, **ticks)}
        for state in READ:
            if not entry.get(state):
                continue
            words = f"{entry['side'].capitalize()} prompt, {state}: {_token_words(entry[state], labels)}"
            hover = [[f"layer {i}, {label}: {digits(v, 3)}" for label, v in zip(labels, row or [], strict=False)]
                     for i, row in enumerate(entry[state])]  # fmt: skip
            trace = {"z": entry[state], "x": ticks["tickvals"], "text": hover}
            frames.append(Frame(f"{prompt} ({state})", words, [trace], across))
            value, layer = _largest_at_last(entry[state])
            rows.append([prompt, state, digits(value, 3), str(layer)])
    layers = loaded.seen("layers")
    data = [heat(layers, [], reach, "share", hoverinfo="text")]
    header = ["prompt", "model", "last token, largest share", "at layer"]
    return Figure(
        "tokens", "The direction along a prompt's tokens", frames[0].summary, data,
        {"yaxis": layer_axis(layers, showgrid=False)}, Table(header, rows), frames, 0, "select", "prompt and model",
        ratio=0.62,
    )  # fmt: skip


def _by_layer(loaded: Loaded, key: str, title: str, label: str, meaning: str) -> Figure:
    table, layers = loaded.seen("separation"), loaded.seen("layers")
    sites = [site for site in SITES_DRAWN if any(v is not None for v in table[site][key])]
    chosen = [(place.layer, place.site, table[place.site][key][place.layer]) for place in _chosen(loaded)]
    data = [_site_line(site, table[site][key]) for site in sites]
    data.append(stars([(layer, value) for layer, _, value in chosen]))
    found = [(v, layer, site) for site in sites for layer, v in enumerate(table[site][key]) if v is not None]
    summary = f"{meaning}."
    if found and key == "cosine":
        value, layer, site = min(found)
        summary += f" Least alike: {value:.3f} at layer {layer} {site}."
    elif found:
        value, layer, site = max(found, key=lambda one: (one[0], -one[1]))
        summary += f" Highest: {value:.3f}, first at layer {layer} {site}."
    for layer, site, height in chosen:
        summary += f" Chosen, layer {layer} {site}: {digits(height, 3)}."
    rows = [[str(n), *(digits(table[site][key][n], 4) for site in table)] for n in range(layers)]
    layout = {"xaxis": layer_axis(layers), "yaxis": axis(label)}
    return Figure(f"separation-{key}", title, summary, data, layout, Table(["layer", *table], rows), ratio=0.6)


def _norms(loaded: Loaded) -> Figure:
    table, layers = loaded.seen("separation"), loaded.seen("layers")
    site, chosen = loaded.seen("place", "site"), loaded.seen("place", "layer")
    data = [
        {**_site_line(site, table[site][f"{side}_norm"]), "name": side, "line": {"color": f"@{side}"},
         "marker": {"color": f"@{side}", "size": 4}}
        for side in PROMPT_SIDES
    ]  # fmt: skip
    data.append(stars([(chosen, table[site]["target_norm"][chosen])]))
    target, baseline = (digits(table[site][f"{side}_norm"][chosen], 2) for side in PROMPT_SIDES)
    summary = (
        f"Mean length of the vectors at site {site}. At the chosen layer {chosen}: {target} for target prompts, "
        f"{baseline} for baseline prompts."
    )
    columns = [(s, side) for s in table for side in PROMPT_SIDES]
    rows = [[str(n), *(digits(table[s][f"{side}_norm"][n], 2) for s, side in columns)] for n in range(layers)]
    header = ["layer", *(f"{s}, {side}" for s, side in columns)]
    layout = {"xaxis": layer_axis(layers), "yaxis": axis("norm", type="log", dtick="D2")}
    return Figure("separation-norm", "Norms", summary, data, layout, Table(header, rows), ratio=0.6)


def _site_line(site: str, values: Sequence[float | None]) -> Trace:
    dash, symbol = ("solid", "circle") if site == "pre" else ("dot", "square")
    return scatter(
        site, range(len(values)), values, mode="lines+markers", line={"color": f"@{site}", "dash": dash},
        marker={"color": f"@{site}", "size": 5, "symbol": symbol}, hovertemplate="layer %{x}: %{y:.4g}",
    )  # fmt: skip


def _chosen(loaded: Loaded) -> list[PlaceOf]:
    """Where the directions chosen were found."""
    second = loaded.winner.second if loaded.winner else None
    return [PlaceOf.model_validate(loaded.seen("place")), *([second] if second else [])]


def _apart(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Distance of the centres of two clouds in a plane."""
    centres = [[sum(p[axis] for p in plane) / len(plane) for axis in (0, 1)] for plane in (first, second)]
    return float(sum((a - b) ** 2 for a, b in zip(*centres, strict=True)) ** 0.5)


def _alike(rows: Sequence[Sequence[float | None]], chosen: int) -> str:
    near = [layer for layer, value in enumerate(rows[chosen]) if value is not None and value >= 0.8]
    if not near:
        return "the chosen layer has none at this site."
    return f"layers within a cosine of 0.8 of the chosen layer {chosen}, itself counted: {len(near)} of {len(rows)}."


def _cells(rows: Sequence[Any]) -> Iterable[tuple[int, int, float]]:
    """(layer, token, value) of the values that are there."""
    return ((layer, i, v) for layer, row in enumerate(rows) for i, v in enumerate(row or ()) if v is not None)


def _largest_at_last(rows: Sequence[Sequence[float | None] | None]) -> tuple[float | None, int]:
    last = [(row[-1], layer) for layer, row in enumerate(rows) if row and row[-1] is not None]
    return max(last, key=lambda pair: abs(pair[0] or 0), default=(None, 0))


def _token_words(rows: Sequence[Any], labels: Sequence[str]) -> str:
    peak, layer, place = max(((abs(v), layer, i) for layer, i, v in _cells(rows)), default=(0.0, 0, 0))
    last, where = _largest_at_last(rows)
    return (
        f"the direction's share of the stream (r·h/|h|) is largest at token {place + 1} of {len(labels)}, "
        f"“{labels[place]}”, layer {layer}: {peak:.3f}; at the last token it reaches {digits(last, 3)} at layer "
        f"{where}."
    )


def _visible(token: str) -> str:
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    return ("␣" if shown.startswith(" ") and not shown.strip() else "") + (shown.strip() or ("" if shown else "∅"))
