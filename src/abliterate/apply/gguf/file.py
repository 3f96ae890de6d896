"""GGUF files byte for byte: where everything is, checked strictly, and writing a copy with some tensors changed.

The `gguf` package reads values; what is needed here is the byte ranges, so that all that isn't edited is copied as it
is, and a reader that a damaged header can't lead astray. The format: the GGUF specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from abliterate.common.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# What llama.cpp takes: GGML_MAX_DIMS, GGML_MAX_NAME less the closing zero, and its limit on alignment.
MOST_DIMENSIONS = 4
LONGEST_NAME = 63
LARGEST_ALIGNMENT = 2**20
MOST_STRINGS = 2**24  # in an array; the largest vocabularies and lists of merges have some hundred thousand
DEFAULT_ALIGNMENT = 32

# GGUFValueType -> struct format; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Layout(NamedTuple):
    """Values a block, and bytes a block, of a tensor type."""

    block: int
    size: int


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
        name: as llama.cpp names it.
        shape: slowest dimension first, as in numpy (GGUF stores them the other way round).
        kind: name of its ggml type, "Q4_K".
        start: offset in the file.
        size: bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's layout; see `open_gguf`.

    Attributes:
        path: the file.
        alignment: of tensor data, in bytes.
        metadata: its key-value pairs; an array is left out as None.
        places: where each scalar value of the metadata lies.
        tensors: by name, in the file's order.
        infos: the byte range that describes the tensors.
        data: offset of the first tensor's data.
        size: bytes of the file.
    """

    path: Path
    alignment: int
    metadata: dict[str, Any]
    places: dict[str, int]
    tensors: dict[str, GgufTensor]
    infos: tuple[int, int]
    data: int
    size: int = field(default=0)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str) -> int | None:
        """A whole number out of the architecture's own metadata ("block_count"), if it is there."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def raw(self, tensor: GgufTensor) -> np.ndarray:
        """A tensor's bytes [..., bytes of a row], mapped, not read."""
        layout = layout_of(tensor.kind)
        shape = (*tensor.shape[:-1], tensor.shape[-1] // layout.block * layout.size)
        return np.memmap(self.path, np.uint8, "r", tensor.start, shape)


class _Damaged(Exception):
    pass


class _Cursor:
    """Reads values one after the other and never beyond the end."""

    def __init__(self, data: mmap.mmap, end: int) -> None:
        self.data, self.end, self.at = data, end, 0

    def take(self, size: int) -> int:
        """Step over `size` bytes; where they began."""
        start = self.at
        if size > self.end - start:
            raise _Damaged("it ends in the middle of its header")
        self.at = start + size
        return start

    def value(self, form: str) -> Any:
        return struct.unpack_from("<" + form, self.data, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        size = self.value("Q")
        start = self.take(size)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged(f"the text at byte {start} is not UTF-8") from None

    def skip_text(self) -> None:
        self.take(self.value("Q"))


def layout_of(kind: str) -> Layout:
    """Values and bytes a block of a ggml type, by name."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return Layout(*GGML_QUANT_SIZES[GGMLQuantizationType[kind]])


def number_of(kind: str) -> int:
    """ggml's number of a type, by name."""
    from gguf.constants import GGMLQuantizationType

    return int(GGMLQuantizationType[kind])


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read a GGUF file's header and check that all it promises is there.

    Raises:
        ModelError: when there is no such file, it isn't a whole GGUF of version 2 or 3 (little-endian), or it is a
            part of a split one; the text says what is wrong.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError(f"GGUF {path} not found; name a .gguf file")
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            if file.read(4) != MAGIC:
                raise _Damaged("it doesn't begin as a GGUF does")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                opened = _read(path, data, size)
    except (_Damaged, struct.error) as error:
        raise ModelError(f"GGUF {path} can't be read: {error}; get the file again") from None
    except OSError as error:
        raise ModelError(f"GGUF {path} can't be read: {error.strerror or error}") from error
    parts = opened.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"GGUF {path} is one of {parts} parts; join them first: llama-gguf-split --merge FIRST-PART WHOLE.gguf"
        )
    return opened


def _read(path: Path, data: mmap.mmap, size: int) -> GgufFile:
    cursor = _Cursor(data, size)
    cursor.take(4)
    version = cursor.value("I")
    if version not in VERSIONS:
        endian = "; it is big-endian" if version >> 16 else ""
        raise _Damaged(f"its version is {version}, and {VERSIONS[0]} and {VERSIONS[1]} are read{endian}")
    tensor_count, pair_count = cursor.value("Q"), cursor.value("Q")
    metadata: dict[str, Any] = {}
    places: dict[str, int] = {}
    for _ in range(pair_count):  # a count that lies meets the end of the file
        key = cursor.text()
        if key in metadata:
            raise _Damaged(f"its metadata has {key} twice")
        metadata[key], places[key] = _value(cursor)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise _Damaged(f"its alignment is {alignment!r}, which is no power of two")
    start = cursor.at
    described = [_described(cursor) for _ in range(tensor_count)]
    infos = (start, cursor.at)
    first = padded(cursor.at, alignment)
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in described:
        if name in tensors:
            raise _Damaged(f"it has tensor {name} twice")
        if offset % alignment:
            raise _Damaged(f"tensor {name} is not aligned")
        tensors[name] = GgufTensor(name, shape, kind, first + offset, bytes_of(shape, kind))
    end = first
    for tensor in sorted(tensors.values(), key=lambda t: t.start):
        if tensor.start < end:
            raise _Damaged(f"tensor {tensor.name} overlaps another")
        end = tensor.start + tensor.size
        if end > size:
            raise _Damaged(f"it is cut short: tensor {tensor.name} ends at byte {end:,}, the file at {size:,}")
    return GgufFile(path, alignment, metadata, places, tensors, infos, first, size)


def _value(cursor: _Cursor) -> tuple[Any, int]:
    """A metadata value and where it lies; None for an array, which is stepped over."""
    kind = cursor.value("I")
    place = cursor.at
    if kind == _STRING:
        return cursor.text(), place
    if kind == _ARRAY:
        inner, count = cursor.value("I"), cursor.value("Q")
        if inner in _SCALARS:
            cursor.take(count * struct.calcsize("<" + _SCALARS[inner]))
        elif inner == _STRING:
            if count > MOST_STRINGS:
                raise _Damaged(f"its metadata has an array of {count:,} strings")
            for _ in range(count):
                cursor.skip_text()
        else:  # arrays of arrays are in the format, and llama.cpp doesn't take them
            raise _Damaged(f"its metadata has an array of the unknown type {inner}")
        return None, place
    if kind not in _SCALARS:
        raise _Damaged(f"its metadata has a value of the unknown type {kind}")
    return cursor.value(_SCALARS[kind]), place


def _described(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
    """Name, shape, type and offset of a tensor."""
    from gguf.constants import GGMLQuantizationType

    name = cursor.text()
    if not name or len(name.encode()) > LONGEST_NAME:
        raise _Damaged(f"a tensor's name has {len(name.encode())} bytes")
    dimensions = cursor.value("I")
    if not 0 < dimensions <= MOST_DIMENSIONS:
        raise _Damaged(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.value("Q") for _ in range(dimensions))[::-1]
    number, offset = cursor.value("I"), cursor.value("Q")
    try:
        kind = GGMLQuantizationType(number).name
    except ValueError:
        raise _Damaged(f"tensor {name} is of the unknown type {number} (a newer `gguf` package may know it)") from None
    if min(shape) < 1 or shape[-1] % layout_of(kind).block:
        raise _Damaged(f"tensor {name} of type {kind} has shape {list(shape)}")
    return name, shape, kind, offset


def bytes_of(shape: Iterable[int], kind: str) -> int:
    """Bytes of a tensor."""
    count = 1
    for n in shape:
        count *= n
    layout = layout_of(kind)
    return count // layout.block * layout.size


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


# Writes a tensor's new bytes: called with the output, open for writing, and where the tensor begins in it.
Writer = Callable[[int, int], None]


class NewTensor(NamedTuple):
    """A tensor of a file to be written: its shape (slowest first), type, and what writes its data there."""

    shape: tuple[int, ...]
    kind: str
    write: Writer


def write_copy(
    source: GgufFile, target: str | os.PathLike[str], edited: Mapping[str, Writer], added: Mapping[str, NewTensor]
) -> int:
    """Write a copy of a GGUF in which some tensors have new data and some are added after the last.

    All other bytes are the source's own: without `added` the two files differ only inside the edited tensors; with
    it the header differs in the number of tensors and their descriptions, and what follows lies further on.

    Args:
        source: from `open_gguf`.
        target: the file to make.
        edited: tensor name -> what writes its new data, of the same shape and type.
        added: tensor name -> the new tensor.

    Returns:
        Bytes written.
    """
    header = _header(source, added)
    moved = len(header) - source.data
    end = source.size
    if added:
        end = padded(max((t.start + t.size for t in source.tensors.values()), default=source.data), source.alignment)
    with open(source.path, "rb") as given, open(target, "wb") as file:
        out = file.fileno()
        write_at(out, 0, header)
        at = source.data
        for tensor in sorted((source.tensors[name] for name in edited), key=lambda t: t.start):
            copy_range(given.fileno(), at, out, at + moved, tensor.start - at)
            edited[tensor.name](out, tensor.start + moved)
            at = tensor.start + tensor.size
        kept = min(end, source.size)
        copy_range(given.fileno(), at, out, at + moved, kept - at)
        end += moved
        write_at(out, kept + moved, bytes(end - kept - moved))
        for new in added.values():
            new.write(out, end)
            size = bytes_of(new.shape, new.kind)
            write_at(out, end + size, bytes(padded(size, source.alignment) - size))
            end += padded(size, source.alignment)
    return end


def _header(source: GgufFile, added: Mapping[str, NewTensor]) -> bytes:
    """All before the first tensor's data."""
    with open(source.path, "rb") as file:
        before = file.read(source.infos[1])
        if not added:
            return before + file.read(source.data - source.infos[1])
    count = len(source.tensors) + len(added)
    offset = max((t.start + t.size for t in source.tensors.values()), default=source.data) - source.data
    infos = b""
    for name, tensor in added.items():
        offset = padded(offset, source.alignment)
        infos += described(name, tensor.shape, tensor.kind, offset)
        offset += bytes_of(tensor.shape, tensor.kind)
    header = before[:8] + struct.pack("<Q", count) + before[16:] + infos
    return header + bytes(padded(len(header), source.alignment) - len(header))


def described(name: str, shape: tuple[int, ...], kind: str, offset: int) -> bytes:
    """A tensor's entry in the header; offset from where the data begins."""
    encoded = name.encode()
    return (
        struct.pack("<Q", len(encoded)) + encoded + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", number_of(kind), offset)
    )  # fmt: skip


def write_retyped(
    source: GgufFile, target: str | os.PathLike[str], kinds: Mapping[str, str], values: Mapping[str, Any],
    rewritten: Callable[[GgufTensor, str], Iterator[bytes]],
) -> int:  # fmt: skip
    """Write a GGUF with some tensors in another type, in the same order; the metadata stays but for `values`.

    Args:
        source: from `open_gguf`.
        target: the file to make.
        kinds: tensor name -> its new type.
        values: metadata key -> new value, a whole number that is there already.
        rewritten: gives a tensor's data in a new type, piece by piece.

    Returns:
        Bytes written.
    """
    with open(source.path, "rb") as file:
        header = bytearray(file.read(source.infos[0]))
    for key, value in values.items():
        if key in source.places:
            struct.pack_into("<I", header, source.places[key], value)
    offset = 0
    for tensor in source.tensors.values():
        kind = kinds.get(tensor.name, tensor.kind)
        header += described(tensor.name, tensor.shape, kind, offset)
        offset += padded(bytes_of(tensor.shape, kind), source.alignment)
    header += bytes(padded(len(header), source.alignment) - len(header))
    with open(source.path, "rb") as given, open(target, "wb") as file:
        file.write(header)
        for tensor in source.tensors.values():
            if tensor.name in kinds:
                for piece in rewritten(tensor, kinds[tensor.name]):
                    file.write(piece)
            else:
                file.flush()
                copy_range(given.fileno(), tensor.start, file.fileno(), file.tell(), tensor.size)
                file.seek(tensor.size, os.SEEK_CUR)
            file.write(bytes(padded(file.tell(), source.alignment) - file.tell()))
    return len(header) + offset


def write_at(file: int, at: int, data: bytes | memoryview) -> None:
    """Write all of it, at an offset."""
    left = memoryview(data)
    while len(left):
        done = os.pwrite(file, left, at)
        at, left = at + done, left[done:]


def copy_range(source: int, start: int, target: int, at: int, size: int) -> None:
    """Copy bytes between files inside the kernel where it can, without holding them in memory."""
    while size > 0:
        done = _copied_by_kernel(source, start, target, at, size)
        if not done:
            data = os.pread(source, min(size, 1 << 22), start)
            if not data:
                raise OSError(f"the source ended {size:,} bytes early; it was changed meanwhile")
            write_at(target, at, data)
            done = len(data)
        start, at, size = start + done, at + done, size - done


def _copied_by_kernel(source: int, start: int, target: int, at: int, size: int) -> int:
    copy = getattr(os, "copy_file_range", None)
    if copy is None:
        return 0
    # across filesystems, or on one that can't; a full disk shows itself when the bytes are written
    with contextlib.suppress(OSError):
        return int(copy(source, target, size, start, at))
    return 0
