"""What a recipe holds and how two differ, as values: `abliterate show` and `abliterate diff` print them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from abliterate.edit.edit import Edit, Part
from abliterate.edit.recipe import Recipe

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Place(NamedTuple):
    """A writer's row and column when strengths are drawn: its name but for the block's number, and that number."""

    kind: str
    layer: int | None


def place_of(writer: str) -> Place:
    """Where a parameter stands, read off its name: the first number in it is the block's.

    Example:
        >>> place_of("model.layers.12.mlp.down_proj.weight")
        Place(kind='mlp.down_proj', layer=12)
    """
    found = _NUMBER.search(writer)
    kind = writer[found.end() + 1 :] if found else writer.rsplit(".", 2)[-2] if writer.count(".") > 1 else writer
    return Place(kind.removesuffix(".weight"), int(found.group()) if found else None)


def strengths_by_place(edit: Edit) -> dict[str, dict[int | None, float]]:
    """Row -> layer -> strength; of a writer's several directions, the largest."""
    rows: dict[str, dict[int | None, float]] = {}
    for writer, strengths in zip(edit.writers, edit.strengths, strict=True):
        kind, layer = place_of(writer)
        rows.setdefault(kind, {})[layer] = _largest(strengths)
    return rows


def description(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON, all but the directions' values."""
    edit = recipe.edit
    return {
        "schema": 1,
        "model": recipe.model,
        "provenance": recipe.provenance,
        "d_model": edit.d_model,
        "directions": [_direction(edit, index) for index in range(len(edit.directions))],
        "writers": [
            {
                "name": name,
                "layer": place_of(name).layer,
                "strengths": row.tolist(),
                "tensors": [tensor.name for tensor in recipe.tensors.get(name, ())],
            }
            for name, row in zip(edit.writers, edit.strengths, strict=True)
        ],
        "shifts": [{"layer": shift.layer, "size": shift.size} for shift in edit.shifts],
    }


def _direction(edit: Edit, index: int) -> dict[str, Any]:
    """How a direction is used: by how many writers, of which layers, how strongly."""
    column = edit.strengths[:, index]
    used = column.nonzero()[0].tolist()
    layers = [layer for i in used if (layer := place_of(edit.writers[i]).layer) is not None]
    return {
        "writers": len(used),
        "layers": [min(layers), max(layers)] if layers else None,
        "strength": {"min": float(column[used].min()), "max": float(column[used].max())} if used else None,
    }


def difference(left: Recipe, right: Recipe) -> dict[str, Any]:
    """What differs between two recipes.

    Returns:
        `only_left`, `only_right`: writers that one edits and the other doesn't; `writers`: of those in both, the two
        strengths (of several directions the largest) and the cosine between what they take out (between spans: of
        the smallest angle; None for models of different width); `shifts`: per layer, the two sizes and the
        cosine; `model`, `provenance`: dotted name -> the two values where they differ.
    """
    ours, theirs = left.edit.parts, right.edit.parts
    both = [name for name in ours if name in theirs]
    return {
        "schema": 1,
        "only_left": [name for name in ours if name not in theirs],
        "only_right": [name for name in theirs if name not in ours],
        "writers": [
            {
                "name": name,
                "layer": place_of(name).layer,
                "left": _largest(ours[name].strengths),
                "right": _largest(theirs[name].strengths),
                "cosine": _cosine(ours[name], theirs[name]),
            }
            for name in both
        ],
        "shifts": _shifts(left.edit, right.edit),
        "model": _changes(left.model, right.model),
        "provenance": _changes(left.provenance, right.provenance),
    }


def same(document: dict[str, Any]) -> bool:
    """Whether `difference` found none in what the recipes do."""
    pairs = [*document["writers"], *document["shifts"]]
    apart = document["only_left"] or document["only_right"]
    return not apart and all(p["left"] == p["right"] and (p["cosine"] or 0.0) > 1 - 1e-6 for p in pairs)


def _shifts(left: Edit, right: Edit) -> list[dict[str, Any]]:
    rows = []
    for layer in sorted({shift.layer for shift in (*left.shifts, *right.shifts)}):
        ours, theirs = (
            np.sum([s.vector for s in edit.shifts if s.layer == layer] or [np.zeros(edit.d_model, np.float32)], axis=0)
            for edit in (left, right)
        )
        sizes = [float(np.linalg.norm(total)) for total in (ours, theirs)]
        comparable = len(ours) == len(theirs) and all(sizes)
        cosine = float(ours.astype(np.float64) @ theirs.astype(np.float64)) / math.prod(sizes) if comparable else None
        rows.append({"layer": layer, "left": sizes[0], "right": sizes[1], "cosine": cosine})
    return rows


def _largest(strengths: np.ndarray) -> float:
    return float(strengths[np.abs(strengths).argmax()]) if len(strengths) else 0.0


def _cosine(left: Part, right: Part) -> float | None:
    """Cosine between two directions, without its sign (taking out -r is taking out r); between two spans, of the
    smallest angle."""
    if left.directions.shape[1] != right.directions.shape[1]:
        return None
    return float(np.linalg.norm(left.directions.astype(np.float64) @ right.directions.astype(np.float64).T, 2))


def _changes(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, list[Any]]:
    ours, theirs = _flat(left), _flat(right)
    names = dict.fromkeys((*ours, *theirs))
    return {n: [ours.get(n), theirs.get(n)] for n in names if ours.get(n) != theirs.get(n)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects, by dotted names."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    leaves = {}
    for key in sorted(value):
        leaves.update(_flat(value[key], f"{prefix}.{key}" if prefix else key))
    return leaves
