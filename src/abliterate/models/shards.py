"""Safetensors checkpoints on disk: strict headers, the index, and where each tensor's bytes are. No arithmetic here.

A checkpoint is a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`. Everything
is checked before the first byte is written: a header that lies about its file would otherwise be found out
half-way through.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from abliterate.common.errors import ModelError, shorten
from abliterate.common.ranges import read_into, spans

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_HEADER = 100_000_000  # bytes, as the safetensors library has it
# Bits per element of every dtype the format has.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
# Those that weights are computed in, as numpy has them; torch has the same names.
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class StoredRange:
    """A tensor in a shard.

    Attributes:
        name, dtype, shape: as in the header.
        start, end: its bytes in the file, counted from the file's beginning.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class NewTensor:
    """A tensor that a shard is given.

    Attributes:
        name, dtype, shape: for the header.
        content: its bytes, or the tensor of the same shard that it is a copy of.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: bytes | StoredRange

    @property
    def nbytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes


@dataclass(frozen=True)
class Shard:
    """A safetensors file whose header has been read and checked.

    Attributes:
        path: the file.
        data_start: where the tensors' bytes begin.
        size: bytes of the file.
        header: the header's JSON, entries in the file's order, `__metadata__` among them.
        tensors: name -> where it lies.
    """

    path: Path
    data_start: int
    size: int
    header: dict[str, Any]
    tensors: dict[str, StoredRange]

    def raw(self, name: str) -> bytearray:
        """A tensor's bytes."""
        place = self.tensors[name]
        data = bytearray(place.nbytes)
        with self.path.open("rb") as file:
            read_into(file.fileno(), place.start, memoryview(data))
        return data

    def with_tensors(self, added: Sequence[NewTensor]) -> tuple[bytes, list[StoredRange]]:
        """The first bytes (length and header) of a file that holds these tensors too, after its own; and where each
        goes in that file."""
        header, end = dict(self.header), self.size - self.data_start
        for tensor in added:
            offsets = [end, end + tensor.nbytes]
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
            end += tensor.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return head, [_range(self.path, tensor.name, header[tensor.name], len(head)) for tensor in added]


@dataclass(frozen=True)
class Checkpoint:
    """A folder's safetensors, all headers checked.

    Attributes:
        folder: the folder.
        shards: file name -> shard, in the order of the files' names.
        index: the index's JSON, or None for a single file.
        files: tensor name -> name of the file that loading takes it from; what the index names and no file holds is
            left out, and `absent`.
    """

    folder: Path
    shards: dict[str, Shard]
    index: dict[str, Any] | None
    files: dict[str, str]

    def tensor(self, name: str) -> StoredRange:
        """Where a tensor lies in its file.

        Raises:
            ModelError: when there is none of that name.
        """
        if name not in self.files:
            raise ModelError(f"model folder {self.folder} has no tensor {name}")
        return self.shards[self.files[name]].tensors[name]

    @property
    def ranges(self) -> dict[str, StoredRange]:
        """Where every tensor lies in its file."""
        return {name: self.tensor(name) for name in self.files}

    @property
    def absent(self) -> list[str]:
        """Tensors that the index names and no file holds."""
        return [name for name in (self.index or {}).get("weight_map", {}) if name not in self.files]

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.tensor(name).nbytes for name in self.files)

    def alike(self, one: str, other: str) -> bool:
        """Whether two tensors have the same dtype, shape and bytes; read some at a time."""
        places, room = [self.tensor(name) for name in (one, other)], [bytearray(2**20) for _ in range(2)]
        if (places[0].dtype, places[0].shape) != (places[1].dtype, places[1].shape):
            return False
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(self.shards[self.files[name]].path.open("rb")) for name in (one, other)]
            for low, high in spans(0, places[0].nbytes, 2**20):
                parts = [memoryview(buffer)[: high - low] for buffer in room]
                for file, place, part in zip(files, places, parts, strict=True):
                    read_into(file.fileno(), place.start + low, part)
                if parts[0] != parts[1]:
                    return False
        return True

    def raw(self, name: str) -> bytearray:
        """A tensor's bytes."""
        place = self.tensor(name)
        return self.shards[self.files[name]].raw(place.name)


