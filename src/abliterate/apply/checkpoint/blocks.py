"""An edit's arithmetic on a stored weight, block by block: memory stays in a core's cache. No files here.

A weight is read block by block, as often as it takes; each is widened to float32, changed, and rounded once, to the
nearest and ties to even.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any

import numpy as np

from abliterate.common.errors import NonFiniteError
from abliterate.common.ranges import spans
from abliterate.edit.algebra import LEAST_LEFT, Factors
from abliterate.models import shards

Array = np.ndarray[Any, Any]
Read = Callable[[int, Array], None]
Rows = Any  # float32 rows, sliced: an array, or what makes them when they are asked for (`merge.LowRank`)
Blocks = Callable[[], Iterator[tuple[slice, Array, Array]]]  # which rows, they, and as much room

BLOCK = 2**16  # elements at a time: widened, and once more for what is subtracted, they stay in a core's L2 cache
# The dtypes of safetensors that can be edited, as numpy has them.
FLOATS: dict[str, np.dtype[Any]] = {"F64": np.dtype(np.float64), **shards.FLOATS}


def take_out(
    read: Read, write: Callable[[Array], None], dtype: np.dtype[Any], shape: tuple[int, int, int],
    change: Factors, *, keep_norms: bool = False, addition: Rows | None = None,
    name: str = "a weight",
) -> None:  # fmt: skip
    """W <- W - left^T (right W) for every matrix W [d_model, inner] of a stack [outer, d_model, inner].

    The arithmetic runs in float32 (float64 for float64), and the result is rounded once.

    Args:
        read: fills an array with the stack's rows from one on, `inner` numbers each; where `inner` is 1, rows are the
            vectors along d_model.
        write: takes the new rows, in their order, some at a time; what it is given is good until the next.
        dtype: of `FLOATS`.
        shape: outer, d_model, inner.
        change: left and right [k, d_model], from `algebra.factors`.
        keep_norms: rescale each column of W to the norm it had (see `apply.removal`).
        addition: what is then added to the rows, float32: a shift in a bias, a LoRA.
        name: for the error.

    Raises:
        NonFiniteError: when a value is, or becomes, NaN or infinite.
    """
    outer, d_model, inner = shape
    room = Room(dtype, d_model if inner == 1 else inner)
    left, right = (np.ascontiguousarray(factor, room.wide.dtype) for factor in change)
    at = 0
    with np.errstate(all="ignore"):  # said below, once
        for blocks in room.matrices(read, outer, d_model, inner):
            for block in _changed(blocks, left, right, keep_norms, name):
                rows = block if inner > 1 else block.T
                if addition is not None:
                    np.add(rows, addition[at : at + len(rows)], out=rows)
                new = room.stored[: len(rows)]
                np.copyto(new, rows, casting="unsafe")
                if dtype == np.float16 or addition is not None:
                    _check_finite(new, name)
                write(new)
                at += len(rows)


class Room:
    """Arrays for a block of rows, made once: as stored, widened, and for what is subtracted."""

    def __init__(self, dtype: np.dtype[Any], width: int) -> None:
        self.step = max(1, BLOCK // max(1, width))
        self.stored: Array = np.empty((self.step, width), dtype)
        self.wide: Array = np.empty((self.step, width), np.float64 if dtype == np.float64 else np.float32)
        self.spare: Array = np.empty_like(self.wide)

    def matrices(self, read: Read, outer: int, d_model: int, inner: int) -> Iterator[Blocks]:
        """For each matrix W [d_model, inner], what gives its rows, widened, block by block, as often as it is asked.

        Where `inner` is 1, some vectors along d_model are a matrix of which they are the columns, in one block.
        """

        def widened(count: int) -> tuple[Array, Array]:
            np.copyto(self.wide[:count], self.stored[:count])
            return self.wide[:count], self.spare[:count]

        def across(first: int) -> Iterator[tuple[slice, Array, Array]]:
            for low, high in spans(0, d_model, self.step):
                read(first + low, self.stored[: high - low])
                yield slice(low, high), *widened(high - low)

        def along(count: int) -> Iterator[tuple[slice, Array, Array]]:
            wide, spare = widened(count)
            yield slice(None), wide.T, spare.T

        if inner > 1:
            for index in range(outer):
                yield partial(across, index * d_model)
        else:
            for low, high in spans(0, outer, self.step):
                read(low, self.stored[: high - low])
                yield partial(along, high - low)


def _changed(blocks: Blocks, left: Array, right: Array, keep_norms: bool, name: str) -> Iterator[Array]:
    """A matrix's rows without what is taken out: first through all of it for right W, then for what is left."""
    if not len(right):
        return (wide for _, wide, _ in blocks())
    inside: Array = reduce(np.add, (right[:, rows] @ wide for rows, wide, _ in blocks()))
    _check_finite(inside, name)

    def without() -> Iterator[Array]:
        for rows, wide, share in blocks():
            for column, row in zip(left[:, rows], inside, strict=True):
                np.subtract(wide, np.multiply(column[:, None], row, out=share), out=wide)
            yield wide

    if not keep_norms:
        return without()
    before, after = _norms(wide for _, wide, _ in blocks()), _norms(without())
    keep = after > LEAST_LEFT * before  # as in `removal.removed`
    factor = np.where(keep, before / np.where(keep, after, 1), 1).astype(left.dtype)
    return (np.multiply(wide, factor, out=wide) for wide in without())


def _norms(blocks: Iterator[Array]) -> Array:
    """Of the columns of a matrix, summed in float64."""
    norms: Array = np.sqrt(reduce(np.add, (np.einsum("ij,ij->j", wide, wide).astype(np.float64) for wide in blocks)))
    return norms


def _check_finite(values: Array, name: str) -> None:
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"editing {name} gives NaN or infinite values: it holds some, or its dtype overflows; nothing was written"
        )
