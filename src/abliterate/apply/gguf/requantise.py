"""Taking a direction out of a quantised matrix so that it stays out.

The values of a quantised matrix lie on its grid. What an edit changes in one of them, r_i (r^T W)_j, is at four bits
mostly less than half a step, so rounding takes it back: packing W - r r^T W again as it is leaves half of the
direction in at four bits and nearly all of it at two. So the packing is told what it lost: find packed values Q near
the edited T with

    right Q = right T          (the component along the directions is what was asked for)

by dual ascent on  min |Q - T|^2  under this constraint: pack T - right^T u, see what component is off, add that
to u, and again. Each column's u grows until enough entries move by a step. Of all rounds each group of blocks keeps
the best. What is left is as large as the quantisation error along any other direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from abliterate.edit.algebra import Factors
from abliterate.models.gguf.types import PLAIN, Layout, layout_of, pack, unpack

ROUNDS = 8
# Stop when a round betters what is left by less than this share.
ENOUGH = 0.03
# Values worked on at a time: 16 MiB in float32, of which some copies are needed.
CHUNK = 1 << 22


@dataclass
class Account:
    """Sums of squares over what was edited; see the properties.

    Attributes:
        before: of the component along the directions.
        off: of the component's distance from what was asked.
        moved: of what packing changed beyond the edit.
        values: of the edited values.
    """

    before: float = 0.0
    off: float = 0.0
    moved: float = 0.0
    values: float = 0.0

    @property
    def component_off(self) -> float:
        """How far the component along the directions is from what was asked, as a share of what it was."""
        return (self.off / self.before) ** 0.5 if self.before else 0.0

    @property
    def error(self) -> float:
        """Error of packing the edited values again, relative to them."""
        return (self.moved / self.values) ** 0.5 if self.values else 0.0

    def add(self, other: Account) -> None:
        for sum_ in fields(self):
            setattr(self, sum_.name, getattr(self, sum_.name) + getattr(other, sum_.name))


def chunks(raw: np.ndarray, kind: str, axis: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a packed matrix that can be edited by themselves: whole columns of blocks where d_model runs
    down the columns (axis 0), whole rows where it runs along them (axis 1)."""
    layout = layout_of(kind)
    rows, row_bytes = raw.shape
    values = row_bytes // layout.size * layout.block
    if axis == 1:
        step = max(1, CHUNK // values)
        yield from ((slice(i, min(i + step, rows)), slice(None)) for i in range(0, rows, step))
        return
    step = max(1, CHUNK // rows // layout.block) * layout.size
    yield from ((slice(None), slice(i, min(i + step, row_bytes))) for i in range(0, row_bytes, step))


def edited(raw: np.ndarray, kind: str, axis: int, change: Factors, rounds: int = ROUNDS) -> tuple[np.ndarray, Account]:
    """The packed matrix with the change made, in the same type, and how well that went.

    Blocks whose values the change leaves as they are keep their bytes.

    Args:
        raw: uint8 [rows, bytes of a row]; for a chunk of columns, those columns' blocks.
        kind: ggml type.
        axis: 0 where d_model runs down the columns (a linear layer), 1 where it runs along the rows (an
            embedding).
        change: what to take out.
        rounds: most rounds of packing; 1 packs the edited values as they are.
    """
    values = unpack(raw, kind)
    along, across = _products(change, axis)
    component = along(values)
    target = values - across(component, change.left)
    layout = layout_of(kind)
    same = (target == values).reshape(len(values), -1, layout.block).all(-1)
    asked = along(target)

    def packed(wanted: np.ndarray) -> np.ndarray:
        blocks = pack(wanted, kind).reshape(*same.shape, layout.size)
        return np.where(same[..., None], np.asarray(raw).reshape(blocks.shape), blocks).reshape(raw.shape)

    if kind in PLAIN:
        best = packed(target)
        got = unpack(best, kind)
    else:
        best, got = _constrained(packed, kind, axis, change, target, asked, rounds, layout)
    off = along(got) - asked
    return best, Account(_square(component), _square(off), _square(got - target), _square(target))


def _constrained(
    packed: Callable[[np.ndarray], np.ndarray], kind: str, axis: int, change: Factors, target: np.ndarray,
    asked: np.ndarray, rounds: int, layout: Layout,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Packed values whose component along change.right is as asked; see the module."""
    along, across = _products(change, axis)
    gram = np.linalg.pinv(change.right @ change.right.T)
    push = np.zeros_like(asked)
    best = got = np.empty(0)
    least = np.empty(0)
    for number in range(rounds):
        trial = packed(target - across(push, change.right))
        values = unpack(trial, kind)
        off = along(values) - asked
        # what is packed in common: a column of blocks, or a row
        group = (off**2).sum(1) if axis == 1 else (off**2).reshape(len(off), -1, layout.block).sum((0, 2))
        if number == 0:
            best, got, least = trial, values, group
        else:
            was = least.sum()
            better = group < least
            _take(best, trial, better, axis, layout.size)
            _take(got, values, better, axis, layout.block)
            least = np.minimum(group, least)
            if least.sum() > (1 - ENOUGH) ** 2 * was:
                break
        push += off @ gram if axis == 1 else gram @ off
    return best, got


def _take(into: np.ndarray, source: np.ndarray, better: np.ndarray, axis: int, width: int) -> None:
    """Take over the rows, or the columns of blocks, that are better."""
    if axis == 1:
        into[better] = source[better]
    else:
        mask = np.repeat(better, width)
        into[:, mask] = source[:, mask]


def _products(
    change: Factors, axis: int
) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """The component of values along change.right, and what a component along other vectors is as values."""
    if axis == 1:
        return (lambda values: values @ change.right.T), (lambda component, vectors: component @ vectors)
    return (lambda values: change.right @ values), (lambda component, vectors: vectors.T @ component)


def _square(values: np.ndarray) -> float:
    flat = np.ascontiguousarray(values).reshape(-1)
    return float(np.dot(flat, flat))
