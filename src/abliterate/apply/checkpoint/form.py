"""An edit applied to a checkpoint on disk, folder to folder: no model is made, nothing is run, memory stays small.

Every byte that the edit doesn't touch is copied in the kernel: shards keep their names, headers, order and
metadata. Importing torch takes longer than copying some GiB, so nothing here does, but for recipes that don't say
which tensors their writers are or that hold shifts, for which a skeleton of the model is made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abliterate.apply.checkpoint.blocks import RAW, Block, HeldRows
from abliterate.apply.checkpoint.journal import changing, interrupted, locked, recover
from abliterate.apply.checkpoint.pieces import Change, Output, begin, begin_copy, run_pieces
from abliterate.apply.checkpoint.shards import (
    INDEX,
    Checkpoint,
    Shard,
    StoredRange,
    index_with,
    open_checkpoint,
    read_into,
)
from abliterate.common.errors import (
    AbliterateError,
    ModelError,
    NonFiniteError,
    OutputError,
    RecipeError,
    WriterError,
    shorten,
)
from abliterate.common.files import check_folder, check_space, explained, whole_folder
from abliterate.edit.algebra import taken_out
from abliterate.edit.recipe_file import RecipeFile, as_arrays, check_model, config_hash
from abliterate.edit.stored_tensor import Shape, StoredTensor, misfit

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions
    from abliterate.common.reporting import Reporter
    from abliterate.edit.recipe import Recipe

Array = np.ndarray[Any, Any]

# Weights in other formats, and what tells where in them a tensor is: they would be the unedited model's.
OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|ot|tflite)"
    r"|(pytorch_)?model.*\.bin|consolidated.*\.bin|pytorch_model.*\.bin\.index\.json|.*\.safetensors\.index\.json"
)
NOT_COPIED = {".git", ".cache", ".gitattributes"}


@dataclass
class Work:
    """All that applying a recipe to a checkpoint comes to.

    Attributes:
        outputs: file name -> the shard as it will be written.
        texts: file name -> contents of the small files that change (config, index, card).
        copies: files copied as they are, relative to the folder.
        left_out: files of the folder that are not taken along.
        writers: writers edited; tensors: stored tensors edited.
        notes: what people should know.
    """

    checkpoint: Checkpoint
    outputs: dict[str, Output]
    texts: dict[str, bytes] = field(default_factory=dict)
    copies: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    writers: int = 0
    tensors: int = 0
    untied: bool = False
    notes: list[str] = field(default_factory=list)

    def total_bytes(self, *, in_place: bool = False) -> int:
        """Bytes written: of all files, or in place of those that change."""
        shards = sum(o.size for o in self.outputs.values() if o.touched or not in_place)
        others = 0 if in_place else sum((self.checkpoint.folder / p).stat().st_size for p in self.copies)
        return shards + others + sum(map(len, self.texts.values()))

    def edited_bytes(self) -> int:
        return sum(o.shard.tensors[name].nbytes for o in self.outputs.values() for name in o.changes)


def apply_checkpoint(
    recipe: Recipe | RecipeFile, model: str, out: Path, options: ApplyOptions, reporter: Reporter
) -> dict[str, Any]:
    """Write a copy of a safetensors checkpoint with the edit in its weights, or change it in place.

    Args:
        recipe: its edit is applied as it is (already scaled by `options.strength`).
        model: folder or Hub id.
        out: folder to write; with `options.in_place` the model's own.
        options: `dtype` is refused: tensors keep theirs.
        reporter: told how it goes; progress is in MiB.

    Returns:
        `form`, `out`, `bytes` written, `writers`, `tensors` edited, `untied`, `left_out`, `notes`, `seconds`; with
        `options.plan` what `plan_checkpoint` says.

    Raises:
        ModelError: when the checkpoint is damaged, quantised where it would be edited, or none.
        RecipeError: when the recipe is for another model.
        WriterError: when a shift has no bias to go into.
        NonFiniteError: when a value is, or becomes, NaN or infinite.
        OutputError: when the output is in the way, is the model itself, or doesn't fit on the disk.
    """
    started = time.monotonic()
    recipe = as_arrays(recipe)
    if options.dtype is not None:
        raise AbliterateError("the form checkpoint keeps every tensor's dtype; leave out --dtype")
    folder = local_folder(model, options.revision, weights=not options.plan)
    if options.plan:
        from abliterate.apply.checkpoint.plan import plan_checkpoint

        return plan_checkpoint(recipe, folder, out, options)
    if options.in_place:
        if not out.exists() or not out.samefile(folder) or not Path(model).expanduser().is_dir():
            raise OutputError(f"--in-place changes a local model folder; leave out --out, or name {model} itself")
        summary = _in_place(recipe, folder, options, reporter)
    else:
        check_apart(folder, out)
        check_folder(out, overwrite=options.overwrite)
        summary = _to_folder(recipe, model, folder, out, options, reporter)
    return {"form": "checkpoint", "out": str(out), **summary, "seconds": round(time.monotonic() - started, 2)}


def check_apart(folder: Path, out: Path) -> None:
    """Raise OutputError when the output would be the model's folder, in it, or around it."""
    source, target = folder.resolve(), out.resolve()
    if source == target:
        raise OutputError(f"output {out} is the model itself; name another with --out, or change it with --in-place")
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise OutputError(f"output {out} and model {folder} lie one in the other; name another folder with --out")


