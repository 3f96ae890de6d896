"""Writing GGUF files: a copy of one with some tensors changed, or a small new one; whole or not there."""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType

from abliterate.common.errors import AbliterateError, ModelError, OutputError
from abliterate.common.files import check_file, whole_file
from abliterate.common.ranges import copy_range
from abliterate.models.gguf.file import GgufFile, GgufTensor, open_gguf
from abliterate.models.gguf.types import byte_shape, bytes_of

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions

# Fills in a tensor's data: called with its bytes in the output, uint8 [..., bytes of a row], mapped.
Writer = Callable[[np.ndarray], None]


class NewTensor(NamedTuple):
    """A tensor of a file to be written: its shape (slowest first), type, and what writes its data there."""

    shape: tuple[int, ...]
    kind: str
    write: Writer


def refuse(options: ApplyOptions, form: str, **reasons: str) -> None:
    """Raise AbliterateError for options the form can't honour.

    Args:
        options: what was asked for.
        form: the form's name.
        reasons: option -> what to do instead.
    """
    for name, instead in reasons.items():
        if getattr(options, name):
            raise AbliterateError(f"--{name.replace('_', '-')} can't be done with --as {form}: {instead}")


def check_output(out: Path, model: Path | None = None, *, overwrite: bool) -> None:
    """Raise OutputError when the output is the model itself, exists, or can't be written."""
    if model and out.exists() and os.path.samefile(out, model):
        raise OutputError(f"output {out} is the model itself; name another file with --out")
    check_file(out, overwrite=overwrite)


@contextlib.contextmanager
def whole_gguf(out: Path) -> Iterator[Path]:
    """Give a temporary name for a GGUF, which becomes `out` when it can be read as a reader would.

    Raises:
        OutputError: when it can't be, or as `whole_file`.
    """
    with whole_file(out) as temporary:
        yield temporary
        try:
            open_gguf(temporary)
        except ModelError as error:  # the disk, or a mistake of this program
            raise OutputError(f"what was written can't be read again ({error}); nothing is left of it") from error


def write_small(path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write a GGUF of few tensors, all in memory: float32 and int32 values, and texts, as metadata."""
    writer = GGUFWriter(path, architecture)
    add: dict[type, Callable[[str, Any], None]] = {
        str: writer.add_string, int: writer.add_int32, float: writer.add_float32,
    }  # fmt: skip
    for key, value in metadata.items():
        add[type(value)](key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Plan(NamedTuple):
    """What a copy will be: all before the first tensor's data, where each tensor's begins, and the file's size."""

    header: bytes
    starts: dict[str, int]
    size: int


def planned(source: GgufFile, new: Mapping[str, NewTensor], values: Mapping[str, int] | None = None) -> Plan:
    """What `write_copy` writes of these arguments."""
    # in the source's order, what is added after the last
    tensors: dict[str, GgufTensor | NewTensor] = {**source.tensors, **new}
    stay = all(tensors[name].kind == tensor.kind for name, tensor in source.tensors.items())
    with open(source.path, "rb") as file:
        header = bytearray(file.read(source.infos))
    header[8:16] = struct.pack("<Q", len(tensors))
    for key, value in (values or {}).items():
        if key in source.places:
            struct.pack_into("<I", header, source.places[key], value)
    offsets: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        offsets[name] = source.tensors[name].start - source.data if stay and name in source.tensors else end
        end = max(end, padded(offsets[name] + bytes_of(tensor.shape, tensor.kind), source.alignment))
        encoded = name.encode()
        header += struct.pack("<Q", len(encoded)) + encoded
        header += struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        header += struct.pack("<IQ", GGMLQuantizationType[tensor.kind], offsets[name])
    header += bytes(padded(len(header), source.alignment) - len(header))
    size = source.size if stay and len(tensors) == len(source.tensors) else len(header) + end
    return Plan(bytes(header), {name: len(header) + offset for name, offset in offsets.items()}, size)


def write_copy(
    source: GgufFile,
    target: str | os.PathLike[str],
    new: Mapping[str, NewTensor],
    values: Mapping[str, int] | None = None,
) -> int:
    """Write a copy of a GGUF in which some tensors have new data, or are in another type, and some are added.

    Where no tensor changes its type and none is added, the two files differ only inside the new tensors; else the
    header differs in the tensors' descriptions, and the data lies elsewhere, in the same order.

    Args:
        source: from `open_gguf`.
        target: the file to make.
        new: tensor name -> what is written in its place, of the same shape; a name that isn't in the source is added
            after the last.
        values: metadata key -> new value, a whole number that is there already.

    Returns:
        Bytes written.
    """
    header, starts, size = planned(source, new, values)
    with open(source.path, "rb") as given, open(target, "wb") as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # not on macOS; where it is, a full disk shows itself here
            os.posix_fallocate(file.fileno(), 0, size)
        out = np.memmap(target, np.uint8, "r+", shape=(size,))
        out[: len(header)] = np.frombuffer(header, np.uint8)
        for name, start in starts.items():
            if name in new:
                shape = byte_shape(new[name].shape, new[name].kind)
                new[name].write(out[start : start + math.prod(shape)].reshape(shape))
            else:
                tensor = source.tensors[name]
                copy_range(given.fileno(), tensor.start, file.fileno(), start, tensor.size)
    return size


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
