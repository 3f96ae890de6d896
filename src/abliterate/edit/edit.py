"""Edit: which directions to take out of which writers, and how much of each.

This module knows neither files nor models; what applies an edit is handed it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Part(NamedTuple):
    """What an edit does at one writer: W <- W - sum_i strengths[i] * r_i (r_i^T W)."""

    directions: Float[Tensor, "direction d_model"]
    strengths: Float[Tensor, " direction"]


@dataclass(frozen=True, eq=False)
class Shift:
    """h <- h + size * direction at the output of a block, at every token: how a behaviour is added.

    Attributes:
        layer: index of the block.
        direction: [d_model] float32, unit.
        size: how much is added, in the residual stream's own units; negative takes it away.

    Raises:
        ValueError: on a negative layer, or a direction or size that is not unit or finite.
    """

    layer: int
    direction: Float[Tensor, " d_model"]
    size: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", self.direction.detach().to("cpu", torch.float32))
        object.__setattr__(self, "size", float(self.size))
        if self.layer < 0:
            raise ValueError(f"a shift at layer {self.layer}; layers count from 0")
        if self.direction.ndim != 1:
            raise ValueError(f"a shift's direction has shape {tuple(self.direction.shape)}, not [d_model]")
        if not math.isfinite(self.size):
            raise ValueError("the size of a shift must be finite")
        _check_unit(self.direction[None])

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """size * direction, float32."""
        return self.size * self.direction

    def __mul__(self, factor: float) -> Shift:
        return Shift(self.layer, self.direction, self.size * float(factor))

    __rmul__ = __mul__


@dataclass(frozen=True, eq=False)
class Edit:
    """W <- W - a * r (r^T W) and b <- b - a * r (r^T b), for every writer and direction; and shifts.

    Attributes:
        writers: parameter names of the writers touched.
        directions: [direction, d_model] float32, unit rows in the residual stream's coordinates.
        strengths: [writer, direction] float32; 1 removes, 0 leaves alone, negative strengthens. The
            directions with a non-zero strength at one writer are orthogonal to each other.
        shifts: what is added at blocks' outputs.

    Raises:
        ValueError: on shapes that don't fit, directions that are not unit or finite, strengths that
            are not finite, or directions of one writer that are not orthogonal.

    Example:
        >>> edit = Edit.uniform(["model.layers.0.mlp.down_proj.weight"], torch.tensor([1.0, 0.0]), 1.0)
        >>> (0.5 * edit).strengths
        tensor([[0.5000]])
    """

    writers: tuple[str, ...]
    directions: Float[Tensor, "direction d_model"]
    strengths: Float[Tensor, "writer direction"]
    shifts: tuple[Shift, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "writers", tuple(self.writers))
        object.__setattr__(self, "shifts", tuple(self.shifts))
        for name in ("directions", "strengths"):
            object.__setattr__(self, name, getattr(self, name).detach().to("cpu", torch.float32))
        if self.directions.ndim != 2 or self.strengths.shape != (len(self.writers), len(self.directions)):
            raise ValueError(
                f"strengths {tuple(self.strengths.shape)} don't fit {len(self.writers)} writers "
                f"and directions {tuple(self.directions.shape)}"
            )
        if len(set(self.writers)) != len(self.writers):
            raise ValueError("a writer is named twice")
        if not self.strengths.isfinite().all():
            raise ValueError("strengths must be finite")
        _check_unit(self.directions)
        for shift in self.shifts:
            if len(shift.direction) != self.directions.shape[1]:
                raise ValueError(
                    f"a shift of width {len(shift.direction)} doesn't fit directions {tuple(self.directions.shape)}"
                )
        for part in self.parts.values():
            gram = part.directions.double() @ part.directions.double().T
            if (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() > 1e-4:
                raise ValueError("directions of one writer must be orthogonal to each other")

    @classmethod
    def uniform(cls, writers: Iterable[Any], direction: Float[Tensor, "*k d_model"], strength: float = 1.0) -> Edit:
        """Take one direction out of every writer at one strength (the article's edit).

        Args:
            writers: writers (anything with a `.name`) or parameter names.
            direction: [d_model], any length but zero, it is normalised; or [k, d_model], whose span is taken out.
            strength: 1.0 removes the direction wholly.
        """
        return cls.from_names({_name(w): strength for w in writers}, direction)

    @classmethod
    def from_names(cls, strengths: Mapping[str, float], direction: Float[Tensor, "*k d_model"]) -> Edit:
        """Take a direction, or a span of several, out of the parameters named, each at its own strength."""
        values = torch.tensor(list(strengths.values()), dtype=torch.float32)
        basis = normalised(direction)[None] if direction.ndim == 1 else orthonormal(torch.unbind(direction))
        return cls(tuple(strengths), basis, values[:, None].repeat(1, len(basis)))

    @classmethod
    def shifting(cls, layer: int, direction: Float[Tensor, " d_model"], size: float) -> Edit:
        """Add size * direction at the output of a block, and touch no writer.

        Args:
            layer: index of the block.
            direction: [d_model], any length but zero, it is normalised.
            size: in the stream's own units.
        """
        unit = normalised(direction)
        return cls((), torch.zeros(0, len(unit)), torch.zeros(0, 0), (Shift(layer, unit, size),))

    @property
    def d_model(self) -> int:
        """Width of the model the edit is for."""
        return int(self.directions.shape[1])

    @property
    def parts(self) -> dict[str, Part]:
        """What the edit does at each writer, directions with strength zero left out."""
        used = {}
        for name, row in zip(self.writers, self.strengths, strict=True):
            kept = row.nonzero().flatten()
            if len(kept):
                used[name] = Part(self.directions[kept], row[kept])
        return used

    def __mul__(self, factor: float) -> Edit:
        shifts = tuple(shift * factor for shift in self.shifts)
        return Edit(self.writers, self.directions, self.strengths * float(factor), shifts)

    __rmul__ = __mul__

    def __neg__(self) -> Edit:
        return self * -1.0

    def __add__(self, other: Edit) -> Edit:
        """The edit that does what both do: their operators sum_i a_i r_i r_i^T are added, and their shifts.

        Raises:
            ValueError: when the two are for models of different width.
        """
        if self.directions.shape[1] != other.directions.shape[1]:
            raise ValueError(f"edits of widths {self.directions.shape[1]} and {other.directions.shape[1]} don't add")
        mine, theirs = self.parts, other.parts
        names = dict.fromkeys((*self.writers, *other.writers))
        total = from_parts(
            {n: _added([p[n] for p in (mine, theirs) if n in p]) for n in names if n in mine or n in theirs},
            self.d_model,
        )
        return replace(total, shifts=_merged((*self.shifts, *other.shifts)))

    def __sub__(self, other: Edit) -> Edit:
        return self + -other

    def save(self, path: str | os.PathLike[str], model: Any = None) -> None:
        """Write the edit as a recipe (docs/recipe.md).

        Args:
            path: the file to write.
            model: the model it is for, as a folder (its weights are not loaded) or a loaded handle. Writers may then
                be named as in memory or as in the checkpoint, and the recipe says which of the checkpoint's
                tensors they are. Without it the names are taken as they are.

        Raises:
            RecipeError: when a name is no writer of the model; the text names the nearest ones.
            OutputError: when the file can't be written.
        """
        from abliterate.edit.recipe import recipe_for, save_recipe

        save_recipe(recipe_for(self, model), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Edit:
        """Read the edit of a recipe.

        Raises:
            RecipeError: naming the rule of docs/recipe.md that the file breaks.
        """
        from abliterate.edit.recipe import load_recipe

        return load_recipe(path).edit

    def attached(self, handle: Any) -> AbstractContextManager[Any]:
        """Apply the edit to a loaded model, live, for as long as the context lasts."""
        return handle.attached(self)

    def bake(self, handle: Any, *, keep_tied: bool = False) -> None:
        """Change a loaded model's weights as the edit says.

        Args:
            handle: the loaded model.
            keep_tied: edit a tied embedding and head together instead of untying them.
        """
        handle.bake(self, keep_tied=keep_tied)


def normalised(vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The unit vector along `vector`, computed in float64, returned in float32.

    Raises:
        ValueError: when the vector is zero or not finite.
    """
    wide = vector.detach().to("cpu", torch.float64)
    norm = wide.norm()
    if not torch.isfinite(norm) or norm == 0:
        raise ValueError("a direction must be finite and not zero")
    return (wide / norm).float()


def from_parts(parts: Mapping[str, Part], d_model: int) -> Edit:
    """An edit of a model of width d_model out of what it does at each writer; equal directions are kept once."""
    rows: list[Tensor] = []
    index: dict[bytes, int] = {}
    entries: list[list[tuple[int, float]]] = []
    for part in parts.values():
        entry = []
        for direction, strength in zip(part.directions, part.strengths, strict=True):
            key = direction.float().numpy().tobytes()
            if key not in index:
                index[key] = len(rows)
                rows.append(direction)
            entry.append((index[key], float(strength)))
        entries.append(entry)
    strengths = torch.zeros(len(parts), len(rows))
    for i, entry in enumerate(entries):
        for j, value in entry:
            strengths[i, j] = value
    return Edit(tuple(parts), torch.stack(rows) if rows else torch.zeros(0, d_model), strengths)


def orthonormal(vectors: Sequence[Tensor] | Float[Tensor, "k d_model"]) -> Float[Tensor, "rank d_model"]:
    """Orthonormal rows that span the vectors, the first along the first vector (Gram-Schmidt, float64)."""
    basis: list[Tensor] = []
    for vector in vectors:
        v = vector.detach().to("cpu", torch.float64)
        size = v.norm()
        for b in (*basis, *basis):  # twice is enough to be orthogonal to rounding
            v = v - (b @ v) * b
        if v.norm() > 1e-6 * size:
            basis.append(v / v.norm())
    return torch.stack(basis).float()


def _check_unit(rows: Float[Tensor, "n d_model"]) -> None:
    """Raise ValueError unless all rows are finite and of length 1."""
    if not rows.isfinite().all():
        raise ValueError("directions must be finite")
    norms = rows.double().norm(dim=1)
    if len(norms) and (norms - 1).abs().max() > 1e-4:
        raise ValueError(f"directions must be unit vectors, found one of norm {norms[(norms - 1).abs().argmax()]:.4f}")


def _merged(shifts: Sequence[Shift]) -> tuple[Shift, ...]:
    """The same sum of shifts, those along one direction at one layer added up."""
    sums: dict[tuple[int, bytes], Shift] = {}
    for shift in shifts:
        key = (shift.layer, shift.direction.numpy().tobytes())
        size = sums[key].size + shift.size if key in sums else shift.size
        sums[key] = Shift(shift.layer, shift.direction, size)
    return tuple(shift for shift in sums.values() if shift.size)


def _name(writer: Any) -> str:
    return writer if isinstance(writer, str) else writer.name


def _added(parts: Sequence[Part]) -> Part:
    """Sum of operators sum_i a_i r_i r_i^T, as orthonormal directions and strengths again."""
    if len(parts) == 1:
        return parts[0]
    if all(torch.equal(parts[0].directions, p.directions) for p in parts):
        return Part(parts[0].directions, torch.stack([p.strengths for p in parts]).sum(0))
    basis = orthonormal(torch.cat([p.directions for p in parts])).double()
    inside = torch.zeros(len(basis), len(basis), dtype=torch.float64)
    for part in parts:
        c = basis @ part.directions.double().T
        inside += c @ torch.diag(part.strengths.double()) @ c.T
    values, vectors = torch.linalg.eigh(inside)
    kept = values.abs() > 1e-9
    return Part((vectors.T[kept] @ basis).float(), values[kept].float())
