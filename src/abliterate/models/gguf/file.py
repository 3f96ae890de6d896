"""GGUF files byte for byte: where everything is, checked strictly.

The `gguf` package reads them; what it lets pass, so that a damaged header could lead astray, is checked here. The
format: the GGUF specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.gguf_reader import GGUFReader, ReaderField

from abliterate.common.errors import ModelError
from abliterate.models.gguf.types import byte_shape, bytes_of, layout_of

# What llama.cpp takes: GGML_MAX_DIMS, GGML_MAX_NAME less the closing zero, and its limit on alignment.
MOST_DIMENSIONS = 4
LONGEST_NAME = 63
LARGEST_ALIGNMENT = 2**20
_BLOCK = re.compile(r"blk\.(\d+)\.")
MOST_STRINGS = 2**24  # in an array; the largest vocabularies and lists of merges have some hundred thousand


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
        infos: offset of the tensors' descriptions.
        data: offset of the first tensor's data.
        size: bytes of the file.
    """

    path: Path
    alignment: int
    metadata: dict[str, Any]
    places: dict[str, int]
    tensors: dict[str, GgufTensor]
    infos: int
    data: int
    size: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def ahead(self) -> int:
        """How many of its blocks, the last, predict further tokens (MTP); llama.cpp counts them among the blocks."""
        return self.number("nextn_predict_layers") or 0

    def number(self, key: str) -> int | None:
        """A whole number out of the architecture's own metadata ("block_count"), if it is there."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def raw(self, tensor: GgufTensor) -> np.ndarray:
        """A tensor's bytes [..., bytes of a row], mapped, not read."""
        return np.memmap(self.path, np.uint8, "r", tensor.start, byte_shape(tensor.shape, tensor.kind))


class _Damaged(ValueError):
    pass


class _Header(GGUFReader):
    """The gguf package's reader, that never reads beyond the end and makes nothing of arrays and tensors' data.

    Of a vocabulary of 150,000 tokens with its merges the package makes a million arrays, for half a minute.
    """

    places: dict[str, int]
    found: dict[str, GgufTensor]
    infos: int

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self._take(offset, int(count) * np.dtype(dtype).itemsize)
        return super()._get(offset, dtype, count, override_order)

    def _take(self, offset: int, size: int) -> int:
        """The offset behind `size` bytes."""
        if size > len(self.data) - offset:
            raise _Damaged("it ends in the middle of its header")
        return offset + size

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
        at = orig_offs + 12
        if kind == GGUFValueType.STRING:
            if count > MOST_STRINGS:
                raise _Damaged(f"its metadata has an array of {count:,} strings")
            data: Any = memoryview(self.data)  # type: ignore[arg-type]
            for _ in range(count):
                start = self._take(at, 8)
                at = self._take(start, int.from_bytes(data[at:start], "little"))
        elif kind in self.gguf_scalar_to_np:
            at = self._take(at, count * np.dtype(self.gguf_scalar_to_np[GGUFValueType(kind)]).itemsize)
        else:  # arrays of arrays are in the format, and llama.cpp doesn't take them
            raise _Damaged(f"its metadata has an array of the unknown type {kind}")
        return at - orig_offs, [], [], [GGUFValueType.ARRAY]

    def _build_tensor_info(self, offs: int, count: int) -> Any:
        self.infos = int(offs)
        return super()._build_tensor_info(offs, count)

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        if self.alignment > LARGEST_ALIGNMENT:
            raise _Damaged(f"its alignment is {self.alignment}")
        self.found = {}
        for field in fields:
            tensor = _described(field, int(start_offs), int(self.alignment))
            if tensor.name in self.found:
                raise _Damaged(f"it has tensor {tensor.name} twice")
            self.found[tensor.name] = tensor

    def pairs(self) -> tuple[dict[str, Any], dict[str, int]]:
        """The metadata, None for arrays, and where its numbers lie."""
        given = {key: field for key, field in self.fields.items() if not key.startswith("GGUF.")}
        scalars = {key: field for key, field in given.items() if field.types[0] != GGUFValueType.ARRAY}
        values = {key: scalars[key].contents() if key in scalars else None for key in given}
        places = {key: field.offset + sum(p.nbytes for p in field.parts[:-1]) for key, field in scalars.items()}
        return values, places


