"""What a fit writes down as it goes, so that a killed one goes on to the same result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.common.resumable import read_state, write_state
from abliterate.edit.edit import Edit
from abliterate.measure.rates import Rate
from abliterate.search.frontier import FrontierPoint

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class FitState:
    """A fit's variables, its optimiser's moments and the points found; in memory alone without a `path`.

    Attributes:
        path: the safetensors file it is kept in.
        key: what the fit depends on, as a hash; another fit's file is refused.
        step: gradient steps done.
        next_stop: the step at which the next point is judged.
        first: the first block that is edited.
        looked: whether refusals in other words were looked for.
        others: token ids of prompts and openings of those found, and of evasions, as they were found.
        evasions: sentences that became common in place of answers, in normal form.
        points: the points judged so far.
    """

    path: Path | None = None
    key: str = ""
    step: int = 0
    next_stop: int = 0
    first: int = 0
    looked: bool = False
    others: list[tuple[list[list[int]], list[list[int]]]] = field(default_factory=list)
    evasions: list[str] = field(default_factory=list)
    points: list[FrontierPoint] = field(default_factory=list)
    _tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _bound: tuple[Tensor, Tensor, torch.optim.Optimizer] | None = field(default=None, repr=False)

    @classmethod
    def at(cls, path: Path, key: str, *, resume: bool) -> FitState:
        """The state kept at `path`, or a new one to be kept there.

        Raises:
            OutputError: when `resume` and the file is another fit's or is damaged.
        """
        kept = read_state(path, key, "a run") if resume else None
        if kept is None:
            return cls(path, key)
        document, tensors = kept
        points = [_point(note, tensors, i) for i, note in enumerate(document.pop("points"))]
        return cls(path, key, points=points, _tensors=tensors, **document)

    def bind(self, vectors: Tensor, strengths: Tensor, optimiser: torch.optim.Optimizer) -> None:
        """Say which variables are kept; they and the optimiser take the values read, if any."""
        self._bound = (vectors, strengths, optimiser)
        if "vectors" not in self._tensors:
            return
        with torch.no_grad():
            vectors.copy_(self._tensors["vectors"])
            strengths.copy_(self._tensors["strengths"])
        for name, variable in (("vectors", vectors), ("strengths", strengths)):
            moments = {m: self._tensors[f"{name}.{m}"] for m in _MOMENTS if f"{name}.{m}" in self._tensors}
            if moments:
                optimiser.state[variable] = {m: value.clone() for m, value in moments.items()}

    def clear(self) -> None:
        """Forget the values read: what is bound next starts from its own."""
        self._tensors = {}

    def save(self) -> None:
        """Write it all down; whole or not at all."""
        if self.path is None or self._bound is None:
            return
        vectors, strengths, optimiser = self._bound
        tensors = {"vectors": vectors.detach(), "strengths": strengths.detach()}
        for name, variable in (("vectors", vectors), ("strengths", strengths)):
            for moment, value in optimiser.state.get(variable, {}).items():
                tensors[f"{name}.{moment}"] = value
        for i, point in enumerate(self.points):
            tensors[f"point.{i}.directions"] = torch.from_numpy(point.edit.directions)
            tensors[f"point.{i}.strengths"] = torch.from_numpy(point.edit.strengths)
        names = ("step", "next_stop", "first", "looked", "others", "evasions")
        document = {name: getattr(self, name) for name in names} | {"points": [_note(p) for p in self.points]}
        write_state(self.path, self.key, document, tensors)


def _note(point: FrontierPoint) -> dict[str, Any]:
    return {
        "writers": list(point.edit.writers),
        "refused": [point.refused.count, point.refused.total],
        "divergence": point.divergence,
        "note": point.said,
    }


def _point(note: dict[str, Any], tensors: dict[str, Tensor], index: int) -> FrontierPoint:
    edit = Edit(tuple(note["writers"]), tensors[f"point.{index}.directions"], tensors[f"point.{index}.strengths"])
    return FrontierPoint(edit, Rate(*note["refused"]), note["divergence"], **note["note"])
