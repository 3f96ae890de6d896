"""A stage's rows over replicas of the model: how they are cut, sent with what is in force, and put together again.

How rows are cut depends on the rows alone, never on how many workers there are: each shard is computed as if it were
all there is, and what comes of it is put together in the shards' order. So any number of workers gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from abliterate.common.reporting import Tick
from abliterate.models.handle import Handle

SHARDS = 8  # of a stage's rows, but no more than keep their size between these
SMALLEST, LARGEST = 8, 256
Row = TypeVar("Row")


class Workers(Protocol):
    """Processes that hold a replica of a handle's model each."""

    def map(
        self, handle: Handle, function: Callable[..., Any], common: Any, calls: Sequence[Any],
        tick: Callable[[int], None],
    ) -> list[Any]:  # fmt: skip
        """function(replica, common, call) of every call, on whichever worker is free, with the handle's edits attached.

        Args:
            handle: whose edits and way of formatting prompts are in force on the replica too.
            function: of a module; it is sent by name.
            common: sent once to each worker, and not again as long as it is the same object.
            calls: what differs.
            tick: called with the index of each call that is done.
        """
        ...


def shards(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of rows of such lengths, longest first, in shards of nearly one size."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    size = min(LARGEST, max(SMALLEST, -(-len(order) // SHARDS)))
    return [order[start : start + size] for start in range(0, len(order), size)]


def spread(
    handle: Handle, function: Callable[..., Sequence[Row]], common: Any, lengths: Sequence[int],
    call: Callable[[list[int]], Any], tick: Tick,
) -> list[Row]:  # fmt: skip
    """What a function gives for every row, each shard of them on one of the handle's workers.

    Args:
        handle: one that has workers.
        function: function(replica, common, call(shard)) gives something for each row of a shard; sent by name.
        common: the same for all shards.
        lengths: of the rows.
        call: what the function needs of a shard, given the indices of its rows.
        tick: told how many rows are done.
    """
    parts = shards(lengths)
    found = handle.workers.map(handle, function, common, [call(p) for p in parts], lambda i: tick(len(parts[i])))
    rows: dict[int, Row] = {}
    for part, given in zip(parts, found, strict=True):
        rows.update(zip(part, given, strict=True))
    return [rows[i] for i in range(len(lengths))]


@contextmanager
def alone(handle: Handle) -> Iterator[None]:
    """While this lasts the handle's own model runs everything: what is in force on it is no edit that could be sent."""
    workers, handle.workers = handle.workers, None
    try:
        yield
    finally:
        handle.workers = workers
