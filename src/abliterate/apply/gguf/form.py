"""An edit applied to a GGUF file: its writers unpacked, edited in float32 and packed again, all else copied."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abliterate.apply.gguf.file import (
    GgufFile,
    NewTensor,
    Writer,
    bytes_of,
    copy_range,
    open_gguf,
    padded,
    write_at,
    write_copy,
)
from abliterate.apply.gguf.names import EMBEDDING, HEAD, Names, Target, targets
from abliterate.apply.gguf.requantise import PLAIN, Account, chunks, edited
from abliterate.apply.gguf.types import check_packs, unpack
from abliterate.common.errors import AbliterateError, ModelError, NonFiniteError, OutputError, RecipeError
from abliterate.common.files import check_file, check_space, whole_file

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions
    from abliterate.common.reporting import Reporter
    from abliterate.edit.recipe import Recipe

# Architectures in which llama.cpp adds an optional blk.N.ffn_down.bias to what the block hands on, unscaled (read of
# its src/models); a file of another that has a tensor too many isn't loaded.
READS_DOWN_BIAS = frozenset({"llama"})


def apply_gguf(recipe: Recipe, model: str, out: Path, options: ApplyOptions, reporter: Reporter) -> dict[str, Any]:
    """Write a copy of a GGUF with a recipe's edit in its tensors.

    A shift goes into the bias of its block's down-projection, which llama.cpp reads for some architectures.
    Every writer is unpacked, edited in float32 and packed to the type it had; a quantised one so that the direction
    stays out (`requantise`). All other bytes are the file's own. A tied embedding that is edited is untied: the
    head becomes a tensor of its own with the embedding's old bytes, unless `options.keep_tied`.

    Args:
        recipe: what to take out.
        model: the GGUF file.
        out: the GGUF file to write.
        options: `norm_preserving`, `in_place` and `dtype` are refused.
        reporter: told how it goes.

    Returns:
        `form`, `out`, `bytes`, `writers`, `seconds`, `notes`, and `tensors`: how many were edited; `component_off`:
        how far the components along the directions are from what was asked, as a share of what they were;
        `packing_error`: what packing again changed beyond the edit, relative.

    Raises:
        AbliterateError: of the kind that fits: nothing is written then.
    """
    began = time.monotonic()
    refuse(
        options, "gguf", norm_preserving="use checkpoint and export", in_place="name a new file with --out",
        dtype="tensors keep their types",
    )  # fmt: skip
    file = open_gguf(model)
    found = targets(recipe, file, force=options.force)
    shifts = _shift_biases(recipe, file)
    jobs: dict[str, list[Target]] = {}
    for target in found:
        jobs.setdefault(target.tensor.name, []).append(target)
    for kind in sorted({target.tensor.kind for target in found}):
        check_packs(kind)
    head = _new_head(file, jobs, options.keep_tied)
    notes = ["the head was tied to the embedding and is a tensor of its own now"] if head else []
    added = head | {name: _new_bias(vector) for name, vector in shifts.items() if name not in file.tensors}
    if shifts:
        notes.append(f"{', '.join(shifts)} hold the shifts; llama.cpp reads them, transformers' GGUF reader doesn't")
    summary: dict[str, Any] = {"form": "gguf", "out": str(out), "bytes": _bytes(file, added), "writers": len(
        {t.writer for t in found}), "tensors": len(jobs)}  # fmt: skip
    if options.plan:
        return {**summary, "seconds": 0.0, "notes": [*notes, *_planned(jobs)]}
    check_output(file, out, options)
    check_space(out, summary["bytes"])
    account = Account()
    tick = reporter.progress("editing tensors", len(jobs))
    workers = _workers()

    def editor(targets_: list[Target]) -> Writer:
        def write(output: int, start: int) -> None:
            nonlocal account
            account += _edit(file, targets_, output, start, workers)
            tick(1)

        return write

    edits = {name: editor(todo) for name, todo in jobs.items()}
    edits |= {n: _shifted(file, n, jobs.get(n, []), v) for n, v in shifts.items() if n in file.tensors}
    with whole_file(out) as temporary:
        summary["bytes"] = write_copy(file, temporary, edits, added)
        check_whole(temporary)
    quantised = any(target.tensor.kind not in PLAIN for target in found)
    if quantised:
        notes.append(
            f"packing the edited tensors again changed their values by {account.error:.1%}, and left the component "
            f"along the directions {account.component_off:.1%} of what it was from where it should be"
        )
    return {
        **summary, "seconds": round(time.monotonic() - began, 2), "notes": notes,
        "component_off": account.component_off, "packing_error": account.error,
    }  # fmt: skip


def _shift_biases(recipe: Recipe, file: GgufFile) -> dict[str, np.ndarray]:
    """Bias of the file, there or not -> what is added to it, float32 [d_model], so that it holds the recipe's shifts.

    Raises:
        AbliterateError: when llama.cpp reads no such bias for this architecture, or it isn't float32.
        RecipeError: when a shift is beyond the model's blocks.
    """
    held: dict[str, np.ndarray] = {}
    blocks = file.number("block_count") or 0
    for shift in recipe.edit.shifts:
        name = f"blk.{shift.layer}.ffn_down.bias"
        if shift.layer >= blocks:
            raise RecipeError(f"the recipe shifts at block {shift.layer}, the last of GGUF {file.path} is {blocks - 1}")
        there = file.tensors.get(name)
        dense = f"blk.{shift.layer}.ffn_down.weight" in file.tensors
        if file.architecture not in READS_DOWN_BIAS or not dense or (there is not None and there.kind != "F32"):
            raise AbliterateError(
                f"the recipe adds a shift at the output of block {shift.layer}, and a GGUF of architecture "
                f"{file.architecture} has no bias there that llama.cpp reads; use --as control-vector for the shifts"
            )
        held[name] = held.get(name, np.zeros(recipe.edit.d_model, np.float32)) + shift.vector.numpy()
    return held


def _new_bias(vector: np.ndarray) -> NewTensor:
    return NewTensor(vector.shape, "F32", lambda output, start: write_at(output, start, vector.tobytes()))


def _shifted(file: GgufFile, name: str, todo: Sequence[Target], vector: np.ndarray) -> Writer:
    """Writes a float32 bias with directions taken out of it, where that is asked for too, and a vector added."""

    def write(output: int, start: int) -> None:
        values = unpack(np.array(file.raw(file.tensors[name])), "F32")
        for target in todo:
            values = values - target.change.left.T @ (target.change.right @ values)
        write_at(output, start, (values + vector).astype(np.float32).tobytes())

    return write


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


def check_output(file: GgufFile, out: Path, options: ApplyOptions) -> None:
    """Raise OutputError when the output is the model itself, exists, or can't be written."""
    if out.exists() and os.path.samefile(out, file.path):
        raise OutputError(f"output {out} is the model itself; name another file with --out")
    check_file(out, overwrite=options.overwrite)


