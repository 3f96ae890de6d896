"""What applying a recipe to a checkpoint comes to: every tensor, file and config that changes. Nothing is written."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abliterate.apply.checkpoint.blocks import FLOATS
from abliterate.apply.checkpoint.folder import config_levels, config_with, other_files, read_config
from abliterate.apply.checkpoint.pieces import Change, Output
from abliterate.apply.checkpoint.repacked import Repacked, split
from abliterate.common.errors import ModelError, NonFiniteError, RecipeError, WriterError, listed, shorten
from abliterate.edit.algebra import Factors, factors
from abliterate.edit.recipe import Recipe
from abliterate.edit.stored_tensor import Shape, StoredTensor, misfit
from abliterate.models.packed import Packed, packed_in, unpacked_shapes
from abliterate.models.shards import INDEX, Checkpoint, NewTensor, index_with, open_checkpoint

if TYPE_CHECKING:
    from abliterate.apply.checkpoint.held_shifts import HeldShifts
    from abliterate.apply.forms import ApplyOptions


_UNTIED = "embedding and head were tied; the head is written as {}, unedited"


def _other_head(head: str) -> str:
    return (
        f"config.json says that embedding and head are one, and the files hold another head, {head}: it stays, as "
        "transformers 5 loads it (older versions, and other programs, used the embedding)"
    )


@dataclass
class Work:
    """All that applying a recipe to a checkpoint comes to.

    Attributes:
        outputs: file name -> the shard as it will be written.
        texts: file name -> contents of the small files that change (config, index, card).
        copies: files copied as they are, relative to the folder.
        repacked: the packed weights that change.
        summary: `writers` and `tensors` edited, whether the head was `untied`, files `left_out`, and `notes`: what
            people should know.
    """

    checkpoint: Checkpoint
    outputs: dict[str, Output]
    texts: dict[str, bytes] = field(default_factory=dict)
    copies: list[Path] = field(default_factory=list)
    repacked: list[Repacked] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def written(self, in_place: bool = False) -> dict[str, Output]:
        """The shards that are written: all, or in place those that change."""
        return {name: output for name, output in self.outputs.items() if output.touched or not in_place}

    def total_bytes(self, in_place: bool = False) -> int:
        """Bytes written: of all files, or in place of those that change."""
        sizes = [output.size for output in self.written(in_place).values()] + [len(t) for t in self.texts.values()]
        others = [] if in_place else [(self.checkpoint.folder / path).stat().st_size for path in self.copies]
        return sum(sizes) + sum(others)


def prepare(recipe: Recipe, folder: Path, options: ApplyOptions, *, source: str, card: str | None = None) -> Work:
    """Check everything but the config's hash (`folder.check_config`) and work out every change; nothing is written.

    Args:
        source: the model's name for its card.
        card: the card, where the caller has one.

    Raises:
        ModelError, RecipeError, WriterError: see `apply_checkpoint`.
    """
    config = read_config(folder)
    checkpoint = open_checkpoint(folder)
    notes: list[str] = []
    packed = packed_in(checkpoint, config)
    shapes = unpacked_shapes({name: place.shape for name, place in checkpoint.ranges.items()}, packed)
    stored = stored_parts(recipe, folder, config, shapes)
    changes, writers = _changes(recipe, checkpoint, packed, stored, options, notes)
    held = _held_shifts(recipe, checkpoint, changes)
    tied = tied_names(recipe, folder, config, set(checkpoint.files), set(changes))
    if tied is not None and options.keep_tied:
        _keep_tied(checkpoint, changes, *tied, notes)
        tied = None
    changed = config
    if tied is not None:
        changed = config_with(changed, "tie_word_embeddings", False, everywhere=True)
        other = tied[1] in checkpoint.files and not checkpoint.alike(*tied)
        notes.append(_other_head(tied[1]) if other else _UNTIED.format(tied[1]))
    if held is not None and held.switch:
        changed = config_with(changed, held.switch, True)
        notes.append(
            f"config.json says {held.switch}: true now, since a bias holds the shift; the {len(held.tensors)} biases "
            f"that this gives the class are written, all but {held.shifted} of them zero"
        )
    texts = {"config.json": _json(changed)} if changed != config else {}
    if checkpoint.absent:
        notes.append(f"the index names {listed(checkpoint.absent)}, which no file holds")
    plain, repacked = split(checkpoint, packed, changes)
    work = changed_copy(checkpoint, _outputs(checkpoint, plain, tied, held, repacked), texts)
    work.repacked = repacked
    left_out = work.summary["left_out"]
    if left_out:
        done = "these still hold the" if options.in_place else "not copied, because they hold"
        notes.append(f"{done} unedited weights: {', '.join(left_out)}")
    work.texts["README.md"] = (card or _card(recipe, source, options, notes, folder)).encode()
    tensors = len(changes) + (held.shifted if held else 0)
    work.summary |= {"writers": writers, "tensors": tensors, "untied": tied is not None, "notes": notes}
    return work


def changed_copy(checkpoint: Checkpoint, outputs: dict[str, Output], texts: dict[str, bytes]) -> Work:
    """A copy of a model's folder with shards and small files as given, an index that fits, and no card yet."""
    work = Work(checkpoint, outputs, texts)
    added = {file: output.added for file, output in outputs.items() if output.added}
    if checkpoint.index is not None and (added or not checkpoint.index.get("metadata")):
        work.texts[INDEX] = _json(index_with(checkpoint.index, added, checkpoint.total))
    stale = set() if checkpoint.index is not None else {INDEX}  # of shards that aren't loaded
    made = {*outputs, *work.texts, "README.md", *stale}
    work.copies, work.summary["left_out"] = other_files(checkpoint.folder, made)
    return work


