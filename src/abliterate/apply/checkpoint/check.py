"""What was written, read back: along each direction, every edited tensor is what the edit leaves of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from abliterate.apply.checkpoint.blocks import FLOATS, Blocks, Room
from abliterate.apply.checkpoint.pieces import WORKERS, Change, Output, reader
from abliterate.common.errors import WriterError
from abliterate.models.shards import StoredRange

Array = np.ndarray[Any, Any]

ARITHMETIC = 2e-6  # what sums in float32 may be off by, as a share of a vector's length
DEVIATIONS = 8  # of what rounding every value at random comes to


def check_written(outputs: Iterable[Output], targets: Mapping[str, Path]) -> None:
    """Compare each edited tensor of the files written with the one it was made from.

    Of R W, what a weight holds along the k directions R, the edit leaves (I - R left^T) R W. The difference over all
    of a tensor must be what rounding each of its values once, in its dtype, comes to; memory stays at some blocks.

    Args:
        outputs: the shards as they were to be written.
        targets: name of each shard -> the file to look at.

    Raises:
        WriterError: naming the first tensor of which more or less is left.
    """
    with ExitStack() as files, ThreadPoolExecutor(WORKERS) as pool:
        jobs = []
        for output in outputs:
            paths = (output.shard.path, targets[output.shard.path.name])
            old, new = (files.enter_context(path.open("rb")).fileno() for path in paths)
            for name, change in output.changes.items():
                if len(change.factors.right):
                    jobs.append((name, pool.submit(_off, old, new, output.moved, output.shard.tensors[name], change)))
        for name, job in jobs:
            off = job.result()
            if off > 1:
                raise WriterError(
                    f"{name} as written is off by {off:.3g} times what rounding explains from what the edit leaves of "
                    "it; nothing was written (is something else writing to the output?)"
                )


def _off(old: int, new: int, moved: int, tensor: StoredRange, change: Change) -> float:
    """How far a tensor is from what the edit leaves of it, in units of what rounding explains: fine up to 1."""
    dtype = FLOATS[tensor.dtype]
    d_model, inner = tensor.shape[change.axis], math.prod(tensor.shape[change.axis + 1 :])
    outer = math.prod(tensor.shape) // max(1, d_model * inner)
    left, right = (factor.astype(np.float64) for factor in change.factors)
    taken = np.linalg.lstsq(right.T, left.T, rcond=None)[0].T  # left = taken @ right
    step, wide = ml_dtypes.finfo(dtype), right.astype(np.float32)
    off, allowed = np.zeros(len(right)), np.full(len(right), 1e-30)
    rooms = [Room(dtype, d_model if inner == 1 else inner) for _ in range(2)]
    width = (d_model if inner == 1 else inner) * dtype.itemsize
    before = rooms[0].matrices(reader(old, tensor.start, width), outer, d_model, inner)
    after = rooms[1].matrices(reader(new, tensor.start + moved, width), outer, d_model, inner)
    added = None if change.addition is None else np.asarray(change.addition[0:outer], np.float64)
    at = 0
    for was, now in zip(before, after, strict=True):
        held, sizes, _ = _along(was, wide, change.keep_norms)
        found, new_sizes, spread = _along(now, wide, True)
        wanted = held - right @ left.T @ held
        if change.keep_norms:
            gone = taken @ held
            short = sizes - 2 * (gone * held).sum(0) + (gone * (right @ right.T @ gone)).sum(0)
            kept = short > 0.01 * sizes  # of the others little is left but rounding
            wanted = np.where(kept, wanted * np.sqrt(sizes / np.where(kept, short, 1)), found)
        if added is not None:
            wanted = wanted + right @ added[at : at + held.shape[1]].T
        off += np.square(found - wanted).sum(1)
        allowed += (DEVIATIONS * float(step.eps) / 2) ** 2 * spread.sum(1)
        allowed += ARITHMETIC**2 * (new_sizes.sum() + np.square(held).sum())
        allowed += held.shape[1] * (DEVIATIONS * float(step.smallest_subnormal)) ** 2
        at += held.shape[1]
    return float(np.sqrt(off / allowed).max())


def _along(blocks: Blocks, right: Array, squares: bool) -> tuple[Array, Array, Array]:
    """Of a matrix W [d_model, n], float64: R W [k, n], and with `squares` its columns' squared norms [n], R^2 W^2."""
    held, sizes, spread = (np.zeros(()) for _ in range(3))
    for rows, wide, spare in blocks():
        part = right[:, rows]
        held = held + (part @ wide).astype(np.float64)
        if squares:
            np.square(wide, out=spare)
            sizes, spread = sizes + spare.sum(0).astype(np.float64), spread + (part * part) @ spare
    return held, sizes, spread
