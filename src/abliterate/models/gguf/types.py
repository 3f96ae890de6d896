"""Packing and unpacking ggml's tensor types.

The `gguf` package unpacks all types and packs the simple ones (F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and some more);
the others, above all the K-quants, are packed by ggml itself, llama.cpp's own library, which the `xllamacpp` wheel
carries: its C function `ggml_quantize_chunk`, which `llama-quantize` calls as well. The two give the same bytes and
values where both know a type (a test compares them), so ggml is used for all where it is there: it is faster.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from abliterate.common.errors import ModelError

EXTRA = "gguf"
# Stored as plain numbers: the nearest number of the type is as good as it gets.
PLAIN = ("F32", "F16", "BF16")


class Layout(NamedTuple):
    """Values a block, and bytes a block, of a tensor type."""

    block: int
    size: int


def layout_of(kind: str) -> Layout:
    """Values and bytes a block of a ggml type, by name."""
    return Layout(*GGML_QUANT_SIZES[GGMLQuantizationType[kind]])


def byte_shape(shape: Sequence[int], kind: str) -> tuple[int, ...]:
    """The shape of a tensor's bytes: its last dimension, a multiple of the type's block, packed."""
    layout = layout_of(kind)
    return (*shape[:-1], shape[-1] // layout.block * layout.size)


def bytes_of(shape: Sequence[int], kind: str) -> int:
    """Bytes of a tensor."""
    return math.prod(byte_shape(shape, kind))


def unpack(raw: np.ndarray, kind: str) -> np.ndarray:
    """Values, float32, of packed rows.

    Args:
        raw: uint8 [..., bytes of a row].
        kind: ggml type, "Q4_K".

    Raises:
        ModelError: when the `gguf` package can't unpack the type.
    """
    raw = np.ascontiguousarray(raw)
    if kind == "F32":
        return raw.view(np.float32)
    in_c = kind.lower().replace("_k", "_K")  # ggml's functions say q4_K, q8_0
    native = None if kind in PLAIN else getattr(_ggml(), f"dequantize_row_{in_c}", None)
    if native is not None:
        layout = layout_of(kind)
        values = np.empty((*raw.shape[:-1], raw.shape[-1] // layout.size * layout.block), np.float32)
        native(ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(values.size))
        return values
    try:
        return quants.dequantize(raw, GGMLQuantizationType[kind]).astype(np.float32, copy=False)
    except NotImplementedError:
        raise ModelError(f"tensors of type {kind} can't be unpacked by the gguf package") from None


def pack(values: np.ndarray, kind: str) -> np.ndarray:
    """Pack rows of values into a type, without an importance matrix; rows and blocks don't influence each other.

    Args:
        values: float32 [..., values of a row], a multiple of the type's block.
        kind: ggml type.

    Returns:
        uint8 [..., bytes of a row].

    Raises:
        ModelError: when nothing installed packs the type; the text names the extra that does.
    """
    values = np.ascontiguousarray(values, np.float32)
    if kind == "F32":
        return values.view(np.uint8)
    library = _ggml()
    if library is None or kind in PLAIN:
        return _packed_in_python(values, kind)
    number, row = GGMLQuantizationType[kind].value, values.shape[-1]
    if library.ggml_quantize_requires_imatrix(number):
        raise ModelError(f"tensors of type {kind} can't be packed without an importance matrix; take another GGUF")
    packed = np.empty(byte_shape(values.shape, kind), np.uint8)
    written = library.ggml_quantize_chunk(
        number, values.ctypes.data, packed.ctypes.data, 0, values.size // row, row, None
    )
    if written != packed.nbytes:
        raise ModelError(f"ggml packed {written:,} bytes of type {kind} where {packed.nbytes:,} were due")
    return packed


def check_packs(kind: str) -> None:
    """Raise ModelError when nothing installed packs this type."""
    pack(np.zeros((1, layout_of(kind).block), np.float32), kind)


def _packed_in_python(values: np.ndarray, kind: str) -> np.ndarray:
    try:
        packed = quants.quantize(values, GGMLQuantizationType[kind]).view(np.uint8)
    except NotImplementedError:
        raise ModelError(
            f"tensors of type {kind} are packed by llama.cpp's own library, which isn't installed: "
            f"pip install 'abliterate[{EXTRA}]'"
        ) from None
    return packed.reshape(*values.shape[:-1], -1)


@cache
def _ggml() -> ctypes.CDLL | None:
    """llama.cpp's library out of the xllamacpp wheel, or None."""
    spec = importlib.util.find_spec("xllamacpp")  # not imported: only its library is wanted
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("xllamacpp*.so")):
            try:
                library = ctypes.CDLL(str(file))
                library.ggml_quantize_chunk.restype = ctypes.c_size_t
            except (OSError, AttributeError):  # another platform's, or built without its C functions
                continue
            long, pointer = ctypes.c_int64, ctypes.c_void_p
            library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
            library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
            library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
            return library
    return None
