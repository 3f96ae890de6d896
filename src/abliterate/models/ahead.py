"""Reading ahead: while a block computes, the next one's weights come from disk into the system's cache of files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from abliterate.models.handle import Handle
from abliterate.models.placement import stored_in
from abliterate.models.shards import Shard, read_shard

PIECE = 2**22  # bytes read at a time


class Stretch(NamedTuple):
    """Bytes of a file."""

    file: Path
    start: int
    end: int


def read_ahead(handle: Handle) -> None:
    """From now on each block's pass has the next one's weights read, if they are on disk.

    They go into no memory of this process, and the system lets go of them as it needs: a cache of their own would take
    what weights were sent away for. Passes go up through the blocks, and down where a backward pass runs them again.

    Args:
        handle: a model some of whose blocks' weights are brought from disk; of any other nothing happens.
    """
    shards: dict[str, Shard] = {}
    stretches = [list(_stretches(block, shards)) for block in handle.blocks]
    if not any(stretches):
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    last, reading = -1, Future[None]()
    reading.set_result(None)

    def look(place: int) -> None:
        nonlocal last, reading
        up = place > last or place == 0
        last = place
        coming = (place + 1) % len(stretches) if up else place - 1
        if reading.done():  # else the disk is behind, and what computes reads for itself
            reading = pool.submit(_read, stretches[coming])

    for place, block in enumerate(handle.blocks):
        block.register_forward_pre_hook(lambda *_, place=place: look(place))


def _stretches(block: nn.Module, shards: dict[str, Shard]) -> Iterator[Stretch]:
    """Where a block's weights are in files, of those that are brought from there."""
    for file, name in stored_in(block):
        if file not in shards:
            shards[file] = read_shard(Path(file))
        stored = shards[file].tensors[name]
        yield Stretch(Path(file), stored.start, stored.end)


def _read(stretches: list[Stretch]) -> None:
    buffer: Any = memoryview(bytearray(PIECE))
    for stretch in stretches:
        with stretch.file.open("rb", buffering=0) as file:
            for start in range(stretch.start, stretch.end, PIECE):
                os.preadv(file.fileno(), [buffer[: stretch.end - start]], start)
