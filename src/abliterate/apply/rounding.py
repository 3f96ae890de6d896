"""Rounding an edited matrix to the numbers that a quantised format has, so that a direction taken out stays out.

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

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from abliterate.common.errors import ModelError
from abliterate.edit.algebra import Factors

ROUNDS = 8
# Stop when a round betters what is left by less than this share.
ENOUGH = 0.03
# The most that packing may undo of an edit.
MOST_OFF = 0.5


@dataclass
class Account:
    """Sums of squares over what was edited; see the properties.

    Attributes:
        before: of the component along the directions.
        off: of the component's distance from what was asked.
        asked: of how far the component was to be changed.
        moved: of what packing changed beyond the edit.
        values: of the edited values.
    """

    before: float = 0.0
    off: float = 0.0
    asked: float = 0.0
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

    @classmethod
    def of(
        cls, before: np.ndarray, asked: np.ndarray, got: np.ndarray, moved: np.ndarray, values: np.ndarray
    ) -> Account:
        """Of components along the directions as they were, as asked for and as got, and of the values."""
        return cls(*map(square, (before, got - asked, asked - before, moved, values)))

    def note(self, kind: str = "") -> str:
        """What packing did to the edited tensors, for people."""
        return (
            f"packing the edited tensors {f'as {kind} ' if kind else ''}again changed their values by "
            f"{self.error:.1%}, and left the component along the directions {self.component_off:.1%} of what it was "
            "from where it should be"
        )

    def check(self, kind: str, remedy: str) -> None:
        """Raise ModelError when the numbers of a format are too few to hold the edit."""
        if self.off > MOST_OFF**2 * self.asked:
            raise ModelError(
                f"packing the edited tensors as {kind} again undoes {(self.off / self.asked) ** 0.5:.0%} of the edit "
                f"(at most {MOST_OFF:.0%} is let pass); nothing was written: {remedy}"
            )

    def __add__(self, other: Account) -> Account:
        return Account(*(getattr(self, sum_.name) + getattr(other, sum_.name) for sum_ in fields(self)))

    def add(self, other: Account) -> None:
        """The same where it stands."""
        self.__dict__.update((self + other).__dict__)


def constrained(
    packed: Callable[[np.ndarray], np.ndarray], unpacked: Callable[[np.ndarray], np.ndarray], axis: int,
    change: Factors, target: np.ndarray, asked: np.ndarray, rounds: int = ROUNDS, size: int = 1, block: int = 1,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Packed values whose component along change.right is as asked; see the module.

    Args:
        packed, unpacked: round values and pack them, and back.
        axis: 0 where d_model runs down the columns (a linear layer), 1 where it runs along the rows (an embedding).
        target: the edited values [row, column]; asked: their component.
        rounds: most rounds of packing.
        size, block: bytes, and values, that are packed in common along a row.
    """
    along, across = products(change, axis)
    gram = np.linalg.pinv(change.right @ change.right.T)
    push = np.zeros_like(asked)
    best = got = np.empty(0)
    least = np.empty(0)
    for number in range(rounds):
        trial = packed(target - across(push, change.right))
        values = unpacked(trial)
        off = along(values) - asked
        # what is packed in common: a column of blocks, or a row
        group = (off**2).sum(1) if axis == 1 else (off**2).reshape(len(off), -1, block).sum((0, 2))
        if number == 0:
            best, got, least = trial, values, group
        else:
            was = least.sum()
            better = group < least
            _take(got, values, better, axis, block)
            if best is not got:
                _take(best, trial, better, axis, size)
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


def products(
    change: Factors, axis: int
) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """The component of values along change.right, and what a component along other vectors is as values."""
    if axis == 1:
        return (lambda values: values @ change.right.T), (lambda component, vectors: component @ vectors)
    return (lambda values: change.right @ values), (lambda component, vectors: vectors.T @ component)


def square(values: np.ndarray) -> float:
    flat = np.ascontiguousarray(values).reshape(-1)
    return float(np.dot(flat, flat))
