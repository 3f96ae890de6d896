"""A run's folder as a report reads it: results.json, report-data.json and the recipes beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.cards.words import number
from abliterate.common.errors import AbliterateError, RecipeError
from abliterate.common.names import public
from abliterate.measure.document import RunDocument, load_document, read_object
from abliterate.measure.numbers import Candidate, FrontierPoint, PlaceOf, Share

if TYPE_CHECKING:
    from abliterate.edit.edit import Edit

RESULTS = "results.json"
DATA = "report-data.json"
DATA_SCHEMA = 1


@dataclass(frozen=True)
class WriterStrength:
    """How much of its directions an edit takes out of one writer.

    Attributes:
        name: parameter name.
        layer: its block; None for an embedding, or where the run didn't say.
        side: "embedding", "attention", "mlp" ...; "" where the run didn't say.
        strengths: those that aren't zero.
    """

    name: str
    layer: int | None
    side: str
    strengths: tuple[float, ...]

    @property
    def largest(self) -> float:
        return max(self.strengths, key=abs, default=0.0)


@dataclass(frozen=True)
class Point:
    """An edit the search looked at: what it does, what it costs, and its strengths where they are known."""

    label: str
    refusal: Share
    """Answers to target prompts that are none: refused, or evaded where that is known."""
    divergence: float
    chosen: bool
    strengths: tuple[WriterStrength, ...] | None = None


@dataclass
class Loaded:
    """What a report is made of.

    Attributes:
        folder: where it lies.
        results: results.json.
        data: report-data.json, or None.
        missing: sentences about what isn't there and why.
        strengths: of recipe.safetensors, or None.
        directions: how many directions the recipe holds.
        points: the frontier, or the candidates whose answers were decoded.
        has_frontier: whether `points` are a frontier.
        show_completions: whether answers to target prompts may be shown.
    """

    folder: Path
    results: RunDocument
    data: dict[str, Any] | None = None
    missing: list[str] = field(default_factory=list)
    strengths: tuple[WriterStrength, ...] | None = None
    directions: int = 0
    points: list[Point] = field(default_factory=list)
    has_frontier: bool = False
    show_completions: bool = False

    @property
    def winner(self) -> Candidate | None:
        """The candidate chosen."""
        return self.results.recipe.direction if self.results.recipe else None

    def seen(self, *path: str) -> Any:
        """A value of report-data.json, or None where the path ends early."""
        tree: Any = self.data
        for name in path:
            if not isinstance(tree, dict):
                return None
            tree = tree.get(name)
        return tree


def load_run(out: str | Path, *, show_completions: bool = False) -> Loaded:
    """Read what `abliterate run` wrote.

    Args:
        out: its folder, or a results.json, also one that `abliterate measure --out` wrote.
        show_completions: let answers to target prompts through, where the run kept them.

    Raises:
        AbliterateError: when there is no results.json or it isn't one of abliterate's.
    """
    path = Path(out)
    file = path / RESULTS if path.is_dir() or not path.exists() else path
    if not file.is_file():
        raise AbliterateError(f"{out} holds no {RESULTS}; give the folder that `abliterate run` wrote")
    results = load_document(file)
    if not results.states:
        raise AbliterateError(f"{file} holds no measurement; give the folder that `abliterate run` wrote")
    loaded = Loaded(file.parent, results, show_completions=show_completions)
    _read_data(loaded)
    _read_recipe(loaded)
    _read_points(loaded)
    return loaded


def _read_data(loaded: Loaded) -> None:
    file = loaded.folder / DATA
    if not file.is_file():
        bare = loaded.results.about.runs_as_style or loaded.results.induced
        why = "a style or an induced behaviour has none" if bare else "`abliterate measure` writes none"
        left_out = "Separation, projection, cosines, the view by token and example answers are left out."
        loaded.missing.append(f"There is no {DATA} here: {why}. {left_out}")
        return
    loaded.data = read_object(file, DATA_SCHEMA)


def _read_recipe(loaded: Loaded) -> None:
    from abliterate.edit.recipe import load_recipe

    file = loaded.folder / "recipe.safetensors"
    if not file.is_file():
        loaded.missing.append("There is no recipe.safetensors here, so the strengths can't be drawn.")
        return
    edit = load_recipe(file).edit
    loaded.directions = len(edit.directions)
    loaded.strengths = _strengths(loaded, edit)


def _read_points(loaded: Loaded) -> None:
    if loaded.results.frontier:
        loaded.has_frontier = True
        loaded.points = [_frontier_point(loaded, n + 1, entry) for n, entry in enumerate(loaded.results.frontier)]
        return
    for entry in loaded.results.candidates:
        if entry.refusal is None or entry.divergence is None:
            continue
        chosen = loaded.winner is not None and entry.is_at(loaded.winner)
        uniform, strength = None, entry.strength
        if loaded.strengths is not None and strength is not None:
            uniform = tuple(replace(w, strengths=(strength,) if w.strengths else ()) for w in loaded.strengths)
        label = f"{len(loaded.points) + 1}. {place_name(entry)}"
        loaded.points.append(Point(label, entry.refusal, entry.divergence, chosen, uniform))


def place_name(entry: Candidate) -> str:
    """A candidate by where it was found: "layer 12 pre position -1, strength 0.9"."""
    name = _place(entry)
    if entry.second:
        name += f" with {_place(entry.second)}"
    return name if entry.strength in (None, 1.0) else f"{name}, strength {number(entry.strength)}"


def _place(place: Candidate | PlaceOf) -> str:
    return f"layer {place.layer} {place.site} position {place.position}"


def _frontier_point(loaded: Loaded, count: int, entry: FrontierPoint) -> Point:
    from abliterate.edit.recipe import load_recipe

    strengths = None
    file = loaded.folder / (entry.recipe or "")
    inside = file.resolve().is_relative_to(loaded.folder.resolve())
    if entry.recipe and inside and file.is_file():
        try:
            strengths = _strengths(loaded, load_recipe(file).edit)
        except RecipeError as error:
            loaded.missing.append(f"Strengths of point {count}: {public(str(error))}.")
    elif entry.strengths is not None:
        strengths = _of_all(loaded, entry.strengths)
    chosen = entry.chosen
    if chosen is None:
        chosen = strengths is not None and strengths == loaded.strengths
    return Point(f"point {count}", entry.not_answered or entry.refusal, entry.divergence, chosen, strengths)


def _strengths(loaded: Loaded, edit: Edit) -> tuple[WriterStrength, ...]:
    return _of_all(loaded, dict(zip(edit.writers, edit.strengths.tolist(), strict=True)))


def _of_all(loaded: Loaded, strengths: Mapping[str, Any]) -> tuple[WriterStrength, ...]:
    """The strengths at every writer of the model, zero where the edit leaves one alone."""
    known = {w["name"]: (w["layer"], w["side"]) for w in loaded.seen("writers") or ()}
    rows = []
    for name, values in {**strengths, **{name: [] for name in known if name not in strengths}}.items():
        layer, side = known.get(name) or (_layer_in(name), "")
        row = values if isinstance(values, list) else [values]
        rows.append(WriterStrength(name, layer, side, tuple(float(v) for v in row if v)))
    return tuple(rows)


def _layer_in(name: str) -> int | None:
    """The number in a parameter's name, for runs that didn't keep the writers' layers."""
    numbers = re.findall(r"\.(\d+)\.", name)
    return int(numbers[0]) if numbers else None