def _to_folder(
    recipe: RecipeFile, model: str, folder: Path, out: Path, options: ApplyOptions, reporter: Reporter
) -> dict[str, Any]:
    if interrupted(folder):
        raise ModelError(
            f"an apply in place was interrupted in {folder}, and its files may not belong together; "
            "run it again there, which ends it"
        )
    work = prepare(recipe, folder, options, source=model)
    total = work.total_bytes()
    check_space(out, total + total // 1000)
    reporter.say(f"editing {work.tensors} of {len(work.checkpoint.files)} tensors in {len(work.outputs)} file(s)")
    with whole_folder(out, overwrite=options.overwrite) as temporary:
        pieces = begin(work.outputs, {name: temporary / name for name in work.outputs})
        for relative in work.copies:
            pieces += begin_copy(folder / relative, temporary / relative)
        # importing transformers, which knows the config's defaults, takes as long as copying some GiB
        run_pieces(pieces, reporter, lambda: check_config(recipe, folder, force=options.force))
        for name, text in work.texts.items():
            (temporary / name).write_bytes(text)
    return {"bytes": total, **_summary(work)}


def _in_place(recipe: RecipeFile, folder: Path, options: ApplyOptions, reporter: Reporter) -> dict[str, Any]:
    fingerprint = _fingerprint(recipe, options)
    with locked(folder):
        done = recover(folder)
        if done is not None:
            reporter.say("ended what an interrupted apply had begun here")
            if done.get("fingerprint") == fingerprint:
                return {**done["summary"], "recovered": True}
        check_config(recipe, folder, force=options.force)
        work = prepare(recipe, folder, options, source=folder.name)
        outputs = {name: output for name, output in work.outputs.items() if output.touched}
        total = work.total_bytes(in_place=True)
        check_space(folder / "new", total + total // 1000)
        summary = {"bytes": total, **_summary(work), "left_out": []}
        names = [*outputs, *work.texts]
        reporter.say(f"editing {work.tensors} tensors in {len(outputs)} file(s) of {folder}")
        record = {"fingerprint": fingerprint, "summary": summary}
        with explained(folder), changing(folder, names, record) as temporaries:
            run_pieces(begin(outputs, temporaries), reporter)
            for name, text in work.texts.items():
                temporaries[name].write_bytes(text)
            for name, temporary in temporaries.items():
                if (folder / name).exists():
                    temporary.chmod((folder / name).stat().st_mode & 0o777)
    return summary


def _summary(work: Work) -> dict[str, Any]:
    return {
        "writers": work.writers,
        "tensors": work.tensors,
        "untied": work.untied,
        "left_out": work.left_out,
        "notes": work.notes,
    }


def _fingerprint(recipe: RecipeFile, options: ApplyOptions) -> str:
    """Says whether two applies are the same: their edits, and the options that change what is written."""
    edit = recipe.edit
    digest = hashlib.sha256(json.dumps([*edit.writers, options.norm_preserving, options.keep_tied]).encode())
    for array in (edit.directions, edit.strengths, *(s.vector for s in edit.shifts)):
        digest.update(array.tobytes())
    digest.update(json.dumps([s.layer for s in edit.shifts]).encode())
    return digest.hexdigest()


def prepare(recipe: RecipeFile, folder: Path, options: ApplyOptions, *, source: str) -> Work:
    """Check everything but the config's hash (`check_config`) and work out every change; nothing is written.

    Args:
        source: the model's name for its card.

    Raises:
        ModelError, RecipeError, WriterError: see `apply_checkpoint`.
    """
    from abliterate.cards.applied import applied_card

    config = read_config(folder)
    checkpoint = open_checkpoint(folder)
    notes: list[str] = []
    shapes: dict[str, Shape | None] = {name: checkpoint.tensor(name).shape for name in checkpoint.files}
    stored = stored_parts(recipe, folder, config, shapes)
    changes, writers = _changes(recipe, checkpoint, stored, options, notes)
    held = _held_shifts(recipe, folder, checkpoint)
    for name, addition in held.additions.items():
        old = changes.get(name, Change(0, None))
        changes[name] = Change(old.axis, old.factors, old.keep_norms, addition)
    names = tied_names(recipe, folder, config, set(checkpoint.files), set(changes))
    head_copy = None
    if names is not None and options.keep_tied:
        _keep_tied(checkpoint, changes, *names, notes)
    elif names is not None:
        head_copy = names if names[1] not in checkpoint.files else None
    outputs = {
        name: _output(shard, changes, head_copy, held.tensors if name == held.file else {})
        for name, shard in checkpoint.shards.items()
    }
    work = Work(checkpoint, outputs, writers=writers, tensors=len(changes) + held.shifted, notes=notes)
    changed = dict(config)
    if names is not None and not options.keep_tied:
        work.untied = True
        changed = untied_config(changed)
        notes.append(f"embedding and head were tied; the head is written as {names[1]}, unedited")
    if held.switch:
        changed = config_with(changed, held.switch)
        notes.append(
            f"config.json says {held.switch}: true now, since a bias holds the shift; the {len(held.tensors)} biases "
            f"that this gives the class are written, all but {held.shifted} of them zero"
        )
    if changed != config:
        work.texts["config.json"] = _json(changed)
    if checkpoint.index is not None and any(output.added for output in outputs.values()):
        places = {t.name: (file, t) for file, o in outputs.items() for t, _ in o.added}
        work.texts[INDEX] = _json(index_with(checkpoint.index, places))
    work.copies, work.left_out = other_files(folder, {*outputs, *work.texts, "README.md"})
    if work.left_out:
        done = "these still hold the" if options.in_place else "not copied, because they hold"
        notes.append(f"{done} unedited weights: {', '.join(work.left_out)}")
    card = folder / "README.md"
    existing = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    work.texts["README.md"] = applied_card(recipe, source, options, notes, existing).encode()
    return work


def stored_parts(
    recipe: RecipeFile, folder: Path, config: dict[str, Any], there: dict[str, Shape | None]
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
    recipe: RecipeFile, folder: Path, config: dict[str, Any]
) -> dict[str, tuple[StoredTensor, ...]]:  # fmt: skip
    from abliterate.edit.recipe import from_arrays
    from abliterate.models.stored import tensors_for

    try:
        return tensors_for(from_arrays(recipe), folder)
    except (RecipeError, WriterError) as error:
        quantised = config.get("quantization_config")
        if isinstance(quantised, dict):
            method = quantised.get("quant_method", "unknown")
            raise ModelError(
                f"model folder {folder} is quantised ({method}) and its packed weights can't be edited "
                f"({shorten(str(error), 120)}); give the unquantised model, or a GGUF with --as gguf"
            ) from error
        raise


def _changes(
    recipe: RecipeFile, checkpoint: Checkpoint, stored: dict[str, tuple[StoredTensor, ...]], options: ApplyOptions,
    notes: list[str],
) -> tuple[dict[str, Change], int]:  # fmt: skip
    """What is done to each stored tensor, and how many writers that is."""
    changes: dict[str, Change] = {}
    skipped = []
    for writer, part in recipe.edit.parts.items():
        packed = [t for t in stored[writer] if checkpoint.tensor(t.name).dtype not in RAW]
        if packed and not options.skip_unsupported:
            raise ModelError(
                f"{packed[0].name} of {checkpoint.folder} is stored as {checkpoint.tensor(packed[0].name).dtype}, "
                "which can't be edited; give the unquantised model, or leave such writers out with --skip-unsupported"
            )
        if packed:
            skipped.append(writer)
            continue
        for tensor in stored[writer]:
            _check_fits(tensor, checkpoint.tensor(tensor.name), len(part.directions[0]))
            gain = _gain(checkpoint, tensor)
            taken = taken_out(*part, gain, tensor.gain.centred if tensor.gain else False)
            keep = options.norm_preserving and not tensor.bias and len(tensor.shape) > 1
            changes[tensor.name] = Change(tensor.axis, taken, keep)
    if skipped:
        notes.append(f"left unedited, because of their dtype: {', '.join(skipped)}")
    return changes, len(recipe.edit.parts) - len(skipped)


def _check_fits(tensor: StoredTensor, there: StoredRange, d_model: int) -> None:
    if len(there.shape) != len(tensor.shape) or there.shape[tensor.axis] != d_model:
        raise RecipeError(
            f"the recipe is for a {tensor.name} of {list(tensor.shape)} with {d_model} along dimension {tensor.axis}; "
            f"this model's is {list(there.shape)}"
        )


def _gain(checkpoint: Checkpoint, tensor: StoredTensor) -> Array | None:
    """What the norm behind a tensor multiplies by, float64, read from wherever it lies."""
    if tensor.gain is None:
        return None
    place = checkpoint.tensor(tensor.gain.name)
    if place.dtype not in RAW:
        raise ModelError(f"{place.name} of {checkpoint.folder} is stored as {place.dtype}, which can't be read")
    values = read_bits(checkpoint, place.name).reshape(1, -1)
    block = Block(place.dtype, values.shape[1])
    gain = block.load(HeldRows(values), 0, 1)[0].astype(np.float64) + tensor.gain.plus
    if not (block.finite and np.isfinite(gain).all()):
        raise NonFiniteError(f"{place.name} of {checkpoint.folder}, the gain behind {tensor.name}, is NaN or infinite")
    return gain


def read_bits(checkpoint: Checkpoint, name: str) -> Array:
    """A tensor of the checkpoint as it is stored (`blocks.RAW`), flat."""
    place = checkpoint.tensor(name)
    values: Array = np.empty(place.nbytes, np.uint8)
    fd = os.open(checkpoint.shards[checkpoint.files[name]].path, os.O_RDONLY)
    try:
        read_into(fd, memoryview(values), place.start)  # type: ignore[arg-type]
    finally:
        os.close(fd)
    return values.view(RAW.get(place.dtype, np.uint8))


@dataclass(frozen=True)
class HeldShifts:
    """How a checkpoint holds an edit's shifts.

    Attributes:
        additions: stored bias -> what is added to it, float32 of its shape.
        tensors: biases that the checkpoint lacks: name -> dtype as in safetensors, shape and bytes.
        file: the shard that these go into.
        switch: the field of config.json that has to be true for them to be read; empty without any.
        shifted: how many of them are not zero.
    """

    additions: dict[str, Array] = field(default_factory=dict)
    tensors: dict[str, tuple[str, Shape, bytes]] = field(default_factory=dict)
    file: str = ""
    switch: str = ""
    shifted: int = 0


def _held_shifts(recipe: RecipeFile, folder: Path, checkpoint: Checkpoint) -> HeldShifts:
    """The biases that hold the edit's shifts; to find them takes a skeleton of the model, and torch."""
    if not recipe.edit.shifts:
        return HeldShifts()
    from abliterate.apply.checkpoint.held_shifts import held_shifts
    from abliterate.edit.recipe import from_arrays

    return held_shifts(from_arrays(recipe).edit.shifts, folder, checkpoint)


def tied_names(
    recipe: RecipeFile, folder: Path, config: dict[str, Any], there: set[str], changed: set[str]
) -> tuple[str, str] | None:
    """The stored names of embedding and head where they are one tensor that the edit touches, else None.

    A head that the checkpoint doesn't hold is tied; one that it holds is when the config says so, since loading then
    may tie it.
    """
    embedding, head = (recipe.model.get(key) for key in ("embedding", "head"))
    if embedding not in there:
        if not changed & _looks_like_embedding(there):
            return None
        from abliterate.models.stored import checkpoint_shapes, names_in, skeleton, stored_names

        handle = skeleton(folder)
        names = stored_names(handle, names_in(handle.model, checkpoint_shapes(folder)))
        embedding, head = names["embedding"], names["head"]
    if embedding not in changed or head is None or head == embedding:
        return None
    if head in there and not any(level.get("tie_word_embeddings") for level in _levels(config)):
        return None
    return str(embedding), str(head)


def _looks_like_embedding(names: set[str]) -> set[str]:
    """Names outside the blocks: an embedding's is among them. Saves asking what the model's is when only blocks are
    edited."""
    return {name for name in names if not re.search(r"\.\d+\.", f".{name}")}


def _keep_tied(checkpoint: Checkpoint, changes: dict[str, Change], embedding: str, head: str, notes: list[str]) -> None:
    """Have the head edited as the embedding is, where the checkpoint holds both and they are one."""
    if head in checkpoint.files and _equal(checkpoint, head, embedding):
        changes[head] = changes[embedding]
    if head not in checkpoint.files or head in changes:
        notes.append("embedding and head stay tied, so the head is edited too (--keep-tied)")


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors are the same, bit for bit."""
    first, second = checkpoint.tensor(one), checkpoint.tensor(other)
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return np.array_equal(read_bits(checkpoint, one), read_bits(checkpoint, other))


def _output(
    shard: Shard, changes: dict[str, Change], head_copy: tuple[str, str] | None,
    biases: dict[str, tuple[str, Shape, bytes]],
) -> Output:  # fmt: skip
    own = {name: changes[name] for name in shard.tensors if name in changes}
    added: dict[str, StoredRange | bytes] = {}
    wanted = []
    if head_copy is not None and head_copy[0] in shard.tensors:
        embedding = shard.tensors[head_copy[0]]
        wanted.append(StoredRange(head_copy[1], embedding.dtype, embedding.shape, embedding.start, embedding.end))
        added[head_copy[1]] = embedding
    for name, (dtype, shape, raw) in biases.items():
        wanted.append(StoredRange(name, dtype, shape, 0, len(raw)))
        added[name] = raw
    if not wanted:
        return Output(shard, own)
    head, places = shard.with_tensors(wanted)
    return Output(shard, own, head, tuple((places[name], source) for name, source in added.items()))


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelError: when it is missing or no JSON object, or the folder holds an adapter.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"model folder {folder} holds a PEFT adapter; merge it into its model first, then edit that")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model folder {folder}: there is no config.json in it; name the model's folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {shorten(str(error))}; nothing was written, get it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is damaged: it is not an object; nothing was written, get it again")
    return config


def check_config(recipe: RecipeFile, folder: Path, *, force: bool) -> None:
    """Raise RecipeError when the recipe was made for a model of another config (`recipe.check_model`)."""
    if force or not recipe.model.get("config_hash"):
        return
    if recipe.model.get("config_file_hash") == config_hash(read_config(folder)):
        return  # the very file that the recipe was made for; importing transformers takes longer than copying GiBs
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise ModelError(
            f"model folder {folder}: its config.json can't be used: {shorten(str(error), 200)}; --force applies the "
            "recipe without comparing it"
        ) from error
    check_model(recipe, config_hash(config.to_dict()), force=force)


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config, saying that head and embedding are two tensors."""
    changed = {**config, "tie_word_embeddings": False}
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            changed[key] = {**config[key], "tie_word_embeddings": False}
    return changed


def config_with(config: dict[str, Any], field: str) -> dict[str, Any]:
    """The config with a field of the language model's set to True."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            return {**config, key: {**config[key], field: True}}
    return {**config, field: True}


def _levels(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config, *(value for value in config.values() if isinstance(value, dict))]


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def other_files(folder: Path, made: set[str]) -> tuple[list[Path], list[str]]:
    """What else is in a folder: files to copy, and files with weights that are left out; relative to it.

    Links are followed: a Hub cache's snapshot is made of them.

    Args:
        folder: the model's.
        made: names of files that are written otherwise.
    """
    copies: list[Path] = []
    left_out: list[Path] = []
    for base, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        folders[:] = [
            f for f in folders if f not in NOT_COPIED and not real.startswith(os.path.realpath(Path(base, f)) + os.sep)
        ]
        for file in sorted(files):
            relative = Path(base, file).relative_to(folder)
            if str(relative) in made or file in NOT_COPIED or not (folder / relative).is_file():
                continue
            if file.startswith(".") and file.endswith((".tmp", ".abliterate-new")):
                continue  # what a killed process left
            taken = str(relative) == INDEX or not OTHER_WEIGHTS.fullmatch(file)
            (copies if taken else left_out).append(relative)
    return sorted(copies), sorted(map(str, left_out))


def local_folder(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The model's folder; of a Hub id, its snapshot in the Hub cache, downloaded if need be.

    Args:
        model: folder or Hub id.
        revision: Hub commit, branch or tag.
        weights: download the safetensors too, not only what describes the model.

    Raises:
        ModelError: when there is no such folder, or the Hub doesn't give it.
    """
    path = Path(model).expanduser()
    if path.is_dir() and model.strip():
        return path
    if path.is_file():
        hint = "use --as gguf, or give the model's folder" if path.suffix == ".gguf" else "give the model's folder"
        raise ModelError(f"model {model} is a file, and the form checkpoint takes a folder with safetensors; {hint}")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise ModelError(f"model {model} not found: no such folder; check the path")
    from huggingface_hub import snapshot_download

    kinds = [
        "*.json",
        "*.txt",
        "*.md",
        "*.model",
        "*.jinja",
        "*.py",
        "*.tiktoken",
        "LICENSE*",
        "NOTICE*",
        "USE_POLICY*",
    ]
    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=[*kinds, "*.safetensors"] if weights else kinds,
            ignore_patterns=["original/*", "consolidated*.safetensors"],
        )  # fmt: skip
    except Exception as error:
        raise ModelError(
            f"model {model} is no folder here, and the Hub didn't give it: {shorten(str(error), 200)}"
        ) from error
    return Path(found)
