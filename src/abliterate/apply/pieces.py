"""Shards written piece by piece: bytes copied in the kernel, tensors read, changed and written, in two threads.

One thread computes while the other waits for the disk. A thread holds one piece at a time: a matrix, or some vectors
of an embedding, never a shard.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abliterate.apply import Factors
from abliterate.apply.blocks import take_out
from abliterate.apply.shards import Shard, StoredRange, copy_range, read_into, steps, write_from

if TYPE_CHECKING:
    from abliterate.pipeline import Reporter

WORKERS = 2
PIECE = 16 * 2**20  # bytes of vectors along d_model edited at a time; matrices are edited whole
EDITABLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
MIB = 2**20


@dataclass(frozen=True)
class Change:
    """What is done to one stored tensor.

    Attributes:
        axis: its dimension that runs along d_model.
        factors: what is taken out of it, or None.
        keep_norms: whether its vectors along d_model keep their norms.
        addition: what is then added, broadcast to its shape (a shift in a bias), or None.
    """

    axis: int
    factors: Factors | None
    keep_norms: bool = False
    addition: Tensor | None = None


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
        added: (where a tensor goes, what it is a copy of), after the shard's own.
    """

    shard: Shard
    changes: dict[str, Change]
    head: bytes | None = None
    added: tuple[tuple[StoredRange, StoredRange], ...] = ()

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
    """Make the target files, with the heads that are new, at their full sizes; returns the work left.

    The pieces of several files are dealt out in turn: threads that write to one file wait for each other.
    """
    queues = []
    for name, output in outputs.items():
        with targets[name].open("wb") as file:
            file.write(output.head or b"")
            file.truncate(output.size)
        queues.append(list(output.pieces(targets[name])))
    lanes: list[list[Piece]] = [[] for _ in range(WORKERS)]
    for queue in queues:
        min(lanes, key=lambda lane: sum(p.nbytes for p in lane)).extend(queue)
    longest = max(map(len, lanes))
    return [lane[i] for i in range(longest) for lane in lanes if i < len(lane)]


def begin_copy(source: Path, target: Path) -> list[Piece]:
    target.parent.mkdir(parents=True, exist_ok=True)
    size = source.stat().st_size
    with target.open("wb") as file:
        file.truncate(size)
    return [Piece(source, target, low, low, high - low) for low, high in steps(0, size)]


def run_pieces(pieces: Sequence[Piece], reporter: Reporter, meanwhile: Callable[[], None] | None = None) -> None:
    """Do the work in two threads; the first error stops it, after the pieces at hand.

    Args:
        pieces: in any order.
        reporter: told how many MiB are done.
        meanwhile: run in this thread while bytes are copied, before the first tensor is edited; its error stops
            the work. (Python code and small tensor operations hold each other up, copying holds up nobody.)

    Raises:
        NonFiniteError: when a value is, or becomes, NaN or infinite.
        OSError: when the disk is full.
    """
    tick = _mib_ticks(reporter.progress("writing (MiB)", -(-sum(p.nbytes for p in pieces) // MIB)))
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            futures = {pool.submit(_run, piece): piece for piece in pieces if piece.change is None}
            if meanwhile is not None:
                meanwhile()
            futures |= {pool.submit(_run, piece): piece for piece in pieces if piece.change is not None}
            for future in as_completed(futures):
                future.result()
                tick(futures[future].nbytes)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    torch.set_num_threads(threads)  # MKL's is one for all threads


def _mib_ticks(tick: Callable[[int], None] | None) -> Callable[[int], None]:
    """A tick in bytes out of one in MiB."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        before, done = done // MIB, done + nbytes
        if tick is not None:
            tick(done // MIB - before)

    return count


_held = threading.local()


def _run(piece: Piece) -> None:
    source = os.open(piece.source, os.O_RDONLY)
    try:
        target = os.open(piece.target, os.O_WRONLY)
        try:
            if piece.change is None:
                copy_range(source, target, piece.start, piece.at, piece.nbytes)
            else:
                raw = _buffer(piece.nbytes)
                view = memoryview(raw.numpy())  # type: ignore[arg-type]
                read_into(source, view, piece.start)
                _edit(raw, piece)
                write_from(target, view, piece.at)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _buffer(nbytes: int) -> Tensor:
    """Memory of this thread, kept for its next piece."""
    if getattr(_held, "buffer", None) is None or len(_held.buffer) < nbytes:
        _held.buffer = None
        _held.buffer = torch.empty(nbytes, dtype=torch.uint8)
    buffer: Tensor = _held.buffer
    return buffer[:nbytes]


@torch.no_grad()
def _edit(raw: Tensor, piece: Piece) -> None:
    """Change the bytes of a piece in place."""
    tensor, change = piece.tensor, piece.change
    assert tensor is not None and change is not None
    values = raw.view(EDITABLE[tensor.dtype])
    d_model, inner = tensor.shape[change.axis], math.prod(tensor.shape[change.axis + 1 :])
    if change.factors is not None:
        take_out(values.view(-1, d_model, inner), change.factors, keep_norms=change.keep_norms, name=tensor.name)
    if change.addition is not None:
        values.copy_((values.to(torch.float32).view(tensor.shape) + change.addition).flatten())
