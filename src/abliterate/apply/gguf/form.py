"""An edit applied to a GGUF file: its writers unpacked, edited in float32 and packed again, all else copied."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abliterate.apply.gguf.names import EMBEDDING, HEAD, Names, Target, by_tensor, targets
from abliterate.apply.gguf.requantise import PLAIN, chunks, edited
from abliterate.apply.gguf.write import NewTensor, Writer, check_output, planned, refuse, whole_gguf, write_copy
from abliterate.apply.rounding import Account
from abliterate.common.errors import AbliterateError, ModelError, NonFiniteError, RecipeError
from abliterate.common.files import check_space
from abliterate.models.gguf.file import GgufFile, open_gguf
from abliterate.models.gguf.types import check_packs, unpack

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions
    from abliterate.common.reporting import Reporter, Tick
    from abliterate.edit.recipe import Recipe

# Architectures in which llama.cpp adds an optional blk.N.ffn_down.bias to what the block hands on, unscaled (read of
# its src/models); a file of another that has a tensor too many isn't loaded.
READS_DOWN_BIAS = frozenset({"llama"})

_OTHER_TYPE = (
    "edit a GGUF of another type (Q4_0, a K-quant, F16), or the model's safetensors, and quantise that "
    "(abliterate export)"
)


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
    jobs = by_tensor(found)
    shifts = _shift_biases(recipe, file)
    kinds = {target.tensor.kind for target in found}
    for kind in sorted(kinds):
        check_packs(kind)
    added = _new_head(file, jobs, options.keep_tied)
    notes = ["the head was tied to the embedding and is a tensor of its own now"] if added else []
    added |= {name: _shifted(file, name, [], vector) for name, vector in shifts.items() if name not in file.tensors}
    if shifts:
        notes.append(f"{', '.join(shifts)} hold the shifts; llama.cpp reads them, transformers' GGUF reader doesn't")
    summary: dict[str, Any] = {
        "form": "gguf", "out": str(out), "bytes": planned(file, added).size, "writers": len({t.writer for t in found}),
        "tensors": len(jobs), "seconds": 0.0,
    }  # fmt: skip
    if options.plan:
        return {**summary, "notes": [*notes, *_planned(jobs)]}
    check_output(out, file.path, overwrite=options.overwrite)
    check_space(out, summary["bytes"])
    accounts: dict[tuple[str, int], Account] = defaultdict(Account)  # of a type, along one axis
    edits = _edits(file, jobs, accounts, reporter.progress("editing tensors", len(jobs)))
    edits |= {name: _shifted(file, name, jobs.get(name, []), v) for name, v in shifts.items() if name in file.tensors}
    with whole_gguf(out) as temporary:
        write_copy(file, temporary, edits | added)
        for (kind, _), account in accounts.items():
            account.check(kind, _OTHER_TYPE)
    total = sum(accounts.values(), Account())
    if kinds - set(PLAIN):
        notes.append(total.note())
    return {
        **summary, "seconds": round(time.monotonic() - began, 2), "notes": notes,
        "component_off": total.component_off, "packing_error": total.error,
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
        held[name] = held.get(name, np.zeros(recipe.edit.d_model, np.float32)) + shift.vector
    return held


def _shifted(file: GgufFile, name: str, todo: Sequence[Target], vector: np.ndarray) -> NewTensor:
    """A float32 bias, there or not, with directions taken out of it, where that is asked for, and a vector added."""

    def write(into: np.ndarray) -> None:
        values = unpack(np.array(file.raw(file.tensors[name])), "F32") if name in file.tensors else 0 * vector
        for target in todo:
            values = values - target.change.left.T @ (target.change.right @ values)
        into[:] = (values + vector).astype(np.float32).view(np.uint8)

    return NewTensor(vector.shape, "F32", write)


def _new_head(file: GgufFile, jobs: Mapping[str, Sequence[Target]], keep_tied: bool) -> dict[str, NewTensor]:
    """The head as a tensor of its own, when the file has none and its embedding will change."""
    if EMBEDDING not in jobs or HEAD in file.tensors or keep_tied:
        return {}
    if not Names(file.architecture, 0).untied_head:
        raise ModelError(
            f"GGUF {file.path}: llama.cpp ties the head of {file.architecture} models to the embedding, so that "
            "editing one edits both; pass --keep-tied to do that, or take the embedding out of the recipe"
        )
    embedding = file.tensors[EMBEDDING]
    return {HEAD: NewTensor(embedding.shape, embedding.kind, lambda into: np.copyto(into, file.raw(embedding)))}


def _planned(jobs: Mapping[str, Sequence[Target]]) -> list[str]:
    sizes: dict[str, list[int]] = {}
    for todo in jobs.values():
        sizes.setdefault(todo[0].tensor.kind, []).append(todo[0].tensor.size)
    return [
        f"edits {len(bytes_)} tensors of type {kind}, {sum(bytes_) / 2**20:,.1f} MiB" for kind, bytes_ in sizes.items()
    ]


def _edits(
    file: GgufFile, jobs: Mapping[str, Sequence[Target]], accounts: Mapping[tuple[str, int], Account], tick: Tick
) -> dict[str, NewTensor]:
    """The tensors with their directions taken out; how well that goes is added to the account of its kind."""

    def editor(todo: Sequence[Target]) -> Writer:
        def write(into: np.ndarray) -> None:
            _edit(file, todo, into, accounts[todo[0].tensor.kind, todo[0].axis])
            tick(1)

        return write

    return {name: NewTensor(todo[0].tensor.shape, todo[0].tensor.kind, editor(todo)) for name, todo in jobs.items()}


def _edit(file: GgufFile, todo: Sequence[Target], into: np.ndarray, account: Account) -> None:
    """Write a tensor's new data, matrix by matrix."""
    # a vector is a matrix of one row, and so is each expert's bias
    shape = (-1, 1 if todo[0].bias else into.shape[-2], into.shape[-1])
    changed = {index: target for target in todo for index in target.experts or (0,)}
    raw = file.raw(todo[0].tensor).reshape(shape)
    for index, (matrix, output) in enumerate(zip(raw, into.reshape(shape), strict=True)):
        if index in changed:
            _edit_matrix(matrix, changed[index], output, account)
        else:
            output[:] = matrix


def _edit_matrix(matrix: np.ndarray, target: Target, output: np.ndarray, account: Account) -> None:
    """Edit one matrix in parts: by themselves, several at a time."""
    import torch

    kind = target.tensor.kind
    axis = 1 if target.bias else target.axis

    def part(where: tuple[slice, slice]) -> Account:
        new, done = edited(np.ascontiguousarray(matrix[where]), kind, axis, target.change)
        if not (np.isfinite(done.values) and np.isfinite(unpack(new, kind)).all()):
            raise NonFiniteError(
                f"editing {target.tensor.name} ({kind}) gives NaN or infinite values; is the file damaged?"
            )
        output[where] = new
        return done

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for done in pool.map(part, chunks(matrix, kind, axis)):
            account.add(done)
