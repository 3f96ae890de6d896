"""`abliterate show` and `abliterate diff`: what a recipe does, and how two differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from abliterate.commands.options import Output, command
from abliterate.common.errors import counted

if TYPE_CHECKING:
    from rich.console import Console

    from abliterate.edit.recipe import Recipe

RecipeFile = Annotated[Path, "recipe.safetensors, or the folder that `run` wrote."]

MOST_ROWS = 12
LABEL_WIDTH = 24
LAYERS_PER_LINE = 40  # with its label and numbers, a line of strengths fits 80 columns


@command("", "abliterate show model-abliterated/recipe.safetensors", shares="json")
def show(recipe: RecipeFile, io: Output) -> None:
    """Print a recipe: its model, where it comes from, what was measured, and its strengths over layers."""
    from abliterate.edit.compare import description
    from abliterate.edit.recipe import load_recipe, recipe_file

    loaded = load_recipe(recipe)
    document = description(loaded)
    io.result(document)
    if not io.json:
        _print_recipe(recipe_file(recipe), loaded, document)


@command("", "abliterate diff a/recipe.safetensors b/recipe.safetensors --json", shares="json")
def diff(left: RecipeFile, right: RecipeFile, io: Output) -> None:
    """Print how two recipes differ: writers, strengths, directions (cosines), provenance."""
    from abliterate.edit.compare import difference
    from abliterate.edit.recipe import load_recipe

    pair = load_recipe(left), load_recipe(right)
    document = difference(*pair)
    io.result(document)
    if not io.json:
        _print_difference(left, right, document)


def _print_recipe(file: Path, recipe: Recipe, document: dict[str, Any]) -> None:
    from abliterate.commands.terminal import output

    console, edit = output(), recipe.edit
    _line(console, f"{file}: {file.stat().st_size:,} bytes")
    _fields(console, "model", recipe.model)
    _fields(console, "provenance", {k: v for k, v in recipe.provenance.items() if k not in ("original", "edited")})
    _measured(console, recipe.provenance)
    named = sum(len(tensors) for tensors in recipe.tensors.values())
    _line(
        console,
        f"{counted(len(edit.directions), 'direction')} of {edit.d_model} entries"
        f", {counted(len(edit.writers), 'writer')}"
        + (f" ({counted(named, 'checkpoint tensor')})" if named else "")
        + (f", {counted(len(edit.shifts), 'shift')}" if edit.shifts else ""),
        title=True,
    )
    for index, entry in enumerate(document["directions"][:MOST_ROWS]):
        _line(console, f"  {index}: {_use(entry)}")
    _rest(console, len(document["directions"]) - MOST_ROWS)
    for shift in edit.shifts:
        _line(console, f"  shift at layer {shift.layer} by {shift.size:+.3g}")
    _draw_strengths(console, recipe)


def _use(entry: dict[str, Any]) -> str:
    if not entry["writers"]:
        return "not used"
    low, high = entry["strength"]["min"], entry["strength"]["max"]
    layers = (
        "no layer" if entry["layers"] is None else "layer {}".format("-".join(map(str, dict.fromkeys(entry["layers"]))))
    )
    return f"{counted(entry['writers'], 'writer')}, {layers}, strength {_range(low, high)}"


def _measured(console: Console, provenance: dict[str, Any]) -> None:
    """The closing table of the run that made the recipe, where provenance holds its numbers."""
    from abliterate.cards.tables import results_of
    from abliterate.commands.terminal import result_table

    table = results_of(provenance)
    if table is None:  # free-form: another tool may write its own
        _fields(console, "measured", {k: provenance[k] for k in ("original", "edited") if k in provenance})
        return
    console.print(result_table(table))


def _draw_strengths(console: Console, recipe: Recipe) -> None:
    """A row of bars per kind of writer, a column per layer."""
    from abliterate.edit.compare import strengths_by_place

    rows = strengths_by_place(recipe.edit)
    values = [value for row in rows.values() for value in row.values()]
    layers = [layer for row in rows.values() for layer in row if layer is not None]
    if not values:
        return
    top = max(1.0, *map(abs, values))
    _line(console, f"strengths over layers (1 removes, 0 leaves alone; bars up to {top:.2f})", title=True)
    for kind, row in rows.items():
        if list(row) == [None]:
            _line(console, f"  {_label(kind)} {row[None]:.2f}")
    last = max([*layers, int(recipe.model.get("layers", 0)) - 1])
    for start in range(0, last + 1, LAYERS_PER_LINE) if layers else ():
        shown = range(start, min(start + LAYERS_PER_LINE, last + 1))
        _line(console, f"  {_label('layer')} {_ruler(shown)}")
        for kind, row in rows.items():
            here = [row[layer] for layer in shown if layer in row]
            if here:
                bars = "".join(_bar(row.get(layer), top, console) for layer in shown)
                _line(console, f"  {_label(kind)} {bars} {_range(min(here), max(here))}")
    if any(value < 0 for value in values):
        _line(console, "  - strengthens (negative strength)")


def _bar(value: float | None, top: float, console: Console) -> str:
    """One character: how much is taken out at one writer."""
    if value is None:
        return " "
    if value < 0:
        return "-"
    marks = "▁▂▃▄▅▆▇█" if console.encoding.lower().startswith("utf") else "12345678"
    return "." if value == 0 else marks[min(len(marks) - 1, int(value / top * len(marks)))]


def _ruler(layers: range) -> str:
    """Layer numbers, every fifth."""
    text = ""
    for column, layer in enumerate(layers):
        if layer % 5 == 0 and len(text) <= column:
            text = text.ljust(column) + str(layer)
    return text[: len(layers) + 2]


def _print_difference(left: Path, right: Path, document: dict[str, Any]) -> None:
    from abliterate.commands.terminal import output
    from abliterate.edit.compare import place_of, same

    console = output()
    _line(console, f"left: {left}")
    _line(console, f"right: {right}")
    for side in ("left", "right"):
        names = document[f"only_{side}"]
        if names:
            _line(console, f"only {side} edits {counted(len(names), 'writer')}", title=True)
            _listed(console, names)
    if same(document):
        _line(console, "the edits are the same", title=True)
    else:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for pair in document["writers"]:
            kinds.setdefault(place_of(pair["name"]).kind, []).append(pair)
        _pairs(console, "writers in both", kinds)
        _pairs(console, "shifts", {f"layer {pair['layer']}": [pair] for pair in document["shifts"]})
    _by_layer(console, document)
    for part in ("model", "provenance"):
        changes = document[part]
        if changes:
            _line(console, f"{part}: {counted(len(changes), 'difference')}", title=True)
            _listed(console, [f"{name}: {_text(old, 40)} | {_text(new, 40)}" for name, (old, new) in changes.items()])


def _pairs(console: Console, title: str, kinds: dict[str, list[dict[str, Any]]]) -> None:
    from rich.table import Table
    from rich.text import Text

    if not kinds:
        return
    table = Table(title=title, title_style="bold", title_justify="left")
    for heading in ("", "left", "right", "right - left", "cosine"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for kind, pairs in kinds.items():
        columns = [[p["left"] for p in pairs], [p["right"] for p in pairs], [p["right"] - p["left"] for p in pairs]]
        cosines = [p["cosine"] for p in pairs if p["cosine"] is not None]
        cells = [_range(min(column), max(column)) for column in columns]
        table.add_row(Text(kind), *cells, _range(min(cosines), max(cosines)) if cosines else "-")
    console.print(table)


def _by_layer(console: Console, document: dict[str, Any]) -> None:
    """The cosine between the two recipes' directions, layer by layer, where it isn't 1 everywhere."""
    layers: dict[int, list[float]] = {}
    for pair in document["writers"]:
        if pair["layer"] is not None and pair["cosine"] is not None:
            layers.setdefault(pair["layer"], []).append(pair["cosine"])
    if not layers or min(min(cosines) for cosines in layers.values()) > 1 - 1e-6:
        return
    _line(console, "cosine between directions, by layer", title=True)
    cells = [f"{layer:>4}: {_range(min(found), max(found)):<14}" for layer, found in sorted(layers.items())]
    for start in range(0, len(cells), 3):
        _line(console, "".join(cells[start : start + 3]))


def _fields(console: Console, title: str, values: dict[str, Any]) -> None:
    """A JSON object, a line per entry, nested ones shortened."""
    if not values:
        return
    _line(console, title, title=True)
    for key, value in values.items():
        _line(console, f"  {_text(key, 30)}: {_text(value, 100)}")


def _listed(console: Console, lines: list[str]) -> None:
    for text in lines[:MOST_ROWS]:
        _line(console, f"  {text}")
    _rest(console, len(lines) - MOST_ROWS)


def _rest(console: Console, count: int) -> None:
    if count > 0:
        _line(console, f"  and {count} more (--json lists all)")


def _line(console: Console, text: str, *, title: bool = False) -> None:
    console.print(text, style="bold" if title else None, markup=False, highlight=False, soft_wrap=True)


def _text(value: Any, width: int) -> str:
    """Any JSON value on one line, nothing in it that a terminal would obey."""
    from abliterate.common.errors import shorten

    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shorten("".join(c if c.isprintable() else " " for c in text), width)


def _label(kind: str) -> str:
    """A row's name, its end kept when it is long."""
    return (kind if len(kind) <= LABEL_WIDTH else f"…{kind[1 - LABEL_WIDTH :]}").ljust(LABEL_WIDTH)


def _range(low: float, high: float) -> str:
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}..{high:.2f}"
