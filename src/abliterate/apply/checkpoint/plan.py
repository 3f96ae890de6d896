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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abliterate.apply.checkpoint.form import check_config, other_files, prepare, read_config, stored_parts, tied_names
from abliterate.apply.checkpoint.pieces import WORKERS, Change, Piece, run_pieces
from abliterate.apply.checkpoint.shards import StoredRange, read_index, read_shard, steps
from abliterate.common.errors import ModelError, OutputError
from abliterate.common.reporting import Silent
from abliterate.edit.algebra import ArrayFactors
from abliterate.edit.recipe_file import RecipeFile, as_arrays
from abliterate.edit.stored_tensor import Shape

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions
    from abliterate.edit.recipe import Recipe

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


@dataclass(frozen=True)
class Rates:
    """Bytes a second of this machine: copied, edited, and synced to the disk."""

    copied: float
    edited: float
    synced: float


def plan_checkpoint(recipe: Recipe | RecipeFile, folder: Path, out: Path, options: ApplyOptions) -> dict[str, Any]:
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
    recipe = as_arrays(recipe)
    amounts = _exact(recipe, folder, options) if _shards_there(folder) else estimate(recipe, folder, options)
    place = out.absolute()
    while not place.is_dir():
        place = place.parent
    rates = probe(place if os.access(place, os.W_OK) else Path(tempfile.gettempdir()), recipe.edit.d_model)
    return {
        "form": "checkpoint",
        "plan": True,
        "out": str(out),
        **asdict(amounts),
        "seconds": round(seconds(amounts, rates, free_memory()), 1),
        "memory_bytes": peak_resident() + SCRATCH,
        "free_bytes": shutil.disk_usage(place).free,
        "rates": {name: round(value) for name, value in asdict(rates).items()},
    }


def _shards_there(folder: Path) -> bool:
    index = read_index(folder)
    names = set(index["weight_map"].values()) if index else set()
    return all((folder / n).is_file() for n in names) if names else any(folder.glob("*.safetensors"))


def _exact(recipe: RecipeFile, folder: Path, options: ApplyOptions) -> Amounts:
    check_config(recipe, folder, force=options.force)
    work = prepare(recipe, folder, options, source=folder.name)
    written = work.total_bytes(in_place=options.in_place)
    outputs = [o for o in work.outputs.values() if o.touched or not options.in_place]
    return Amounts(
        written, written, work.edited_bytes(), work.tensors, work.writers, len(outputs), True,
        work.notes,
    )  # fmt: skip


def estimate(recipe: RecipeFile, folder: Path, options: ApplyOptions) -> Amounts:
    """The same from config.json and the index alone."""
    config, index = read_config(folder), read_index(folder)
    if index is None:
        raise ModelError(f"model folder {folder} holds neither safetensors nor their index; a plan needs one of them")
    check_config(recipe, folder, force=options.force)
    stored = stored_parts(recipe, folder, config, _shapes(folder, index["weight_map"]))
    entries = {tensor.name: tensor for tensors in stored.values() for tensor in tensors}
    item, dtype = _item_bytes(config)
    notes = [f"the shards are not here: sizes are those of {dtype}, which config.json says the weights are"]
    total = (index.get("metadata") or {}).get("total_size")
    if not isinstance(total, int):
        from abliterate.models.stored import skeleton

        total = sum(p.numel() for p in skeleton(folder).model.parameters()) * item
        notes.append("the index doesn't say how large the weights are; the model's shapes do")
    more = 0
    names = tied_names(recipe, folder, config, set(index["weight_map"]), set(entries))
    if names is not None and not options.keep_tied and names[1] not in index["weight_map"]:
        more = math.prod(entries[names[0]].shape) * item
        notes.append(f"embedding and head are tied; the head is written as {names[1]}, unedited")
    if recipe.edit.shifts:
        notes.append("shifts go into biases, which the plan doesn't count")
    files = set(index["weight_map"].values())
    if options.in_place:
        files = {index["weight_map"][name] for name in entries}
        notes.append("in place, only shards with edited tensors are written; without them here, all are counted")
    copies, _ = other_files(folder, set())
    others = sum((folder / path).stat().st_size for path in copies)
    edited = {name: math.prod(t.shape) * item for name, t in entries.items()}
    return Amounts(
        total + others, total + more + others, sum(edited.values()), len(entries), len(stored), len(files), False,
        notes,
    )  # fmt: skip


