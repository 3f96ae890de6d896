"""An edit's arithmetic on a stored weight, block by block, in numpy: memory stays in a core's cache. No files here.

A weight is read row by row, as often as it takes, widened to float32, changed, rounded once and handed on. What
numpy has no dtype for (bfloat16) or is slow at (float16) is widened and rounded by shifting bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from abliterate.common.errors import NonFiniteError
from abliterate.edit.algebra import LEAST_LEFT, ArrayFactors

if TYPE_CHECKING:
    from jaxtyping import Float

Array = np.ndarray[Any, Any]

BLOCK = 2**16  # elements at a time: widened, and once more for what is subtracted, they stay in a core's L2 cache
# How each dtype of safetensors that can be edited lies in memory.
RAW = {"F64": np.float64, "F32": np.float32, "F16": np.uint16, "BF16": np.uint16}


class Rows(Protocol):
    """Rows of stored numbers that lie one after the other, as bits (`RAW`)."""

    def load(self, low: int, high: int, into: Array) -> None:
        """Read the rows from `low` up to `high`."""

    def store(self, low: int, high: int, values: Array) -> None:
        """Write them."""


@dataclass
class HeldRows:
    """Rows in memory, [row, width]."""

    values: Array

    def load(self, low: int, high: int, into: Array) -> None:
        into[...] = self.values[low:high]

    def store(self, low: int, high: int, values: Array) -> None:
        self.values[low:high] = values


class Block:
    """Room for some rows of a stored weight, and what takes them there and back.

    Attributes:
        step: how many rows it holds.
    """

    def __init__(self, dtype: str, width: int) -> None:
        """For rows of `width` numbers of a safetensors dtype."""
        self.dtype, self.step = dtype, max(1, BLOCK // max(1, width))
        self.raw: Array = np.empty((self.step, width), RAW[dtype])
        self.wide: Array = np.empty((self.step, width), np.float64 if dtype == "F64" else np.float32)
        self.other: Array = np.empty_like(self.wide)
        self.finite = True  # whether all that was read or written in a dtype without room for more was

    def load(self, rows: Rows, low: int, high: int) -> Float[Array, "row width"]:
        """Rows, widened; good until the next."""
        raw, wide = self.raw[: high - low], self.wide[: high - low]
        rows.load(low, high, raw)
        self.widen(raw, wide)
        return wide

    def store(self, rows: Rows, low: int, high: int) -> None:
        """Round what `load` gave, changed since, and write it."""
        raw, wide = self.raw[: high - low], self.wide[: high - low]
        self.narrow(wide, raw, self.other[: high - low])
        rows.store(low, high, raw)

    def widen(self, raw: Array, wide: Array) -> None:
        if self.dtype == "BF16":  # the upper half of a float32
            bits = wide.view(np.uint32)
            np.copyto(bits, raw)
            np.left_shift(bits, 16, out=bits)
        elif self.dtype == "F16":  # sign to its place, the rest to where it is 2^-112 times its value
            signed = wide.view(np.int32)
            np.copyto(signed, raw.view(np.int16))
            np.left_shift(signed, 13, out=signed)
            np.bitwise_and(wide.view(np.uint32), np.uint32(0x8FFFE000), out=wide.view(np.uint32))
            np.multiply(wide, np.float32(2.0**112), out=wide)
            self.finite &= bool(np.max(wide, initial=0) < 2.0**16 and np.min(wide, initial=0) > -(2.0**16))
        else:
            np.copyto(wide, raw)

    def narrow(self, wide: Array, raw: Array, other: Array) -> None:
        """Round to nearest, ties to even; `wide` and `other` are used up."""
        if self.dtype == "BF16":
            _drop(wide.view(np.uint32), 16, other.view(np.uint32))
            np.copyto(raw, wide.view(np.uint32), casting="unsafe")
        elif self.dtype == "F16":
            self.finite &= bool(np.max(wide, initial=0) < 65520 and np.min(wide, initial=0) > -65520)  # rounded: inf
            np.multiply(wide, np.float32(2.0**-112), out=wide)
            bits, spare = wide.view(np.uint32), other.view(np.uint32)
            np.right_shift(bits, 16, out=spare)
            np.bitwise_and(spare, np.uint32(0x8000), out=spare)
            np.copyto(raw, spare, casting="unsafe")
            _drop(bits, 13, spare)
            np.bitwise_and(bits, np.uint32(0x7FFF), out=bits)
            np.copyto(spare, raw)
            np.bitwise_or(bits, spare, out=bits)
            np.copyto(raw, bits, casting="unsafe")
        else:
            np.copyto(raw, wide)


def _drop(bits: Array, count: int, spare: Array) -> None:
    """Shift `count` bits out on the right, rounding to the nearest, ties to even."""
    np.right_shift(bits, count, out=spare)
    np.bitwise_and(spare, np.uint32(1), out=spare)
    np.add(spare, np.uint32(2 ** (count - 1) - 1), out=spare)
    np.add(bits, spare, out=bits)
    np.right_shift(bits, count, out=bits)


def take_out(
    rows: Rows, dtype: str, shape: tuple[int, int, int], change: ArrayFactors, *, keep_norms: bool = False,
    name: str = "a weight",
) -> None:  # fmt: skip
    """W <- W - left^T (right W) for every matrix W [d_model, inner] of a stack [outer, d_model, inner].

    The arithmetic runs in float32 (float64 for float64), and the result is rounded once.

    Args:
        rows: of the stack, `inner` numbers each; where `inner` is 1, d_model numbers each.
        dtype: safetensors' name, of `RAW`.
        shape: outer, d_model, inner.
        change: left and right [k, d_model], from `algebra.taken_out`.
        keep_norms: rescale each column of W to the norm it had (see `apply.norms`).
        name: for the error.

    Raises:
        NonFiniteError: when a value is, or becomes, NaN or infinite.
    """
    outer, d_model, inner = shape
    block = Block(dtype, d_model if inner == 1 else inner)
    left, right = (np.ascontiguousarray(factor, block.wide.dtype) for factor in change)
    with np.errstate(all="ignore"):  # said below, once
        if inner == 1:
            finite = _along_rows(rows, block, outer, left, right, keep_norms)
        else:
            across = _keeping_norms if keep_norms else _across_rows
            finite = all(across(rows, block, i * d_model, left, right) for i in range(outer))
    if not (finite and block.finite):
        raise NonFiniteError(
            f"editing {name} gives NaN or infinite values: it holds some, or its dtype overflows; nothing was written"
        )


def add(rows: Rows, dtype: str, addition: Float[Array, "row width"], *, name: str = "a weight") -> None:
    """Add float32 numbers to rows.

    Raises:
        NonFiniteError: when a float16 overflows.
    """
    block = Block(dtype, addition.shape[1])
    with np.errstate(all="ignore"):
        for low in range(0, len(addition), block.step):
            high = min(low + block.step, len(addition))
            np.add(block.load(rows, low, high), addition[low:high], out=block.wide[: high - low])
            block.store(rows, low, high)
    if not block.finite:
        raise NonFiniteError(f"a shift in {name} overflows its dtype; nothing was written")


def _along_rows(rows: Rows, block: Block, count: int, left: Array, right: Array, keep: bool) -> bool:
    """For rows that are the vectors along d_model; whether all stayed finite."""
    finite = True
    for low in range(0, count, block.step):
        high = min(low + block.step, count)
        wide = block.load(rows, low, high)
        norms = np.sqrt(np.einsum("ij,ij->i", wide, wide)) if keep else None
        inside = np.stack([wide @ row for row in right]) if len(right) else np.empty((0, len(wide)), wide.dtype)
        _subtract(wide, inside, left, block)
        if norms is not None:
            wide *= _factor(norms, np.sqrt(np.einsum("ij,ij->i", wide, wide)))[:, None]
        finite &= bool(np.isfinite(inside).all())
        block.store(rows, low, high)
    return finite


def _across_rows(rows: Rows, block: Block, first: int, left: Array, right: Array) -> bool:
    """For a matrix of which each row holds one feature of the stream: right W first, then W less its share of it."""
    inside, _ = _inside(rows, block, first, right, squares=False)
    if not np.isfinite(inside).all():
        return False
    for low, high in _steps(block, right):
        wide = block.load(rows, first + low, first + high)
        _subtract(wide, left[:, low:high], inside, block)
        block.store(rows, first + low, first + high)
    return True


def _keeping_norms(rows: Rows, block: Block, first: int, left: Array, right: Array) -> bool:
    """The same, and each column gets the norm it had: once more through the matrix, for the norms that are left."""
    inside, before = _inside(rows, block, first, right, squares=True)
    if not np.isfinite(inside).all():
        return False
    after = np.zeros_like(before)
    for low, high in _steps(block, right):
        wide = block.load(rows, first + low, first + high)
        _subtract(wide, left[:, low:high], inside, block)
        after += np.einsum("ij,ij->j", wide, wide)
    factor = _factor(np.sqrt(before), np.sqrt(after)).astype(block.wide.dtype)
    for low, high in _steps(block, right):
        wide = block.load(rows, first + low, first + high)
        _subtract(wide, left[:, low:high], inside, block)
        np.multiply(wide, factor, out=wide)
        block.store(rows, first + low, first + high)
    return True


def _inside(rows: Rows, block: Block, first: int, right: Array, *, squares: bool) -> tuple[Array, Array]:
    """right W [k, inner], and with `squares` the sums of squares of W's columns, in float64."""
    width = block.wide.shape[1]
    inside, part = np.zeros((len(right), width), block.wide.dtype), np.empty(width, block.wide.dtype)
    sums = np.zeros(width if squares else 0)
    for low, high in _steps(block, right):
        wide = block.load(rows, first + low, first + high)
        for total, row in zip(inside, right, strict=True):
            np.add(total, np.dot(row[low:high], wide, out=part), out=total)
        if squares:
            sums += np.einsum("ij,ij->j", wide, wide)
    return inside, sums


def _steps(block: Block, right: Array) -> list[tuple[int, int]]:
    d_model = right.shape[1]
    return [(low, min(low + block.step, d_model)) for low in range(0, d_model, block.step)]


def _subtract(wide: Array, first: Array, second: Array, block: Block) -> None:
    """wide <- wide - first^T second; first [k, row], second [k, width]."""
    if not len(first):
        return
    product = block.other[: len(wide)]
    if len(first) == 1:  # faster than a matrix product
        np.multiply(first[0][:, None], second[0], out=product)
    else:
        np.matmul(first.T, second, out=product)
    np.subtract(wide, product, out=wide)


def _factor(norms: Array, left: Array) -> Array:
    """What gives vectors the norms they had: `norms.rescaled`, where the why of the exception is."""
    keep = left > LEAST_LEFT * norms
    return np.where(keep, norms / np.where(keep, left, 1), 1)
