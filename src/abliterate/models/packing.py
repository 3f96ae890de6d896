"""A packed matrix: codes, numbers of few bits, times scales, one for a block of them. No files here, no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from abliterate.edit.stored_tensor import Shape

Array = np.ndarray[Any, Any]

E4M3, E2M1 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float4_e2m1fn)


@dataclass(frozen=True)
class Codes:
    """The numbers of a format.

    Attributes:
        top: the largest.
        most: what still rounds to it.
        decode: bytes of rows -> values, float32; encode: the reverse.
        nearest: float32 -> the nearest number, float32; beyond `top` it is `top`.
    """

    top: float
    most: float
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]
    nearest: Callable[[Array], Array]


def floats(dtype: np.dtype[Any]) -> Codes:
    """Small floats; two of 4 bits are a byte, the first in its lower half."""
    info = ml_dtypes.finfo(dtype)
    top = float(info.max)
    below = float(np.nextafter(np.array(info.max, dtype), np.array(0, dtype)))

    def rounded(values: Array) -> Array:
        return np.clip(values, -top, top).astype(dtype)

    def decode(raw: Array) -> Array:
        return (_nibbles(raw) if dtype == E2M1 else raw).view(dtype).astype(np.float32)

    def encode(values: Array) -> Array:
        codes = rounded(values).view(np.uint8)
        return codes[..., ::2] & 15 | codes[..., 1::2] << 4 if dtype == E2M1 else codes

    return Codes(top, top + (top - below) / 2, decode, encode, lambda values: rounded(values).astype(np.float32))


def _nibbles(raw: Array, *, high_first: bool = False) -> Array:
    halves = (raw >> 4, raw & 15) if high_first else (raw & 15, raw >> 4)
    return np.stack(halves, -1).reshape(*raw.shape[:-1], -1)


def integers() -> Codes:
    """Of 8 bits, as many below zero as above."""

    def nearest(values: Array) -> Array:
        return np.clip(np.rint(values), -127, 127)

    return Codes(
        127, 127.5, lambda raw: raw.view(np.int8).astype(np.float32),
        lambda values: nearest(values).astype(np.int8).view(np.uint8), nearest,
    )  # fmt: skip


def table(numbers: Array) -> Codes:
    """bitsandbytes' 4 bits: indices into 16 numbers between -1 and 1, the first in a byte's upper half."""
    order = np.argsort(numbers)
    between = (numbers[order][1:] + numbers[order][:-1]) / 2

    def index(values: Array) -> Array:
        return order[np.searchsorted(between, values)]

    def encode(values: Array) -> Array:
        codes = index(values).astype(np.uint8)
        return codes[..., ::2] << 4 | codes[..., 1::2]

    return Codes(
        1.0, 1.0, lambda raw: numbers[_nibbles(raw, high_first=True)], encode, lambda values: numbers[index(values)]
    )


@dataclass
class Scales:
    """The scales of one matrix, in the bytes that hold them.

    Attributes:
        stored: [row of blocks, column of blocks], a view of those bytes.
        unit: what each is multiplied by.
        over: of NVFP4, the tensor's own scale [1]; `inverse`: whether it divides.
        nested: of bitsandbytes' 4 bits, where `stored` are indices: the numbers [256] they mean, the scales of these,
            what is added to them, and how many share one of those scales.
    """

    stored: Array
    unit: float = 1.0
    over: Array | None = None
    inverse: bool = False
    nested: tuple[Array, Array, float, int] | None = None

    def read(self) -> Array:
        """Their values, float32."""
        if self.nested is not None:
            numbers, sizes, offset, step = self.nested
            return numbers[self.stored] * _spread(sizes, step, self.stored.shape[1]) + np.float32(offset)
        if self.stored.dtype == np.uint8:
            return np.exp2(self.stored.astype(np.float32) - 127)
        values = self.stored.astype(np.float32) * np.float32(self.unit)
        return values if self.over is None else values * self._tensor_scale()

    def write(self, wanted: Array) -> Array:
        """Store these, positive; returns what they are as stored."""
        if self.nested is not None:
            numbers, sizes, offset, step = self.nested
            wanted = wanted - np.float32(offset)
            largest = np.maximum.reduceat(np.abs(wanted[0]), np.arange(0, wanted.shape[1], step))
            sizes[:] = np.maximum(sizes, largest)
            between = (numbers[1:] + numbers[:-1]) / 2
            self.stored[:] = np.searchsorted(between, wanted / np.maximum(_spread(sizes, step, wanted.shape[1]), 1e-38))
        elif self.stored.dtype == np.uint8:
            self.stored[:] = np.clip(np.rint(np.log2(np.maximum(wanted, 1e-38))) + 127, 0, 254).astype(np.uint8)
        else:
            if self.over is not None:
                least = float(wanted.max()) / float(ml_dtypes.finfo(E4M3).max)
                if least > self._tensor_scale():
                    self.over[:] = 1 / least if self.inverse else least
                wanted = wanted / self._tensor_scale()
            self.stored[:] = (wanted / np.float32(self.unit)).astype(self.stored.dtype)
        return self.read()

    def _tensor_scale(self) -> np.float32:
        assert self.over is not None
        over = np.float32(self.over.reshape(-1)[0])
        return np.float32(1) / over if self.inverse else over


def _spread(sizes: Array, step: int, count: int) -> Array:
    return np.repeat(sizes, step)[:count][None]


@dataclass
class Matrix:
    """One packed matrix, in the bytes that hold it.

    Attributes:
        raw: its codes' bytes [row, bytes of a row].
        scales, codes: what they mean.
        block: rows and columns that share a scale.
        flat: whether blocks are of the values one after the other, across rows.
        fixed: the scale belongs to other matrices too and stays.
    """

    raw: Array
    scales: Scales
    codes: Codes
    block: tuple[int, int]
    flat: bool = False
    fixed: bool = False

    def values(self) -> Array:
        """[row, column], float32."""
        values = self.codes.decode(self.raw)
        return values * self._over(self.scales.read(), values.shape)

    def rescaled(self, values: Array) -> Array:
        """Store scales that these values [row, column] fit; returns each value's, [row, column] or broadcast to it.

        A scale that fits stays: values that an edit hardly changes then stay where they were.
        """
        old = self.scales.read()
        if self.fixed:
            return self._over(old, values.shape)
        sizes = np.abs(values).reshape(1, -1) if self.flat else np.abs(values)
        for axis, step in enumerate(self.block):
            sizes = np.maximum.reduceat(sizes, np.arange(0, sizes.shape[axis], step), axis)
        # scales that are powers of two stay so: DeepSeek's of 32 bits too, which kernels then read as 8
        powers = self.scales.nested is None and old.size > 1 and bool((np.frexp(old)[0] == 0.5).all())
        needed = sizes / self.codes.top
        if powers:
            needed = np.exp2(np.ceil(np.log2(np.maximum(sizes, 1e-38) / self.codes.most)))
        fits = (sizes <= old * self.codes.most) & (sizes > old * self.codes.top / 2)
        return self._over(self.scales.write(np.where(fits | (sizes == 0), old, needed)), values.shape)

    def write(self, values: Array, scales: Array) -> None:
        """Store values [row, column] that are numbers of the format times these scales."""
        self.raw[:] = self.codes.encode(values / np.where(scales > 0, scales, 1)).reshape(self.raw.shape)

    def _over(self, scales: Array, shape: Shape) -> Array:
        """The scales of values of a shape; one that all along an axis share is broadcast."""
        target = (1, shape[0] * shape[1]) if self.flat else shape
        for axis, step in enumerate(self.block):
            if scales.shape[axis] > 1:
                scales = np.repeat(scales, step, axis)
                scales = scales[: target[0]] if axis == 0 else scales[:, : target[1]]
        return scales.reshape(shape) if self.flat else scales