def _card(recipe: Recipe, source: str, options: ApplyOptions, notes: list[str], folder: Path) -> str:
    from abliterate.cards.others import applied_card

    card = folder / "README.md"
    existing = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    return applied_card(recipe, source, options, notes, existing)


def stored_parts(
    recipe: Recipe, folder: Path, config: dict[str, Any], there: dict[str, Shape | None]
) -> dict[str, tuple[StoredTensor, ...]]:
    """The stored tensors of each writer that the edit touches: by the recipe's word where it fits, else by a skeleton.

    Args:
        config: the folder's.
        there: its tensors' names and shapes; None for a shape that isn't known.

    Raises:
        RecipeError: when the recipe doesn't fit the folder.
        ModelError: when it doesn't because the folder's weights are quantised.
    """
    parts = recipe.edit.parts
    if not parts:
        return {}
    found = recipe.tensors
    if not found or any(w not in found for w in recipe.edit.writers) or misfit(found, there):
        found = _tensors_by_skeleton(recipe, folder, config)
    missing = [name for name in parts if name not in found]
    if missing:
        raise RecipeError(f"the recipe doesn't say which tensors of a checkpoint {missing[0]} is, nor does the model")
    return {name: found[name] for name in parts}


def _tensors_by_skeleton(
    recipe: Recipe, folder: Path, config: dict[str, Any]
) -> dict[str, tuple[StoredTensor, ...]]:  # fmt: skip
    from abliterate.models.recipes import tensors_for

    try:
        return tensors_for(recipe, folder)
    except (RecipeError, WriterError) as error:
        from abliterate.models.quantised import WAY_ROUND

        quantised = config.get("quantization_config") or config.get("quantization")
        if isinstance(quantised, dict):
            method = quantised.get("quant_method", "MLX" if "group_size" in quantised else "unknown")
            raise ModelError(
                f"model folder {folder} is quantised ({method}) and its packed weights can't be edited "
                f"({shorten(str(error), 120)}); {WAY_ROUND}"
            ) from error
        raise


def _changes(
    recipe: Recipe, checkpoint: Checkpoint, packed: dict[str, Packed],
    stored: dict[str, tuple[StoredTensor, ...]], options: ApplyOptions, notes: list[str],
) -> tuple[dict[str, Change], int]:  # fmt: skip
    """What is done to each stored tensor, and how many writers that is."""
    changes: dict[str, Change] = {}
    skipped = []
    for writer, part in recipe.edit.parts.items():
        others = [t for t in stored[writer] if t.name not in packed]
        odd = [t for t in others if checkpoint.tensor(t.name).dtype not in FLOATS]
        if odd and not options.skip_unsupported:
            raise ModelError(
                f"{odd[0].name} of {checkpoint.folder} is stored as {checkpoint.tensor(odd[0].name).dtype}, "
                "which can't be edited; give the unquantised model, or leave such writers out with --skip-unsupported"
            )
        if odd:
            skipped.append(writer)
            continue
        for tensor in stored[writer]:
            there = packed[tensor.name] if tensor.name in packed else checkpoint.tensor(tensor.name)
            _check_fits(tensor, there.shape, len(part.directions[0]))
            gain = _gain(checkpoint, tensor)
            taken = factors(part, gain, tensor.gain.centred if tensor.gain else False)
            keep = options.norm_preserving and not tensor.bias and len(tensor.shape) > 1
            changes[tensor.name] = Change(tensor.axis, taken, keep)
    if skipped:
        notes.append(f"left unedited, because of their dtype: {', '.join(skipped)}")
    return changes, len(recipe.edit.parts) - len(skipped)


