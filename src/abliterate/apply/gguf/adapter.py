"""An edit as a llama.cpp LoRA in a GGUF: for a quantised model one already has, applied when it is loaded.

W' = W - left^T (right W) is a LoRA as it stands: A = right W, B = -left^T, of as many ranks as there are directions.
right W is computed from the GGUF's own unpacked weights, so the LoRA belongs to that file: on another quantisation
of the model it leaves that one's quantisation error along the directions. Nothing is packed again.

Read of llama.cpp (src/llama-adapter.cpp, src/llama-graph.cpp): tensors NAME.lora_a and NAME.lora_b; with
adapter.lora.alpha 0 the scale is the user's alone, whatever the rank; for token_embd.weight A is transposed and looked
up; a LoRA on stacked experts is stacked too. It holds no bias and no position embedding. The head of a model whose
GGUF has no output.weight carries the embedding's name and would get the LoRA too, in the wrong shape, and llama.cpp
would abort: there the embedding can't be held.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abliterate.apply.gguf.names import EMBEDDING, HEAD, Target, by_tensor, targets
from abliterate.apply.gguf.requantise import chunks
from abliterate.apply.gguf.write import check_output, refuse, whole_gguf, write_small
from abliterate.common.errors import AbliterateError, NonFiniteError, WriterError
from abliterate.models.gguf.file import GgufFile, open_gguf
from abliterate.models.gguf.types import unpack

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions
    from abliterate.common.reporting import Reporter
    from abliterate.edit.recipe import Recipe


def apply_gguf_adapter(
    recipe: Recipe, model: str, out: Path, options: ApplyOptions, reporter: Reporter
) -> dict[str, Any]:
    """Write a recipe's edit of a GGUF as a LoRA that llama.cpp loads beside it (`--lora`).

    Args:
        recipe: what to take out.
        model: the GGUF file that the LoRA is for.
        out: the GGUF file to write.
        options: with `skip_unsupported` what a LoRA can't hold is left out and listed.
        reporter: told how it goes.

    Returns:
        `form`, `out`, `bytes`, `writers`, `seconds`, `notes`, and `skipped`: the GGUF's names of what was left out.

    Raises:
        WriterError: naming what a LoRA can't hold.
        AbliterateError: of the kind that fits; nothing is written then.
    """
    began = time.monotonic()
    refuse(
        options, "gguf-adapter", norm_preserving="a LoRA of the recipe's rank can't hold it",
        in_place="name a new file with --out", dtype="the adapter is float32", keep_tied="a LoRA can't edit the head",
    )  # fmt: skip
    file = open_gguf(model)
    found = targets(recipe, file, force=options.force)
    reasons = {t.tensor.name: why for t in found if (why := _unsupported(t, file))}
    if recipe.edit.shifts:
        reasons["shifts"] = "a LoRA adds nothing by itself (use --as control-vector)"
    if reasons and not options.skip_unsupported:
        name, why = next(iter(reasons.items()))
        others = f"; nor {', '.join(list(reasons)[1:])}" if len(reasons) > 1 else ""
        raise WriterError(
            f"a llama.cpp LoRA can't hold {name}: {why}{others}; pass --skip-unsupported to leave these out, "
            "or use --as gguf"
        )
    held = by_tensor(target for target in found if target.tensor.name not in reasons)
    if not held:
        raise AbliterateError("nothing of the recipe can be held by a llama.cpp LoRA; use --as gguf")
    notes = [f"left out {name}: {why}" for name, why in reasons.items()]
    summary: dict[str, Any] = {
        "form": "gguf-adapter", "out": str(out), "writers": len({t.writer for todo in held.values() for t in todo}),
        "notes": notes, "skipped": list(reasons),
    }  # fmt: skip
    if options.plan:
        return {**summary, "bytes": sum(_factor_bytes(todo) for todo in held.values()), "seconds": 0.0}
    check_output(out, file.path, overwrite=options.overwrite)
    tick = reporter.progress("factoring tensors", len(held))
    factors = {}
    for name, todo in held.items():
        factors[f"{name}.lora_a"], factors[f"{name}.lora_b"] = _factors(todo, file)
        tick(1)
    # alpha 0: llama.cpp doesn't divide by the rank
    metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 0.0}
    with whole_gguf(out) as temporary:
        write_small(temporary, file.architecture, metadata, factors)
    return {**summary, "bytes": out.stat().st_size, "seconds": round(time.monotonic() - began, 2)}


def _unsupported(target: Target, file: GgufFile) -> str:
    """Why a LoRA can't hold this, or nothing."""
    if target.bias:
        return "it is a bias"
    if target.tensor.name == EMBEDDING and HEAD not in file.tensors:
        return "the head is tied to it, and llama.cpp would put the LoRA on both"
    if target.axis == 1 and target.tensor.name != EMBEDDING:
        return "llama.cpp looks it up without LoRAs"
    return ""


def _factor_bytes(todo: list[Target]) -> int:
    tensor = todo[0].tensor
    rank = sum(len(t.change.left) for t in todo)
    stacked = tensor.shape[0] if todo[0].experts else 1
    return 4 * rank * stacked * sum(tensor.shape[-2:])


def _factors(todo: list[Target], file: GgufFile) -> tuple[np.ndarray, np.ndarray]:
    """A and B as numpy shapes: [.., rank, in] and [.., out, rank]; of the embedding [vocabulary, rank], [out, rank]."""
    tensor = todo[0].tensor
    raw = file.raw(tensor)
    if todo[0].experts is None:
        return _matrix_factors(raw, todo[0])
    # experts that this edit leaves alone get zeros, and all the same rank
    rank = max(len(t.change.left) for t in todo)
    a = np.zeros((tensor.shape[0], rank, tensor.shape[-1]), np.float32)
    b = np.zeros((tensor.shape[0], tensor.shape[-2], rank), np.float32)
    for target in todo:
        for index in target.experts or ():
            one_a, one_b = _matrix_factors(raw[index], target)
            a[index, : len(one_a)], b[index, :, : len(one_a)] = one_a, one_b
    return a, b


def _matrix_factors(raw: np.ndarray, target: Target) -> tuple[np.ndarray, np.ndarray]:
    kind, change = target.tensor.kind, target.change
    parts = []
    for where in chunks(raw, kind, target.axis):
        values = unpack(np.ascontiguousarray(raw[where]), kind)
        parts.append(change.right @ values if target.axis == 0 else values @ change.right.T)
    a = np.concatenate(parts, axis=1 if target.axis == 0 else 0)
    if not np.isfinite(a).all():
        raise NonFiniteError(f"{target.tensor.name} ({kind}) holds NaN or infinite values; is the file damaged?")
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(-change.left.T)
