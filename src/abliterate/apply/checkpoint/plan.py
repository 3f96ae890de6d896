"""What applying a recipe to a checkpoint would read, write, take and need; told before the weights are there.

With the shards in the folder it is exact. Without them the index and the config say it: the index what there is
and how much in all, the recipe (or a skeleton of the config's model) what the edited tensors are. Time comes from a
probe on this machine: the same code on some MiB, and how fast the disk takes what no longer fits in memory.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import psutil

from abliterate.apply.checkpoint.folder import check_config, config_levels, other_files, read_config
from abliterate.apply.checkpoint.pieces import WORKERS, Change, Piece, run_pieces
from abliterate.apply.checkpoint.work import prepare, stored_parts, tied_names
from abliterate.common.errors import ModelError, OutputError
from abliterate.common.ranges import spans
from abliterate.common.reporting import Silent
from abliterate.edit.algebra import Factors
from abliterate.edit.recipe import Recipe
from abliterate.models.packed import checkpoint_shapes
from abliterate.models.shards import StoredRange, read_index

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
PROBE_BYTES = 64 * 2**20
SCRATCH = 32 * 2**20  # what blocks of the widest rows take, and the allocator besides that


@dataclass(frozen=True)
class Amounts:
    """What there is to do.

    Attributes:
        bytes_read, bytes_written: of all files together.
        bytes_edited: of the tensors edited.
        tensors, writers: how many of each are edited.
        files: safetensors files written.
        exact: whether the shards' headers were there to say so.
        notes: what people should know.
    """

    bytes_read: int
    bytes_written: int
    bytes_edited: int
    tensors: int
    writers: int
    files: int
    exact: bool
    notes: list[str]


def plan_checkpoint(recipe: Recipe, folder: Path, out: Path, options: ApplyOptions) -> dict[str, Any]:
    """Say what `apply_checkpoint` would do; nothing is left on the disk.

    Args:
        recipe: as for applying.
        folder: with config.json, and the shards or their index.
        out: where it would go: its disk is the one tried and asked for room.
        options: as for applying.

    Returns:
        The fields of `Amounts`, and `form`, `plan`, `out`, `seconds`, `memory_bytes` (peak, resident), `free_bytes`
        on the output's disk, and `rates` in bytes a second.

    Raises:
        As `apply_checkpoint`; ModelError too when neither shards nor index tell how much there is.
    """
    check_config(recipe, folder, force=options.force)
    amounts = (_exact if _shards_there(folder) else _estimate)(recipe, folder, options)
    place = out.absolute()
    while not place.is_dir():
        place = place.parent
    rates = _probe(place if os.access(place, os.W_OK) else Path(tempfile.gettempdir()), recipe.edit.d_model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "form": "checkpoint",
        "plan": True,
        "out": str(out),
        **asdict(amounts),
        "seconds": round(_seconds(amounts, rates), 1),
        "memory_bytes": peak + SCRATCH,
        "free_bytes": shutil.disk_usage(place).free,
        "rates": {name: round(value) for name, value in rates.items()},
    }


def _shards_there(folder: Path) -> bool:
    index = read_index(folder)
    names = set(index["weight_map"].values()) if index else set()
    return all((folder / n).is_file() for n in names) if names else any(folder.glob("*.safetensors"))


def _exact(recipe: Recipe, folder: Path, options: ApplyOptions) -> Amounts:
    work = prepare(recipe, folder, options, source=folder.name)
    total, outputs, told = work.total_bytes(options.in_place), work.written(options.in_place), work.summary
    edited = sum(o.shard.tensors[name].nbytes for o in outputs.values() for name in {*o.changes, *o.made})
    return Amounts(total, total, edited, told["tensors"], told["writers"], len(outputs), True, told["notes"])


def _estimate(recipe: Recipe, folder: Path, options: ApplyOptions) -> Amounts:
    """The same from config.json and the index alone."""
    config, index = read_config(folder), read_index(folder)
    if index is None:
        raise ModelError(f"model folder {folder} holds neither safetensors nor their index; a plan needs one of them")
    files: dict[str, str] = index["weight_map"]
    stored = stored_parts(recipe, folder, config, checkpoint_shapes(folder))
    edited = {tensor.name: math.prod(tensor.shape) for tensors in stored.values() for tensor in tensors}
    item, dtype = _item_bytes(config)
    notes = [f"the shards are not here: sizes are those of {dtype}, which config.json says the weights are"]
    total = (index.get("metadata") or {}).get("total_size")
    if not isinstance(total, int):
        from abliterate.models.stored import skeleton

        total = sum(p.numel() for p in skeleton(folder).model.parameters()) * item
        notes.append("the index doesn't say how large the weights are; the model's shapes do")
    more = 0
    tied = tied_names(recipe, folder, config, set(files), set(edited))
    if tied is not None and not options.keep_tied and tied[1] not in files:
        more = edited[tied[0]] * item
        notes.append(f"embedding and head are tied; the head is written as {tied[1]}, unedited")
    if recipe.edit.shifts:
        notes.append("shifts go into biases, which the plan doesn't count")
    if options.in_place:
        notes.append("in place, only shards with edited tensors are written; without them here, all are counted")
    written = {files[name] for name in (edited if options.in_place else files)}
    total += sum((folder / path).stat().st_size for path in other_files(folder, set())[0])
    return Amounts(
        total, total + more, sum(edited.values()) * item, len(edited), len(stored), len(written), False, notes,
    )  # fmt: skip


def _item_bytes(config: dict[str, Any]) -> tuple[int, str]:
    """Bytes per weight and its dtype, as the config has it; bfloat16 where it doesn't say."""
    named = [level.get("dtype") or level.get("torch_dtype") for level in config_levels(config)]
    dtype = next((name for name in named if name in ITEM_BYTES), "bfloat16")
    return ITEM_BYTES[dtype], dtype