def check_whole(path: Path) -> None:
    """Read a file that was written, as a reader would."""
    try:
        open_gguf(path)
    except ModelError as error:  # the disk, or a mistake of this program
        raise OutputError(f"what was written can't be read again ({error}); nothing is left of it") from error


def _new_head(file: GgufFile, jobs: dict[str, list[Target]], keep_tied: bool) -> dict[str, NewTensor]:
    """The head as a tensor of its own, when the file has none and its embedding will change."""
    if EMBEDDING not in jobs or HEAD in file.tensors or keep_tied:
        return {}
    if not Names(file.architecture, 0).untied_head:
        raise ModelError(
            f"GGUF {file.path}: llama.cpp ties the head of {file.architecture} models to the embedding, so that "
            "editing one edits both; pass --keep-tied to do that, or take the embedding out of the recipe"
        )
    embedding = file.tensors[EMBEDDING]

    def write(output: int, start: int) -> None:
        with open(file.path, "rb") as source:
            copy_range(source.fileno(), embedding.start, output, start, embedding.size)

    return {HEAD: NewTensor(embedding.shape, embedding.kind, write)}


def _bytes(file: GgufFile, added: dict[str, NewTensor]) -> int:
    sizes = (padded(bytes_of(t.shape, t.kind), file.alignment) for t in added.values())
    return file.size + sum(sizes) + (file.alignment if added else 0)


def _planned(jobs: dict[str, list[Target]]) -> list[str]:
    sizes: dict[str, list[int]] = {}
    for targets_ in jobs.values():
        sizes.setdefault(targets_[0].tensor.kind, []).append(targets_[0].tensor.size)
    return [
        f"edits {len(bytes_)} tensors of type {kind}, {sum(bytes_) / 2**20:,.1f} MiB" for kind, bytes_ in sizes.items()
    ]


def _workers() -> int:
    import torch

    return max(1, torch.get_num_threads())


def _edit(file: GgufFile, todo: Sequence[Target], output: int, start: int, workers: int) -> Account:
    """Write a tensor's new data into the output, matrix by matrix."""
    tensor = todo[0].tensor
    account = Account()
    raw = file.raw(tensor)
    # a vector is a matrix of one row, and so is each expert's bias
    matrices = raw.reshape(-1, 1 if todo[0].bias else raw.shape[-2], raw.shape[-1])
    changed = {index: target for target in todo for index in target.experts or (0,)}
    for index, matrix in enumerate(matrices):
        at = start + index * matrix.size
        if index not in changed:
            with open(file.path, "rb") as source:
                copy_range(source.fileno(), tensor.start + index * matrix.size, output, at, matrix.size)
            continue
        target = changed[index]
        account += _edit_matrix(matrix, target, output, at, workers)
    return account


def _edit_matrix(matrix: np.ndarray, target: Target, output: int, at: int, workers: int) -> Account:
    """Edit one matrix in parts: by themselves, several at a time, none but its packed bytes held whole."""
    kind = target.tensor.kind
    axis = 1 if target.bias else target.axis
    row_bytes = matrix.shape[-1]
    account = Account()

    def part(where: tuple[slice, slice]) -> tuple[tuple[slice, slice], np.ndarray, Account]:
        raw = np.ascontiguousarray(matrix[where])
        new, done = edited(raw, kind, axis, target.change)
        if not (np.isfinite(done.values) and np.isfinite(unpack(new, kind)).all()):
            raise NonFiniteError(
                f"editing {target.tensor.name} ({kind}) gives NaN or infinite values; is the file damaged?"
            )
        return where, new, done

    whole = np.empty(matrix.shape, np.uint8) if axis == 0 else None
    with ThreadPoolExecutor(workers) as pool:
        for where, new, done in _in_turn(pool, part, list(chunks(matrix, kind, axis)), workers):
            account += done
            if whole is not None:
                whole[where] = new
            else:
                write_at(output, at + where[0].start * row_bytes, new.tobytes())
    if whole is not None:
        write_at(output, at, whole.data.cast("B"))
    return account


def _in_turn(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Sequence[Any], ahead: int) -> Iterator[Any]:
    """The results in order, with no more parts in work than there are workers."""
    for first in range(0, len(items), ahead):
        yield from pool.map(work, items[first : first + ahead])