def _shapes(folder: Path, weight_map: dict[str, str]) -> dict[str, Shape | None]:
    """Shapes of the tensors that an index names; None where their shard isn't there."""
    shapes: dict[str, Shape | None] = dict.fromkeys(weight_map)
    for file in sorted(set(weight_map.values())):
        if (folder / file).is_file():
            shapes |= {name: tensor.shape for name, tensor in read_shard(folder / file).tensors.items()}
    return shapes


def _item_bytes(config: dict[str, Any]) -> tuple[int, str]:
    """Bytes per weight and its dtype, as the config has it; bfloat16 where it doesn't say."""
    for level in (config, *(value for value in config.values() if isinstance(value, dict))):
        name = level.get("dtype") or level.get("torch_dtype")
        if name in ITEM_BYTES:
            return ITEM_BYTES[name], name
    return 2, "bfloat16"


def probe(folder: Path, d_model: int) -> Rates:
    """Time the same code on some MiB in a folder; they are removed again.

    Raises:
        OutputError: when the folder can't hold them.
    """
    size = PROBE_BYTES
    try:
        with tempfile.TemporaryDirectory(prefix=".abliterate-probe-", dir=folder) as temporary:
            source, target = Path(temporary) / "source", Path(temporary) / "target"
            source.write_bytes(os.urandom(2**20) * (size // 2**20))
            target.touch()
            copied = _timed([Piece(source, target, low, low, high - low) for low, high in steps(0, size, size // 8)])
            d_model = max(1, d_model)
            inner = max(1, size // 8 // 2 // d_model)
            vector = np.full((1, d_model), d_model**-0.5, np.float32)
            tensor = StoredRange("probe", "BF16", (d_model, inner), 0, 2 * d_model * inner)
            bits = np.random.default_rng(0).standard_normal((d_model, inner), np.float32).view(np.uint32)
            values = (bits >> 16).astype(np.uint16).tobytes()
            source.write_bytes(values * 8)
            change = Change(0, ArrayFactors(vector, vector))
            pieces = [Piece(source, target, i * len(values), i * len(values), len(values), tensor, change)
                      for i in range(8)]  # fmt: skip
            _timed(pieces[:WORKERS])  # the first product of a process sets things up
            edited = _timed(pieces)
            started = time.perf_counter()
            with target.open("r+b") as file:
                os.fsync(file.fileno())
            synced = time.perf_counter() - started
    except OSError as error:
        raise OutputError(
            f"can't try how fast {folder} is: {error.strerror}; name another folder with --out"
        ) from error
    return Rates(size / copied, 8 * len(values) / edited, size / max(synced, 1e-6))


def _timed(pieces: list[Piece]) -> float:
    started = time.perf_counter()
    run_pieces(pieces, Silent())
    return max(1e-6, time.perf_counter() - started)


def seconds(amounts: Amounts, rates: Rates, memory: int) -> float:
    """How long it takes: what fits in memory goes as fast as in the probe, the rest as fast as the disk syncs.

    Args:
        amounts: what there is to do.
        rates: of this machine.
        memory: bytes of it that are free; a fifth of it is written to before a writer has to wait for the disk.
    """
    copying = (amounts.bytes_written - amounts.bytes_edited) / rates.copied + amounts.bytes_edited / rates.edited
    waiting = max(0, amounts.bytes_written - memory // 5) / rates.synced
    return max(copying, waiting)


def free_memory() -> int:
    """Bytes of memory that can be had."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def peak_resident() -> int:
    """Most bytes that this process has held resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
