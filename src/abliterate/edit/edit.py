"""Edit: which directions to take out of which writers, and how much of each. In numpy.

This module knows neither files nor models; what applies an edit is handed it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import os
    from contextlib import AbstractContextManager

    from jaxtyping import Float
    from numpy.typing import DTypeLike
    from torch import Tensor

    Values: TypeAlias = np.ndarray | Tensor


def as_array(values: Values, dtype: DTypeLike = np.float32) -> np.ndarray:
    """An array of these values, whether they come in one or in a torch tensor of any dtype on any device."""
    if hasattr(values, "detach"):  # numpy has no bfloat16
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype)


class Part(NamedTuple):
    """What an edit does at one writer: W <- W - sum_i strengths[i] * r_i (r_i^T W)."""

    directions: Float[np.ndarray, "direction d_model"]
    strengths: Float[np.ndarray, " direction"]


@dataclass(frozen=True, eq=False, init=False)
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
    direction: Float[np.ndarray, " d_model"]
    size: float

    def __init__(self, layer: int, direction: Values, size: float) -> None:
        unit = as_array(direction)
        for name, value in (("layer", layer), ("direction", unit), ("size", float(size))):
            object.__setattr__(self, name, value)
        if layer < 0:
            raise ValueError(f"a shift at layer {layer}; layers count from 0")
        if unit.ndim != 1:
            raise ValueError(f"a shift's direction has shape {unit.shape}, not [d_model]")
        if not math.isfinite(self.size):
            raise ValueError("the size of a shift must be finite")
        _check_unit(unit[None])

    @property
    def vector(self) -> Float[np.ndarray, " d_model"]:
        """size * direction, float32."""
        return np.float32(self.size) * self.direction

    def __mul__(self, factor: float) -> Shift:
        return Shift(self.layer, self.direction, self.size * float(factor))

    __rmul__ = __mul__


@dataclass(frozen=True, eq=False, init=False)
class Edit:
    """W <- W - a * r (r^T W) and b <- b - a * r (r^T b), for every writer and direction; and shifts.

    It is made of numpy arrays or torch tensors, and holds arrays.

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
        >>> edit = Edit.uniform(["model.layers.0.mlp.down_proj.weight"], np.array([1.0, 0.0]), 1.0)
        >>> (0.5 * edit).strengths
        array([[0.5]], dtype=float32)
    """

    writers: tuple[str, ...]
    directions: Float[np.ndarray, "direction d_model"]
    strengths: Float[np.ndarray, "writer direction"]
    shifts: tuple[Shift, ...] = ()

    def __init__(
        self, writers: Iterable[str], directions: Values, strengths: Values, shifts: Iterable[Shift] = ()
    ) -> None:
        fields = {"writers": tuple(writers), "directions": as_array(directions), "strengths": as_array(strengths)}
        for name, value in (fields | {"shifts": tuple(shifts)}).items():
            object.__setattr__(self, name, value)
        if self.directions.ndim != 2 or self.strengths.shape != (len(self.writers), len(self.directions)):
            raise ValueError(
                f"strengths {self.strengths.shape} don't fit {len(self.writers)} writers "
                f"and directions {self.directions.shape}"
            )
        if len(set(self.writers)) != len(self.writers):
            raise ValueError("a writer is named twice")
        if not np.isfinite(self.strengths).all():
            raise ValueError("strengths must be finite")
        _check_unit(self.directions)
        for shift in self.shifts:
            if len(shift.direction) != self.d_model:
                raise ValueError(
                    f"a shift of width {len(shift.direction)} doesn't fit directions {self.directions.shape}"
                )
        for part in self.parts.values():
            wide = part.directions.astype(np.float64)
            if np.abs(wide @ wide.T - np.eye(len(wide))).max() > 1e-4:
                raise ValueError("directions of one writer must be orthogonal to each other")

    if TYPE_CHECKING:  # what needs rooms above this one: `abliterate.api` has them

        def save(self, path: str | os.PathLike[str], model: Any = None) -> None: ...
        @classmethod
        def load(cls, path: str | os.PathLike[str]) -> Edit: ...
        def attached(self, handle: Any) -> AbstractContextManager[Any]: ...
        def bake(self, handle: Any, *, keep_tied: bool = False) -> None: ...

    @classmethod
    def uniform(cls, writers: Iterable[Any], direction: Values, strength: float = 1.0) -> Edit:
        """Take one direction out of every writer at one strength (the article's edit).

        Args:
            writers: writers (anything with a `.name`) or parameter names.
            direction: [d_model], any length but zero, it is normalised; or [k, d_model], whose span is taken out.
            strength: 1.0 removes the direction wholly.
        """
        return cls.from_names({w if isinstance(w, str) else w.name: strength for w in writers}, direction)

    @classmethod
    def from_names(cls, strengths: Mapping[str, float], direction: Values) -> Edit:
        """Take a direction, or a span of several, out of the parameters named, each at its own strength."""
        values = np.array(list(strengths.values()), np.float32)
        basis = normalised(direction)[None] if direction.ndim == 1 else orthonormal(direction)
        return cls(strengths, basis, values[:, None].repeat(len(basis), axis=1))

    @classmethod
    def shifting(cls, layer: int, direction: Values, size: float) -> Edit:
        """Add size * direction at the output of a block, and touch no writer.

        Args:
            layer: index of the block.
            direction: [d_model], any length but zero, it is normalised.
            size: in the stream's own units.
        """
        unit = normalised(direction)
        return cls((), np.zeros((0, len(unit))), np.zeros((0, 0)), (Shift(layer, unit, size),))

    @property
    def d_model(self) -> int:
        """Width of the model the edit is for."""
        return int(self.directions.shape[1])

    @property
    def parts(self) -> dict[str, Part]:
        """What the edit does at each writer, directions with strength zero left out."""
        used = {}
        for name, row in zip(self.writers, self.strengths, strict=True):
            (kept,) = row.nonzero()
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


def normalised(vector: Values) -> Float[np.ndarray, " d_model"]:
    """The unit vector along `vector` [d_model], computed in float64, returned in float32.

    Raises:
        ValueError: when the vector is zero or not finite.
    """
    wide = as_array(vector, np.float64)
    norm = np.linalg.norm(wide)
    if not np.isfinite(norm) or norm == 0:
        raise ValueError("a direction must be finite and not zero")
    return (wide / norm).astype(np.float32)


def orthonormal(vectors: Iterable[Values] | Values) -> Float[np.ndarray, "rank d_model"]:
    """Orthonormal rows that span the vectors [k, d_model], the first along the first vector (Gram-Schmidt, float64)."""
    basis: list[np.ndarray] = []
    for vector in vectors:
        v = as_array(vector, np.float64)
        size = np.linalg.norm(v)
        for b in (*basis, *basis):  # twice is enough to be orthogonal to rounding
            v = v - (b @ v) * b
        if np.linalg.norm(v) > 1e-6 * size:
            basis.append(v / np.linalg.norm(v))
    return np.stack(basis).astype(np.float32)


def from_parts(parts: Mapping[str, Part], d_model: int) -> Edit:
    """An edit of a model of width d_model out of what it does at each writer; equal directions are kept once."""
    index: dict[bytes, int] = {}
    rows: list[np.ndarray] = []
    entries: list[tuple[int, int, float]] = []
    for writer, part in enumerate(parts.values()):
        for direction, strength in zip(as_array(part.directions), as_array(part.strengths), strict=True):
            row = index.setdefault(direction.tobytes(), len(rows))
            if row == len(rows):
                rows.append(direction)
            entries.append((writer, row, strength))
    strengths = np.zeros((len(parts), len(rows)), np.float32)
    for writer, row, strength in entries:
        strengths[writer, row] = strength
    return Edit(parts, np.stack(rows) if rows else np.zeros((0, d_model)), strengths)


def _check_unit(rows: Float[np.ndarray, "n d_model"]) -> None:
    """Raise ValueError unless all rows are finite and of length 1."""
    if not np.isfinite(rows).all():
        raise ValueError("directions must be finite")
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    if len(norms) and np.abs(norms - 1).max() > 1e-4:
        worst = norms[np.abs(norms - 1).argmax()]
        raise ValueError(f"directions must be unit vectors, found one of norm {worst:.4f}")


def _merged(shifts: Sequence[Shift]) -> tuple[Shift, ...]:
    """The same sum of shifts, those along one direction at one layer added up."""
    sums: dict[tuple[int, bytes], Shift] = {}
    for shift in shifts:
        key = (shift.layer, shift.direction.tobytes())
        size = sums[key].size + shift.size if key in sums else shift.size
        sums[key] = Shift(shift.layer, shift.direction, size)
    return tuple(shift for shift in sums.values() if shift.size)


def _added(parts: Sequence[Part]) -> Part:
    """Sum of operators sum_i a_i r_i r_i^T, as orthonormal directions and strengths again."""
    if len(parts) == 1:
        return parts[0]
    if all(np.array_equal(parts[0].directions, p.directions) for p in parts):
        return Part(parts[0].directions, np.stack([p.strengths for p in parts]).sum(0))
    basis = orthonormal(np.concatenate([p.directions for p in parts])).astype(np.float64)
    inside = np.zeros((len(basis), len(basis)))
    for part in parts:
        c = basis @ part.directions.astype(np.float64).T
        inside += c @ np.diag(part.strengths.astype(np.float64)) @ c.T
    values, vectors = np.linalg.eigh(inside)
    kept = np.abs(values) > 1e-9
    return Part((vectors.T[kept] @ basis).astype(np.float32), values[kept].astype(np.float32))
