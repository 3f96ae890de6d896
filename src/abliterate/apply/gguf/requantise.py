"""Taking a direction out of a matrix packed in a ggml type so that it stays out (`apply.rounding`)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from abliterate.apply.rounding import ROUNDS, Account, constrained, products
from abliterate.edit.algebra import Factors
from abliterate.models.gguf.types import PLAIN, layout_of, pack, unpack

# Values worked on at a time: 16 MiB in float32, of which some copies are needed.
CHUNK = 1 << 22


def chunks(raw: np.ndarray, kind: str, axis: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a packed matrix that can be edited by themselves: whole columns of blocks where d_model runs
    down the columns (axis 0), whole rows where it runs along them (axis 1)."""
    layout = layout_of(kind)
    rows, row_bytes = raw.shape
    values = row_bytes // layout.size * layout.block
    if axis == 1:
        step = max(1, CHUNK // values)
        yield from ((slice(i, min(i + step, rows)), slice(None)) for i in range(0, rows, step))
        return
    step = max(1, CHUNK // rows // layout.block) * layout.size
    yield from ((slice(None), slice(i, min(i + step, row_bytes))) for i in range(0, row_bytes, step))


def edited(raw: np.ndarray, kind: str, axis: int, change: Factors, rounds: int = ROUNDS) -> tuple[np.ndarray, Account]:
    """The packed matrix with the change made, in the same type, and how well that went.

    Blocks whose values the change leaves as they are keep their bytes.

    Args:
        raw: uint8 [rows, bytes of a row]; for a chunk of columns, those columns' blocks.
        kind: ggml type.
        axis: 0 where d_model runs down the columns (a linear layer), 1 where it runs along the rows (an
            embedding).
        change: what to take out.
        rounds: most rounds of packing; 1 packs the edited values as they are.
    """
    values = unpack(raw, kind)
    along, across = products(change, axis)
    component = along(values)
    target = values - across(component, change.left)
    layout = layout_of(kind)
    same = (target == values).reshape(len(values), -1, layout.block).all(-1)
    asked = along(target)

    def packed(wanted: np.ndarray) -> np.ndarray:
        blocks = pack(wanted, kind).reshape(*same.shape, layout.size)
        return np.where(same[..., None], np.asarray(raw).reshape(blocks.shape), blocks).reshape(raw.shape)

    if kind in PLAIN:
        best = packed(target)
        got = unpack(best, kind)
    else:
        best, got = constrained(
            packed, lambda trial: unpack(trial, kind), axis, change, target, asked, rounds, layout.size, layout.block
        )
    return best, Account.of(component, asked, along(got), got - target, target)