def _probe(folder: Path, d_model: int) -> dict[str, float]:
    """Bytes a second of this machine, `copied`, `edited` and `synced` to the disk: the same code is timed on some MiB
    in a folder, which are removed again.

    Raises:
        OutputError: when the folder can't hold them.
    """
    inner = max(1, PROBE_BYTES // 8 // 2 // d_model)
    tensor = StoredRange("probe", "BF16", (d_model, inner), 0, 2 * d_model * inner)
    vector = np.full((1, d_model), d_model**-0.5, np.float32)
    change = Change(0, Factors(vector, vector))
    values = np.random.default_rng(0).standard_normal((d_model, inner), np.float32).astype(ml_dtypes.bfloat16)
    try:
        with tempfile.TemporaryDirectory(prefix=".abliterate-probe-", dir=folder) as temporary:
            source, target = Path(temporary) / "source", Path(temporary) / "target"
            source.write_bytes(values.tobytes() * 8)
            target.touch()
            places = list(spans(0, 8 * tensor.nbytes, tensor.nbytes))
            copies = [Piece(source, target, low, low, high - low) for low, high in places]
            edits = [Piece(source, target, low, low, high - low, tensor, change) for low, high in places]
            taken = {"copied": _timed(lambda: run_pieces(copies, Silent()))}
            run_pieces(edits[:WORKERS], Silent())  # the first product of a process sets things up
            taken["edited"] = _timed(lambda: run_pieces(edits, Silent()))
            with target.open("r+b") as file:
                taken["synced"] = _timed(lambda: os.fsync(file.fileno()))
    except OSError as error:
        raise OutputError(
            f"can't try how fast {folder} is: {error.strerror}; name another folder with --out"
        ) from error
    return {name: 8 * tensor.nbytes / seconds for name, seconds in taken.items()}


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return max(1e-6, time.perf_counter() - started)


def _seconds(amounts: Amounts, rates: dict[str, float]) -> float:
    """How long it takes: what fits in memory goes as fast as in the probe, the rest as fast as the disk syncs.

    A fifth of the free memory is written to before a writer has to wait for the disk.
    """
    edited, free = amounts.bytes_edited, psutil.virtual_memory().free
    copying = (amounts.bytes_written - edited) / rates["copied"] + edited / rates["edited"]
    return max(copying, max(0, amounts.bytes_written - free // 5) / rates["synced"])