def _described(field: ReaderField, first: int, alignment: int) -> GgufTensor:
    """A tensor by its description; `first` is where the data of all begins."""
    name = field.name
    dimensions, number, offset = field.parts[3].tolist(), int(field.parts[4][0]), int(field.parts[5][0])
    if not 0 < len(name.encode()) <= LONGEST_NAME:
        raise _Damaged(f"a tensor's name has {len(name.encode())} bytes")
    if not 0 < len(dimensions) <= MOST_DIMENSIONS:
        raise _Damaged(f"tensor {name} has {len(dimensions)} dimensions")
    try:
        kind = GGMLQuantizationType(number).name
    except ValueError:
        raise _Damaged(f"tensor {name} is of the unknown type {number} (a newer `gguf` package may know it)") from None
    shape = tuple(reversed(dimensions))
    if min(shape) < 1 or shape[-1] % layout_of(kind).block:
        raise _Damaged(f"tensor {name} of type {kind} has shape {list(shape)}")
    if offset % alignment:
        raise _Damaged(f"tensor {name} is not aligned")
    return GgufTensor(name, shape, kind, first + offset, bytes_of(shape, kind))


def open_gguf(path: str | os.PathLike[str], *, part: bool = False) -> GgufFile:
    """Read a GGUF file's header and check that all it promises is there.

    Args:
        path: the file.
        part: let it be a part of a split one.

    Raises:
        ModelError: when there is no such file, it isn't a whole GGUF of version 2 or 3 (little-endian), or it is a
            part of a split one; the text says what is wrong.
    """
    path = Path(path).expanduser()
    if (path / "config.json").is_file():
        raise ModelError(
            f"{path} is a model folder, not a GGUF; change it with --as checkpoint, and `abliterate export` makes a "
            "GGUF of what that writes"
        )
    if not path.is_file():
        raise ModelError(f"GGUF {path} not found; name a .gguf file")
    try:
        opened = _read(path)
    except OSError as error:
        raise ModelError(f"GGUF {path} can't be read: {error.strerror or error}") from error
    except (ValueError, LookupError, OverflowError) as error:
        what = error.args[0] if isinstance(error, KeyError) else error  # whose text would be quoted
        raise ModelError(f"GGUF {path} can't be read: {what}; get the file again") from None
    parts = opened.metadata.get("split.count", 0)
    if not part and isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"GGUF {path} is one of {parts} parts; join them first: llama-gguf-split --merge FIRST-PART WHOLE.gguf"
        )
    if not part:
        _check_blocks(opened)
    return opened


def _check_blocks(file: GgufFile) -> None:
    """Raise ModelError when a model's file holds more or fewer blocks than it says."""
    numbers = {int(found[1]) for name in file.tensors if (found := _BLOCK.match(name))}
    says = file.number("block_count")
    if not numbers or says is None or file.metadata.get("general.type", "model") != "model":
        return
    holds = max(numbers) + 1
    missing = next((block for block in range(says - file.ahead) if block not in numbers), None)
    if holds > says or missing is not None:
        lacks = f", but not block {missing}" if missing is not None and holds >= says - file.ahead else ""
        raise ModelError(
            f"GGUF {file.path} says it has {says:,} blocks ({file.architecture}.block_count), and holds "
            f"{holds}{lacks}; get the file again"
        )


def _read(path: Path) -> GgufFile:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise _Damaged("it doesn't begin as a GGUF does")
    header = _Header(path)
    if header.byte_order == "S":
        raise _Damaged("it is big-endian")
    size = len(header.data)
    in_order = sorted(header.found.values(), key=lambda t: t.start)
    for tensor, following in pairwise(in_order):
        if tensor.start + tensor.size > following.start:
            raise _Damaged(f"tensor {following.name} overlaps another")
    last = in_order[-1] if in_order else None
    if last and last.start + last.size > size:
        raise _Damaged(
            f"it is cut short: tensor {last.name} ends at byte {last.start + last.size:,}, the file at {size:,}"
        )
    metadata, places = header.pairs()
    return GgufFile(
        path, int(header.alignment), metadata, places, header.found, header.infos, int(header.data_offset), size
    )
