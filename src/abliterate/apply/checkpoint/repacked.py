"""An edit's arithmetic on packed weights: unpacked, edited in float32, and packed in their format again.

A weight of few bits takes an edit back as it is rounded; `apply.rounding` keeps the direction out. One weight is in
memory at a time: as it is packed, and a matrix of it (an expert) in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from abliterate.apply.checkpoint.blocks import take_out
from abliterate.apply.checkpoint.pieces import Change
from abliterate.apply.rounding import ROUNDS, Account, constrained, products
from abliterate.common.errors import NonFiniteError
from abliterate.edit.algebra import Factors
from abliterate.models.packed import Packed
from abliterate.models.packing import Matrix
from abliterate.models.shards import Checkpoint

Array = np.ndarray[Any, Any]

FINE_ROUNDS = 3  # of formats of 8 bits, which lose little
CHUNK = 2**22  # values rounded at a time
_REMEDY = "edit the unquantised model, and quantise that"


class Repacked:
    """A packed weight with a change made in it.

    Attributes:
        packed: which.
        account: how well packing it went; of the last time it was.
    """

    def __init__(self, checkpoint: Checkpoint, packed: Packed, change: Change) -> None:
        self.packed, self.account = packed, Account()
        self._checkpoint, self._change = checkpoint, change
        self._made: dict[str, bytearray] = {}
        self._lock = threading.Lock()

    def contents(self) -> dict[str, Callable[[], bytearray]]:
        """Name of each of its tensors -> what gives its new bytes, as many as before; made once for all of them."""
        return {part.name: partial(self._take, role) for role, part in self.packed.parts.items()}

    def _take(self, role: str) -> bytearray:
        with self._lock:
            if role not in self._made:
                self._made = self._make()
            return self._made.pop(role)

    def _make(self) -> dict[str, bytearray]:
        raw = self.packed.raw(self._checkpoint)
        self.account = Account()
        turned = self.packed.turned and self._change.axis >= len(self.packed.shape) - 2
        last = self._change.axis == len(self.packed.shape) - 1
        for matrix in self.packed.matrices(raw):
            self.account.add(edit_matrix(matrix, self._change, int(last != turned), self.packed.name))
        return raw


def edit_matrix(matrix: Matrix, change: Change, axis: int, name: str) -> Account:
    """Make a change in a packed matrix, where it lies.

    Args:
        change: what is done to it.
        axis: 0 where d_model runs down its columns, 1 where it runs along its rows.
        name: for the error.

    Raises:
        NonFiniteError: when a value is, or becomes, NaN or infinite.
    """
    values = matrix.values()
    along, _ = products(change.factors, axis)
    before = along(values)
    target, at = np.empty_like(values), 0

    def read(low: int, into: Array) -> None:
        into[:] = values[low : low + len(into)]

    def write(rows: Array) -> None:
        nonlocal at
        target[at : at + len(rows)] = rows
        at += len(rows)

    shape = (1, *values.shape) if axis == 0 else (len(values), values.shape[1], 1)
    take_out(read, write, np.dtype(np.float32), shape, change.factors, keep_norms=change.keep_norms,
             addition=change.addition, name=name)  # fmt: skip
    if not np.isfinite(target).all():
        raise NonFiniteError(f"editing {name} gives NaN or infinite values; nothing was written")
    if np.array_equal(values, target):
        return Account()
    del values
    scales = matrix.rescaled(target)
    got = np.empty_like(target)
    step = max(1, CHUNK // target.shape[1 - axis])
    for low in range(0, target.shape[1 - axis], step):
        part = (slice(low, low + step), slice(None))[:: 1 if axis == 1 else -1]
        got[part] = _rounded(target[part], np.broadcast_to(scales, target.shape)[part], matrix, axis, change.factors)
    matrix.write(got, scales)
    asked, moved = along(target), got - target
    return Account.of(before, asked, along(got), moved, target)


def _rounded(target: Array, scales: Array, matrix: Matrix, axis: int, change: Factors) -> Array:
    """The nearest numbers of the format of which the component along the directions is as it should be."""
    divisors = np.where(scales > 0, scales, 1)

    def packed(wanted: Array) -> Array:
        return (matrix.codes.nearest(wanted / divisors) * scales).astype(np.float32)

    if not len(change.right):
        return packed(target)
    asked = products(change, axis)[0](target)
    rounds = ROUNDS if matrix.codes.top < 100 else FINE_ROUNDS
    return constrained(packed, lambda trial: trial, axis, change, target, asked, rounds)[0]


def said_of(repacked: Iterable[Repacked]) -> list[str]:
    """What packing did to each format's weights, for people.

    Raises:
        ModelError: when it undid too much of the edit.
    """
    kinds: dict[str, Account] = {}
    for one in repacked:
        kinds[one.packed.kind] = kinds.get(one.packed.kind, Account()) + one.account
    for kind, account in kinds.items():
        account.check(kind, _REMEDY)
    return [account.note(kind) for kind, account in kinds.items()]


def split(
    checkpoint: Checkpoint, packed: Mapping[str, Packed], changes: Mapping[str, Change]
) -> tuple[dict[str, Change], list[Repacked]]:
    """The changes of plain tensors, and those of packed weights."""
    plain = {name: change for name, change in changes.items() if name not in packed}
    return plain, [Repacked(checkpoint, packed[name], change) for name, change in changes.items() if name in packed]
