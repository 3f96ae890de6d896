"""What a fit writes down as it goes, so that a killed one goes on to the same result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.common.errors import OutputError
from abliterate.common.files import whole_file
from abliterate.edit.edit import Edit
from abliterate.measure.rates import Rate
from abliterate.search.frontier import FrontierPoint

KEY = "abliterate.fit"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class FitState:
    """A fit's variables, its optimiser's moments and the points found; in memory alone without a `path`.

    Attributes:
        path: the safetensors file it is kept in.
        key: what the fit depends on, as a hash; another fit's file is refused.
        step: gradient steps done.
        next_stop: the step at which the next point is judged.
        looked: whether refusals in other words were looked for.
        prompts, openings: token ids of those found.
        points: the points judged so far.
    """

    path: Path | None = None
    key: str = ""
    step: int = 0
    next_stop: int = 0
    looked: bool = False
    prompts: list[list[int]] = field(default_factory=list)
    openings: list[list[int]] = field(default_factory=list)
    points: list[FrontierPoint] = field(default_factory=list)
    _tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _bound: tuple[Tensor, Tensor, torch.optim.Optimizer] | None = field(default=None, repr=False)

    @classmethod
    def at(cls, path: Path, key: str, *, resume: bool) -> FitState:
        """The state kept at `path`, or a new one to be kept there.

        Raises:
            OutputError: when `resume` and the file is another fit's or is damaged.
        """
        if not (resume and path.is_file()):
            return cls(path, key)
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                document = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise OutputError(f"{path} can't be read, to go on from: {error}; start anew without --resume") from error
        if document["key"] != key:
            raise OutputError(
                f"{path} was left by a run with another model, prompts or settings; give the same ones to go on, "
                "or start anew without --resume"
            )
        points = [_point(note, tensors, i) for i, note in enumerate(document.pop("points"))]
        document.pop("key")
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

    def save(self) -> None:
        """Write it all down; whole or not at all."""
        if self.path is None or self._bound is None:
            return
        from safetensors.torch import save_file

        vectors, strengths, optimiser = self._bound
        tensors = {"vectors": vectors.detach(), "strengths": strengths.detach()}
        for name, variable in (("vectors", vectors), ("strengths", strengths)):
            for moment, value in optimiser.state.get(variable, {}).items():
                tensors[f"{name}.{moment}"] = value
        for i, point in enumerate(self.points):
            tensors[f"point.{i}.directions"] = point.edit.directions
            tensors[f"point.{i}.strengths"] = point.edit.strengths
        document = {
            "key": self.key,
            "step": self.step,
            "next_stop": self.next_stop,
            "looked": self.looked,
            "prompts": self.prompts,
            "openings": self.openings,
            "points": [_note(p) for p in self.points],
        }
        with whole_file(self.path) as temporary:
            contiguous = {name: t.contiguous().clone() for name, t in tensors.items()}
            save_file(contiguous, temporary, metadata={KEY: json.dumps(document)})


def fit_key(*parts: Any) -> str:
    """Hash of what a fit depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _note(point: FrontierPoint) -> dict[str, Any]:
    return {
        "writers": list(point.edit.writers),
        "refused": [point.refused.count, point.refused.total],
        "divergence": point.divergence,
        "note": point.note,
    }


def _point(note: dict[str, Any], tensors: dict[str, Tensor], index: int) -> FrontierPoint:
    edit = Edit(tuple(note["writers"]), tensors[f"point.{index}.directions"], tensors[f"point.{index}.strengths"])
    return FrontierPoint(edit, Rate(*note["refused"]), note["divergence"], note["note"])
