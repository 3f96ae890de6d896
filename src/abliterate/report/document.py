"""A run's folder as a report reads it: results.json, report-data.json and the recipes beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from abliterate.common.errors import AbliterateError, RecipeError

STATES = ("original", "edited", "healed")
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
    refusal: dict[str, Any]
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
    results: dict[str, Any]
    data: dict[str, Any] | None = None
    missing: list[str] = field(default_factory=list)
    strengths: tuple[WriterStrength, ...] | None = None
    directions: int = 0
    points: list[Point] = field(default_factory=list)
    has_frontier: bool = False
    show_completions: bool = False

    @property
    def states(self) -> list[tuple[str, dict[str, Any]]]:
        """The measurements that are there: (name, its object of results.json)."""
        return [(name, self.results[name]) for name in STATES if self.results.get(name)]

    def get(self, *path: str) -> Any:
        """A value of results.json, or None where the path ends early."""
        return _get(self.results, path)

    def seen(self, *path: str) -> Any:
        """A value of report-data.json, or None."""
        return _get(self.data, path)


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
    results = _read(file)
    if not any(isinstance(results.get(name), dict) for name in STATES):
        raise AbliterateError(f"{file} holds no measurement; give the folder that `abliterate run` wrote")
    loaded = Loaded(file.parent, results, show_completions=show_completions)
    _read_data(loaded)
    _read_recipe(loaded)
    _read_points(loaded)
    return loaded


def public(text: str) -> str:
    """Text in which absolute paths are cut to their last part: a report is shared, this machine's folders are not."""
    return re.sub(r"(?<![\w:/\\.])(?:~|[A-Za-z]:)?[\\/](?:[^\s\\/'\"`]+[\\/])*([^\s\\/'\"`]*)", r"\1", text)


def public_source(source: str) -> str:
    """A model's or prompt set's source: a Hub id as it is, a file or folder without its path."""
    if re.match(r"[~.\\/]|[A-Za-z]:[\\/]", source) or source.count("/") > 1 or Path(source).is_file():
        return re.split(r"[\\/]", source.rstrip("\\/"))[-1] or "model"
    return source


def _get(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(name)
    return tree


def _read(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AbliterateError(f"{file} can't be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise AbliterateError(f"{file} is not one of abliterate's: it holds no JSON object")
    return document


def _read_data(loaded: Loaded) -> None:
    file = loaded.folder / DATA
    if not file.is_file():
        loaded.missing.append(
            f"There is no {DATA} here: `abliterate measure` writes none, and neither did `abliterate run` before it "
            "made reports. Separation, projection, cosines, the view by token and example answers are left out."
        )
        return
    data = _read(file)
    if data.get("schema") != DATA_SCHEMA:
        raise AbliterateError(f"{file} has schema {data.get('schema')}; this version reads {DATA_SCHEMA}")
    loaded.data = data


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
    frontier = loaded.results.get("frontier")
    if frontier:
        loaded.has_frontier = True
        loaded.points = [_frontier_point(loaded, number, entry) for number, entry in enumerate(frontier)]
        return
    winner = loaded.get("recipe", "direction") or {}
    for entry in loaded.results.get("candidates") or ():
        if entry.get("refusal") is None or entry.get("divergence") is None:
            continue
        chosen = is_chosen(entry, winner)
        strength = entry.get("strength")
        uniform = None
        if loaded.strengths is not None and strength is not None:
            uniform = tuple(replace(w, strengths=(strength,) if w.strengths else ()) for w in loaded.strengths)
        label = f"{len(loaded.points) + 1}. {place_name(entry)}"
        loaded.points.append(Point(label, entry["refusal"], entry["divergence"], chosen, uniform))


def is_chosen(candidate: dict[str, Any], winner: dict[str, Any]) -> bool:
    """Whether a candidate of results.json is the one that was chosen."""
    return all(candidate.get(key) == winner.get(key) for key in ("layer", "site", "position", "second", "strength"))


def place_name(entry: dict[str, Any]) -> str:
    """A candidate by where it was found: "layer 12 pre position -1, strength 0.9"."""
    name = f"layer {entry['layer']} {entry['site']} position {entry['position']}"
    second = entry.get("second")
    if second:
        name += f" with layer {second['layer']} {second['site']} position {second['position']}"
    strength = entry.get("strength", 1.0)
    return name if strength == 1.0 else f"{name}, strength {strength:g}"


def _frontier_point(loaded: Loaded, number: int, entry: dict[str, Any]) -> Point:
    from abliterate.edit.recipe import load_recipe

    strengths = None
    file = loaded.folder / str(entry.get("recipe", ""))
    inside = file.resolve().is_relative_to(loaded.folder.resolve())
    if entry.get("recipe") and inside and file.is_file():
        try:
            strengths = _strengths(loaded, load_recipe(file).edit)
        except RecipeError as error:
            loaded.missing.append(f"Strengths of point {number + 1}: {public(str(error))}.")
    elif isinstance(entry.get("strengths"), dict):
        strengths = _of_all(loaded, entry["strengths"])
    chosen = entry.get("chosen")
    if chosen is None:
        chosen = strengths is not None and strengths == loaded.strengths
    return Point(f"point {number + 1}", entry["refusal"], entry["divergence"], bool(chosen), strengths)


def _strengths(loaded: Loaded, edit: Any) -> tuple[WriterStrength, ...]:
    return _of_all(loaded, dict(zip(edit.writers, edit.strengths.tolist(), strict=True)))


def _of_all(loaded: Loaded, strengths: dict[str, Any]) -> tuple[WriterStrength, ...]:
    """The strengths at every writer of the model, zero where the edit leaves one alone."""
    left_alone: dict[str, Any] = {w["name"]: [] for w in loaded.seen("writers") or () if w["name"] not in strengths}
    return tuple(_named(loaded, name, value) for name, value in {**strengths, **left_alone}.items())


def _named(loaded: Loaded, name: str, values: Any) -> WriterStrength:
    layer, side = next(
        ((w["layer"], w["side"]) for w in loaded.seen("writers") or () if w["name"] == name), (_layer_in(name), "")
    )
    row = values if isinstance(values, list) else [values]
    return WriterStrength(name, layer, side, tuple(float(v) for v in row if v))


def _layer_in(name: str) -> int | None:
    """The number in a parameter's name, for runs that didn't keep the writers' layers."""
    numbers = re.findall(r"\.(\d+)\.", name)
    return int(numbers[0]) if numbers else None