def _check_fits(tensor: StoredTensor, there: Shape, d_model: int) -> None:
    if len(there) != len(tensor.shape) or there[tensor.axis] != d_model:
        raise RecipeError(
            f"the recipe is for a {tensor.name} of {list(tensor.shape)} with {d_model} along dimension {tensor.axis}; "
            f"this model's is {list(there)}"
        )


def _gain(checkpoint: Checkpoint, tensor: StoredTensor) -> np.ndarray[Any, Any] | None:
    """What the norm behind a tensor multiplies by, float64, read from wherever it lies."""
    if tensor.gain is None:
        return None
    gain = np.ones(())
    for name, plus in tensor.gain.norms:
        place = checkpoint.tensor(name)
        if place.dtype not in FLOATS:
            raise ModelError(f"{name} of {checkpoint.folder} is stored as {place.dtype}, which can't be read")
        gain = gain * (np.frombuffer(checkpoint.raw(name), FLOATS[place.dtype]).astype(np.float64) + plus)
        if not np.isfinite(gain).all():
            raise NonFiniteError(f"{name} of {checkpoint.folder}, the gain behind {tensor.name}, is NaN or infinite")
    return gain


def _held_shifts(recipe: Recipe, checkpoint: Checkpoint, changes: dict[str, Change]) -> HeldShifts | None:
    """The biases that hold the edit's shifts, those of the checkpoint put among the changes; None without shifts.

    To find them takes a skeleton of the model, and torch.
    """
    if not recipe.edit.shifts:
        return None
    from abliterate.apply.checkpoint.held_shifts import held_shifts

    held = held_shifts(recipe.edit.shifts, checkpoint)
    for name, addition in held.additions.items():
        nothing = np.zeros((0, checkpoint.tensor(name).shape[0]), np.float32)
        old = changes.get(name, Change(0, Factors(nothing, nothing)))
        changes[name] = replace(old, addition=addition)
    return held


def tied_names(
    recipe: Recipe, folder: Path, config: dict[str, Any], there: set[str], changed: set[str]
) -> tuple[str, str] | None:
    """The stored names of embedding and head where they are one tensor that the edit touches, else None.

    A head that the checkpoint doesn't hold is tied; one that it holds is when the config says so, since loading then
    may tie it.
    """
    embedding, head = (recipe.model.get(key) for key in ("embedding", "head"))
    if embedding not in there:
        if all(re.search(r"\.\d+\.", f".{name}") for name in changed):
            return None  # all of them in blocks: no need to ask which is the embedding
        from abliterate.models.stored import names_in, skeleton, stored_names

        handle = skeleton(folder)
        names = stored_names(handle, names_in(handle.model, there))
        embedding, head = names["embedding"], names["head"]
    if embedding not in changed or head is None or head == embedding:
        return None
    if head in there and not any(level.get("tie_word_embeddings") for level in config_levels(config)):
        return None
    return str(embedding), str(head)


def _keep_tied(checkpoint: Checkpoint, changes: dict[str, Change], embedding: str, head: str, notes: list[str]) -> None:
    """Have the head edited as the embedding is, where the checkpoint holds both and they are one."""
    if head in checkpoint.files:
        if not checkpoint.alike(head, embedding):
            notes.append(_other_head(head))
            return
        changes[head] = changes[embedding]
    notes.append("embedding and head stay tied, so the head is edited too (--keep-tied)")


def _outputs(
    checkpoint: Checkpoint, changes: dict[str, Change], tied: tuple[str, str] | None, held: HeldShifts | None,
    repacked: Sequence[Repacked],
) -> dict[str, Output]:  # fmt: skip
    """Every shard as it will be written, with a head of its own where it was tied and the biases that are new."""
    added: dict[str, list[NewTensor]] = {}
    if tied is not None and tied[1] not in checkpoint.files:
        embedding = checkpoint.tensor(tied[0])
        added[checkpoint.files[tied[0]]] = [NewTensor(tied[1], embedding.dtype, embedding.shape, embedding)]
    if held is not None and held.tensors:
        added[held.file] = [*added.get(held.file, []), *held.tensors]
    return outputs_of(checkpoint, changes, added, repacked)


def outputs_of(
    checkpoint: Checkpoint, changes: dict[str, Change], added: dict[str, list[NewTensor]],
    repacked: Sequence[Repacked] = (),
) -> dict[str, Output]:  # fmt: skip
    """File name -> the shard with these changes and new tensors."""
    made = {name: content for one in repacked for name, content in one.contents().items()}
    return {
        name: Output(
            shard,
            {t: changes[t] for t in shard.tensors if t in changes},
            added.get(name, ()),
            {t: made[t] for t in shard.tensors if t in made},
        )
        for name, shard in checkpoint.shards.items()
    }


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
