"""Shards written piece by piece: bytes copied in the kernel; tensors read, changed and written, two pieces at a time.

Copying holds no lock of Python's, so that one piece is copied while another is computed. Neither holds more of a tensor
than a block that stays in its core's cache (`blocks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from abliterate.apply.checkpoint.blocks import FLOATS, Read, Rows, take_out
from abliterate.common.ranges import copy_range, read_into, spans, write_from
from abliterate.common.reporting import Reporter
from abliterate.edit.algebra import Factors
from abliterate.models.shards import NewTensor, Shard, StoredRange

Array = np.ndarray[Any, Any]

WORKERS = 2
COPIED = 64 * 2**20  # bytes copied at a time
EDITED = 16 * 2**20  # bytes of vectors along d_model, or of small matrices, edited at a time
MIB = 2**20


@dataclass(frozen=True)
class Change:
    """What is done to one stored tensor.

    Attributes:
        axis: its dimension that runs along d_model.
        factors: what is taken out of it.
        keep_norms: whether its vectors along d_model keep their norms.
        addition: what is then added, rows along its last dimension (a shift in a bias, a LoRA), or None.
    """

    axis: int
    factors: Factors
    keep_norms: bool = False
    addition: Rows | None = None


@dataclass(frozen=True)
class Piece:
    """Bytes that one thread reads, changes or not, and writes.

    Attributes:
        start, at: offsets in source and target.
        nbytes: how many.
        tensor: what is in them where they are changed: whole vectors along d_model of this tensor.
        made: what gives them where they aren't the source's (a packed weight's).
    """

    source: Path
    target: Path
    start: int
    at: int
    nbytes: int
    tensor: StoredRange | None = None
    change: Change | None = None
    made: Callable[[], bytearray] | None = None


class Output:
    """A shard as it will be written.

    Attributes:
        shard: the shard it is made from.
        changes: tensor name -> what is done to it.
        made: tensor name -> what gives its new bytes, as many as its old ones.
        added: the tensors it is given besides, after its own; places: where each goes.
        head: its first bytes where they differ from the shard's, else None.
        size: its bytes.
    """

    def __init__(
        self, shard: Shard, changes: dict[str, Change], added: Sequence[NewTensor] = (),
        made: Mapping[str, Callable[[], bytearray]] | None = None,
    ) -> None:  # fmt: skip
        self.shard, self.changes, self.added, self.made = shard, changes, added, made or {}
        self.head: bytes | None = None
        self.places: list[StoredRange] = []
        if added:
            self.head, self.places = shard.with_tensors(added)
        head = shard.data_start if self.head is None else len(self.head)
        self.moved = head - shard.data_start
        self.size = shard.size + self.moved + sum(place.nbytes for place in self.places)

    @property
    def touched(self) -> bool:
        return bool(self.changes or self.added or self.made)

    def begin(self, target: Path) -> Iterator[Piece]:
        """Make the target file, with the bytes that are no other file's, at its full size; gives the work left."""
        with target.open("wb") as file:
            file.write(self.head or b"")
            file.truncate(self.size)
            for place, tensor in zip(self.places, self.added, strict=True):
                if isinstance(tensor.content, bytes):
                    file.seek(place.start)
                    file.write(tensor.content)
        return self._pieces(target)

    def _pieces(self, target: Path) -> Iterator[Piece]:
        def copied(start: int, end: int, at: int) -> Iterator[Piece]:
            for low, high in spans(start, end, COPIED):
                yield Piece(self.shard.path, target, low, low - start + at, high - low)

        done = 0 if self.head is None else self.shard.data_start
        for tensor in sorted((self.shard.tensors[name] for name in {*self.changes, *self.made}), key=lambda t: t.start):
            yield from copied(done, tensor.start, done + self.moved)
            change = self.changes.get(tensor.name)
            whole = Piece(self.shard.path, target, tensor.start, tensor.start + self.moved, tensor.nbytes)
            if change is None:
                yield replace(whole, made=self.made[tensor.name])
            else:
                for low, high in spans(tensor.start, tensor.end, _edited_at_a_time(tensor, change)):
                    yield replace(
                        whole, start=low, at=low + self.moved, nbytes=high - low, tensor=tensor, change=change
                    )
            done = tensor.end
        yield from copied(done, self.shard.size, done + self.moved)
        for place, new in zip(self.places, self.added, strict=True):
            if isinstance(new.content, StoredRange):
                yield from copied(new.content.start, new.content.end, place.start)


def _edited_at_a_time(tensor: StoredRange, change: Change) -> int:
    """How many bytes of a tensor: whole vectors along d_model, or whole matrices; of what is added to, all."""
    unit = tensor.nbytes // max(1, math.prod(tensor.shape[: change.axis]))
    return max(1, tensor.nbytes if change.addition is not None else max(1, EDITED // max(1, unit)) * unit)


def run_pieces(pieces: Sequence[Piece], reporter: Reporter, meanwhile: Callable[[], None] | None = None) -> None:
    """Do the work, two pieces at a time; the first error stops it, after the pieces at hand.

    Args:
        pieces: in any order.
        reporter: told how many MiB are done.
        meanwhile: run in this thread at the same time; its error stops the work.

    Raises:
        NonFiniteError: when a value is, or becomes, NaN or infinite.
        OSError: when the disk is full.
    """
    tick = reporter.progress("writing (MiB)", -(-sum(p.nbytes for p in pieces) // MIB))
    done = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            futures = [pool.submit(_run, piece) for piece in pieces]
            if meanwhile is not None:
                meanwhile()
            for future in as_completed(futures):
                before, done = done, done + future.result()
                tick(done // MIB - before // MIB)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run(piece: Piece) -> int:
    """Do a piece; returns how many bytes it is."""
    with piece.source.open("rb", buffering=0) as given, piece.target.open("r+b", buffering=0) as new:
        source, target = given.fileno(), new.fileno()
        if piece.made is not None:
            write_from(target, piece.at, memoryview(piece.made()))
        elif piece.change is None:
            copy_range(source, piece.start, target, piece.at, piece.nbytes)
        else:
            _edit(source, target, piece)
    return piece.nbytes


def _edit(source: int, target: int, piece: Piece) -> None:
    """Change a tensor on its way from file to file."""
    tensor, change = piece.tensor, piece.change
    assert tensor is not None and change is not None
    dtype = FLOATS[tensor.dtype]
    d_model, inner = tensor.shape[change.axis], math.prod(tensor.shape[change.axis + 1 :])
    width = d_model if inner == 1 else inner
    row_bytes, at = width * dtype.itemsize, piece.at

    def write(rows: Array) -> None:
        nonlocal at
        write_from(target, at, _bytes(rows))
        at += rows.nbytes

    shape = (piece.nbytes // (dtype.itemsize * d_model * inner), d_model, inner)
    take_out(reader(source, piece.start, row_bytes), write, dtype, shape, change.factors,
             keep_norms=change.keep_norms, addition=change.addition, name=tensor.name)  # fmt: skip


def reader(file: int, start: int, row_bytes: int) -> Read:
    """What fills an array with rows of a tensor that begins at `start`, from one on."""

    def read(low: int, into: Array) -> None:
        read_into(file, start + low * row_bytes, _bytes(into))

    return read


def _bytes(rows: Array) -> memoryview:
    return memoryview(rows.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