def read_shard(path: Path) -> Shard:
    """Read and check a safetensors header; the tensors' bytes are not read.

    Raises:
        ModelError: naming the file and what is wrong with it: cut short, not a header, a tensor whose bytes
            don't fit its shape, overlap another's, or leave a hole.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MOST_HEADER):
                raise _damaged(path, f"it is {size:,} bytes and its header claims {length:,}")
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error
    if len(text) < length:
        raise _damaged(path, "its header is cut short")
    try:
        header = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {shorten(str(error))}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not an object")
    start = 8 + length
    tensors = {name: _range(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"}
    _check_tiling(path, list(tensors.values()), start, size)
    return Shard(path, start, size, header, tensors)


def _range(path: Path, name: str, entry: Any, data_start: int) -> StoredRange:
    if not isinstance(entry, dict):
        raise _damaged(path, f"the entry of {name} is not an object")
    dtype = entry.get("dtype")
    shape, offsets = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(path, f"{name} has the unknown dtype {shorten(str(dtype), 20)}")
    if shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{name} has no proper shape or data_offsets")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if (offsets[1] - offsets[0]) * 8 != bits:
        raise _damaged(path, f"{name} is {dtype} {shape} in {offsets[1] - offsets[0]:,} bytes")
    return StoredRange(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _counts(value: Any) -> list[int] | None:
    """The value when it is a list of sizes, else None."""
    return value if isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value) else None


def _check_tiling(path: Path, tensors: list[StoredRange], start: int, size: int) -> None:
    """Tensors must fill the file from the header to its end, without overlap or hole."""
    at, last = start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.start, t.end)):
        if tensor.start < at:
            raise _damaged(path, f"{tensor.name} overlaps {last}")
        if tensor.start > at:
            raise _damaged(path, f"there are {tensor.start - at:,} stray bytes before {tensor.name}")
        at, last = tensor.end, tensor.name
    if at > size:
        raise _damaged(path, f"it is cut short: {size:,} bytes, and its header says {at:,}")
    if at < size:
        raise _damaged(path, f"there are {size - at:,} stray bytes at its end")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shorten(next(n for n in names if names.count(n) > 1))} is there twice")
    return found


def _damaged(path: Path, problem: str) -> ModelError:
    return ModelError(f"{path} is damaged: {problem}; nothing was written, get the file again")


def read_index(folder: Path) -> dict[str, Any] | None:
    """The folder's index, checked; None when it has none, or one of other files than the `model.safetensors` that is
    there too: transformers loads that.

    Raises:
        ModelError: when it isn't JSON of the right form, or names files outside the folder.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
        weight_map = index["weight_map"]
        proper = isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, shorten(str(error) or type(error).__name__)) from error
    if not proper or not weight_map:
        raise _damaged(path, "its weight_map doesn't say which file holds which tensor")
    stray = [file for file in weight_map.values() if Path(file).name != file or file in ("", ".", "..")]
    if stray:
        raise _damaged(path, f"it names {shorten(stray[0])}, which is not a file of this folder")
    if (folder / SINGLE).is_file() and SINGLE not in weight_map.values():
        return None
    return dict(index)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check the index and every header.

    Raises:
        ModelError: when the folder holds no safetensors, a file is damaged, or the index names one
            that isn't there.
    """
    index = read_index(folder)
    there = sorted(p.name for p in folder.glob("*.safetensors"))
    if index is not None:
        names = sorted(set(index["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(
                f"model folder {folder}: {INDEX} names {missing[0]}{more}, which isn't there; get it again"
            )
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    elif len(there) == 1:
        names = there
    else:
        raise ModelError(f"model folder {folder}: {_no_weights(folder, there)}")
    shards = {name: read_shard(folder / name) for name in names}
    files = dict(index["weight_map"]) if index else dict.fromkeys(shards[names[0]].tensors, names[0])
    files = {tensor: file for tensor, file in files.items() if tensor in shards[file].tensors}
    return Checkpoint(folder, shards, index, files)


def _no_weights(folder: Path, there: list[str]) -> str:
    if there:
        return f"it holds {len(there)} *.safetensors and no {INDEX} that says which is which; get the index again"
    if any(folder.glob("*.gguf")):
        return "it holds GGUF and no safetensors; give the GGUF file itself, with --as gguf"
    if any(p.suffix in (".bin", ".pt", ".pth") for p in folder.iterdir()):
        return "its weights are pickles, which can run code when they are read; convert them to safetensors first"
    return "there are no weights (*.safetensors) in it; get the model's files again"


def index_with(index: Mapping[str, Any], added: Mapping[str, Sequence[NewTensor]], total: int) -> dict[str, Any]:
    """An index that also names these tensors, and has the `metadata` without which transformers doesn't read it.

    Args:
        index: the index's JSON.
        added: file -> the tensors that it is given.
        total: bytes of all tensors before.
    """
    weight_map = {**index["weight_map"], **{tensor.name: file for file in added for tensor in added[file]}}
    metadata, tensors = (
        dict(index.get("metadata") or {"total_size": total}),
        [t for held in added.values() for t in held],
    )
    totals = {
        "total_size": sum(tensor.nbytes for tensor in tensors),
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
    }
    for key, more in totals.items():
        if isinstance(metadata.get(key), int | float):
            metadata[key] += more
    return {**index, "metadata": metadata, "weight_map": weight_map}
