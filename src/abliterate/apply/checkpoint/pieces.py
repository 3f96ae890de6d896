"""Shards written piece by piece: bytes copied in the kernel, tensors read, changed and written, in two threads.

One thread copies, which holds no lock of Python's, while the other computes; when one has no more of its own it helps
the other. Neither holds more of a tensor than a block that stays in its core's cache (`blocks`).
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from abliterate.apply.checkpoint.blocks import RAW, HeldRows, Rows, add, take_out
from abliterate.apply.checkpoint.shards import Shard, StoredRange, copy_range, read_into, steps, write_from
from abliterate.common.reporting import Reporter, Tick
from abliterate.edit.algebra import ArrayFactors

WORKERS = 2
PIECE = 16 * 2**20  # bytes of vectors along d_model, or of small matrices, edited at a time
MIB = 2**20


@dataclass(frozen=True)
class Change:
    """What is done to one stored tensor.

    Attributes:
        axis: its dimension that runs along d_model.
        factors: what is taken out of it, or None.
        keep_norms: whether its vectors along d_model keep their norms.
        addition: what is then added, float32 and of its shape (a shift in a bias), or None.
    """

    axis: int
    factors: ArrayFactors | None
    keep_norms: bool = False
    addition: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True)
class Piece:
    """Bytes that one thread reads, changes or not, and writes.

    Attributes:
        start, at: offsets in source and target.
        nbytes: how many.
        tensor: what is in them where they are changed: whole vectors along d_model of this tensor.
    """

    source: Path
    target: Path
    start: int
    at: int
    nbytes: int
    tensor: StoredRange | None = None
    change: Change | None = None


@dataclass(frozen=True)
class Output:
    """A shard as it will be written.

    Attributes:
        shard: the shard it is made from.
        changes: tensor name -> what is done to it.
        head: its first bytes where they differ from the shard's, else None.
        added: (where a tensor goes, the tensor that it is a copy of or its bytes), after the shard's own.
    """

    shard: Shard
    changes: dict[str, Change]
    head: bytes | None = None
    added: tuple[tuple[StoredRange, StoredRange | bytes], ...] = ()

    @property
    def size(self) -> int:
        head = len(self.head) if self.head is not None else self.shard.data_start
        return head + self.shard.size - self.shard.data_start + sum(place.nbytes for place, _ in self.added)

    @property
    def touched(self) -> bool:
        return bool(self.changes or self.added)

    def pieces(self, target: Path) -> Iterator[Piece]:
        """The work of writing it to `target`, head included unless it is a new one."""
        source = self.shard.path
        moved = 0 if self.head is None else len(self.head) - self.shard.data_start
        at = 0 if self.head is None else self.shard.data_start
        edited = sorted((self.shard.tensors[name] for name in self.changes), key=lambda t: t.start)
        for tensor in edited:
            for low, high in steps(at, tensor.start):
                yield Piece(source, target, low, low + moved, high - low)
            change = self.changes[tensor.name]
            for low, high in steps(tensor.start, tensor.end, _piece_bytes(tensor, change)):
                yield Piece(source, target, low, low + moved, high - low, tensor, change)
            at = tensor.end
        for low, high in steps(at, self.shard.size):
            yield Piece(source, target, low, low + moved, high - low)
        for place, like in self.added:
            if isinstance(like, bytes):
                continue  # small, and written by `begin`
            for low, high in steps(like.start, like.end):
                yield Piece(source, target, low, low - like.start + place.start, high - low)


def _piece_bytes(tensor: StoredRange, change: Change) -> int:
    """How much of a tensor is edited at a time: whole vectors along d_model."""
    if change.addition is not None:
        return max(1, tensor.nbytes)
    outer = math.prod(tensor.shape[: change.axis])
    unit = tensor.nbytes // max(1, outer)  # one vector, or one matrix
    return max(unit, PIECE // max(1, unit) * unit, 1)


def begin(outputs: dict[str, Output], targets: dict[str, Path]) -> list[Piece]:
    """Make the target files, with the heads and tensors that are new, at their full sizes; returns the work left."""
    pieces: list[Piece] = []
    for name, output in outputs.items():
        with targets[name].open("wb") as file:
            file.write(output.head or b"")
            file.truncate(output.size)
            for place, values in output.added:
                if isinstance(values, bytes):
                    file.seek(place.start)
                    file.write(values)
        pieces += output.pieces(targets[name])
    return pieces


def begin_copy(source: Path, target: Path) -> list[Piece]:
    target.parent.mkdir(parents=True, exist_ok=True)
    size = source.stat().st_size
    with target.open("wb") as file:
        file.truncate(size)
    return [Piece(source, target, low, low, high - low) for low, high in steps(0, size)]


class _Queue:
    """Pieces that threads take, copies or edits first as each likes. Edits are held back until released."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.copies = deque(p for p in pieces if p.change is None)
        # From the other end of the list, since threads that write to one file wait for each other; large ones first,
        # so that the threads end together.
        edits = reversed([p for p in pieces if p.change is not None])
        self.edits = deque(sorted(edits, key=lambda p: p.nbytes, reverse=True))
        self.held, self.stopped = True, False
        self.changed = threading.Condition()

    def take(self, copies_first: bool) -> Piece | None:
        """The next piece; None when there are no more."""
        with self.changed:
            while not self.stopped:
                edits = deque() if self.held else self.edits
                first, second = (self.copies, edits) if copies_first else (edits, self.copies)
                if first or second:
                    return (first or second).popleft()
                if not self.held:
                    break
                self.changed.wait()
            return None

    def release(self) -> None:
        """Let the edits begin."""
        with self.changed:
            self.held = False
            self.changed.notify_all()

    def stop(self) -> None:
        """Give out no more."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


def run_pieces(pieces: Sequence[Piece], reporter: Reporter, meanwhile: Callable[[], None] | None = None) -> None:
    """Do the work in two threads; the first error stops it, after the pieces at hand.

    Args:
        pieces: in any order.
        reporter: told how many MiB are done.
        meanwhile: run in this thread while bytes are copied, before the first tensor is edited; its error stops
            the work. (Python code and numpy's short calls hold each other up, copying holds up nobody.)

    Raises:
        NonFiniteError: when a value is, or becomes, NaN or infinite.
        OSError: when the disk is full.
    """
    tick = _mib_ticks(reporter.progress("writing (MiB)", -(-sum(p.nbytes for p in pieces) // MIB)))
    queue, done = _Queue(pieces), SimpleQueue[int | BaseException | None]()
    threads = [threading.Thread(target=_work, args=(queue, done, n == 0)) for n in range(WORKERS)]
    try:
        for thread in threads:
            thread.start()
        if meanwhile is not None:
            meanwhile()
        queue.release()
        working = WORKERS
        while working:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            working -= result is None
            tick(result or 0)
    finally:
        queue.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _work(queue: _Queue, done: SimpleQueue[int | BaseException | None], copies_first: bool) -> None:
    """Do pieces until there are none; tell the bytes of each, None at the end, or the error that ended it."""
    try:
        while (piece := queue.take(copies_first)) is not None:
            _run(piece)
            done.put(piece.nbytes)
        done.put(None)
    except BaseException as error:
        done.put(error)


def _mib_ticks(tick: Tick) -> Tick:
    """A tick in bytes out of one in MiB."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        before, done = done // MIB, done + nbytes
        tick(done // MIB - before)

    return count


def _run(piece: Piece) -> None:
    source = os.open(piece.source, os.O_RDONLY)
    try:
        target = os.open(piece.target, os.O_WRONLY)
        try:
            if piece.change is None:
                copy_range(source, target, piece.start, piece.at, piece.nbytes)
            else:
                _edit(source, target, piece)
        finally:
            os.close(target)
    finally:
        os.close(source)


class _FileRows:
    """Rows of equal size in a file, read from one and written to another (`blocks.Rows`)."""

    def __init__(self, source: int, target: int, piece: Piece, row: int) -> None:
        self.source, self.target, self.start, self.at, self.row = source, target, piece.start, piece.at, row

    def load(self, low: int, high: int, into: np.ndarray[Any, Any]) -> None:
        read_into(self.source, _bytes(into), self.start + low * self.row)

    def store(self, low: int, high: int, values: np.ndarray[Any, Any]) -> None:
        write_from(self.target, _bytes(values), self.at + low * self.row)


def _bytes(values: np.ndarray[Any, Any]) -> memoryview:
    return memoryview(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _edit(source: int, target: int, piece: Piece) -> None:
    """Read a piece, change it, and write it."""
    tensor, change = piece.tensor, piece.change
    assert tensor is not None and change is not None
    kind = np.dtype(RAW[tensor.dtype])
    d_model, inner = tensor.shape[change.axis], math.prod(tensor.shape[change.axis + 1 :])
    width = d_model if inner == 1 else inner
    rows: Rows = _FileRows(source, target, piece, width * kind.itemsize)
    if change.addition is not None:  # a bias, small: held, since it is changed twice
        rows = HeldRows(np.empty((tensor.nbytes // (width * kind.itemsize), width), kind))
        read_into(source, _bytes(rows.values), piece.start)
    if change.factors is not None:
        shape = (piece.nbytes // (kind.itemsize * d_model * inner), d_model, inner)
        take_out(rows, tensor.dtype, shape, change.factors, keep_norms=change.keep_norms, name=tensor.name)
    if change.addition is not None:
        assert isinstance(rows, HeldRows)
        add(rows, tensor.dtype, change.addition.reshape(rows.values.shape), name=tensor.name)
        write_from(target, _bytes(rows.values), piece.at)
