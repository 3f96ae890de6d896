"""An edit applied to a checkpoint on disk, folder to folder: no model is made, nothing is run, memory stays small.

Every byte that the edit doesn't touch is copied in the kernel: shards keep their names, headers, order and
metadata.
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

import torch
from torch import Tensor

from abliterate.apply import factors
from abliterate.apply.journal import changing, interrupted, locked, recover
from abliterate.apply.pieces import EDITABLE, Change, Output, begin, begin_copy, run_pieces
from abliterate.apply.shards import INDEX, Checkpoint, Shard, StoredRange, index_with, open_checkpoint, read_into
from abliterate.errors import AbliterateError, ModelError, OutputError, RecipeError, WriterError, shorten
from abliterate.files import check_folder, check_space, explained, whole_folder

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions
    from abliterate.pipeline import Reporter
    from abliterate.recipe import Recipe
    from abliterate.stored import StoredTensor

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

    def largest_piece(self) -> int:
        """Bytes of the largest tensor, or part of one, that a thread holds at a time."""
        pieces = (p for o in self.outputs.values() if o.touched for p in o.pieces(Path()) if p.change is not None)
        return max((p.nbytes for p in pieces), default=0)


def apply_checkpoint(
    recipe: Recipe, model: str, out: Path, options: ApplyOptions, reporter: Reporter
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
    if options.dtype is not None:
        raise AbliterateError("the form checkpoint keeps every tensor's dtype; leave out --dtype")
    folder = local_folder(model, options.revision, weights=not options.plan)
    if options.plan:
        from abliterate.apply.plan import plan_checkpoint

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
    recipe: Recipe, model: str, folder: Path, out: Path, options: ApplyOptions, reporter: Reporter
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


def _in_place(recipe: Recipe, folder: Path, options: ApplyOptions, reporter: Reporter) -> dict[str, Any]:
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


def _fingerprint(recipe: Recipe, options: ApplyOptions) -> str:
    """Says whether two applies are the same: their edits, and the options that change what is written."""
    edit = recipe.edit
    digest = hashlib.sha256(json.dumps([*edit.writers, options.norm_preserving, options.keep_tied]).encode())
    for tensor in (edit.directions, edit.strengths, *(s.vector for s in edit.shifts)):
        digest.update(tensor.contiguous().numpy().tobytes())
    digest.update(json.dumps([s.layer for s in edit.shifts]).encode())
    return digest.hexdigest()


def prepare(recipe: Recipe, folder: Path, options: ApplyOptions, *, source: str) -> Work:
    """Check everything but the config's hash (`check_config`) and work out every change; nothing is written.

    Args:
        source: the model's name for its card.

    Raises:
        ModelError, RecipeError, WriterError: see `apply_checkpoint`.
    """
    from abliterate.publish.applied_card import applied_card

    config = read_config(folder)
    checkpoint = open_checkpoint(folder)
    notes: list[str] = []
    stored = stored_parts(recipe, folder, config)
    changes, writers = _changes(recipe, checkpoint, stored, options, notes)
    for name, addition in _shift_additions(recipe, folder).items():
        old = changes.get(name, Change(0, None))
        changes[name] = Change(old.axis, old.factors, old.keep_norms, addition)
    names = tied_names(recipe, folder, config, set(checkpoint.files), set(changes))
    head_copy = None
    if names is not None and options.keep_tied:
        _keep_tied(checkpoint, changes, *names, notes)
    elif names is not None:
        head_copy = names if names[1] not in checkpoint.files else None
    outputs = {name: _output(shard, changes, head_copy) for name, shard in checkpoint.shards.items()}
    work = Work(checkpoint, outputs, writers=writers, tensors=len(changes), notes=notes)
    if names is not None and not options.keep_tied:
        work.untied = True
        work.texts["config.json"] = untied_config(config)
        notes.append(f"embedding and head were tied; the head is written as {names[1]}, unedited")
    if head_copy is not None and checkpoint.index is not None:
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


def stored_parts(recipe: Recipe, folder: Path, config: dict[str, Any]) -> dict[str, tuple[StoredTensor, ...]]:
    """The stored tensors of each writer that the edit touches.

    Raises:
        RecipeError: when the recipe doesn't fit the folder.
        ModelError: when it doesn't because the folder's weights are quantised.
    """
    from abliterate.stored import tensors_for

    parts = recipe.edit.parts
    if not parts:
        return {}
    try:
        found = tensors_for(recipe, folder)
    except (RecipeError, WriterError) as error:
        quantised = config.get("quantization_config")
        if isinstance(quantised, dict):
            method = quantised.get("quant_method", "unknown")
            raise ModelError(
                f"model folder {folder} is quantised ({method}) and its packed weights can't be edited "
                f"({shorten(str(error), 120)}); give the unquantised model, or a GGUF with --as gguf"
            ) from error
        raise
    missing = [name for name in parts if name not in found]
    if missing:
        raise RecipeError(f"the recipe doesn't say which tensors of a checkpoint {missing[0]} is, nor does the model")
    return {name: found[name] for name in parts}


def _changes(
    recipe: Recipe, checkpoint: Checkpoint, stored: dict[str, tuple[StoredTensor, ...]], options: ApplyOptions,
    notes: list[str],
) -> tuple[dict[str, Change], int]:  # fmt: skip
    """What is done to each stored tensor, and how many writers that is."""
    changes: dict[str, Change] = {}
    skipped = []
    for writer, part in recipe.edit.parts.items():
        packed = [t for t in stored[writer] if checkpoint.tensor(t.name).dtype not in EDITABLE]
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
            taken = factors(part, gain, tensor.gain.centred if tensor.gain else False)
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


def _gain(checkpoint: Checkpoint, tensor: StoredTensor) -> Tensor | None:
    """What the norm behind a tensor multiplies by, read from wherever it lies."""
    if tensor.gain is None:
        return None
    place = checkpoint.tensor(tensor.gain.name)
    if place.dtype not in EDITABLE:
        raise ModelError(f"{place.name} of {checkpoint.folder} is stored as {place.dtype}, which can't be read")
    return read_tensor(checkpoint, tensor.gain.name).double() + tensor.gain.plus


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of the checkpoint, in its own dtype."""
    place = checkpoint.tensor(name)
    raw = torch.empty(place.nbytes, dtype=torch.uint8)
    fd = os.open(checkpoint.shards[checkpoint.files[name]].path, os.O_RDONLY)
    try:
        read_into(fd, memoryview(raw.numpy()), place.start)  # type: ignore[arg-type]
    finally:
        os.close(fd)
    return raw.view(EDITABLE[place.dtype]).view(place.shape)


def _shift_additions(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """Stored bias -> what is added to it, so that it holds the edit's shifts.

    Raises:
        WriterError: when a block has no bias that can hold its shift; says which forms can.
    """
    if not recipe.edit.shifts:
        return {}
    from abliterate.apply.shifts import bias_additions
    from abliterate.stored import checkpoint_shapes, names_in, skeleton, stored_tensors
    from abliterate.writers import layout

    handle = skeleton(folder)
    owners = {id(p): name for name, p in handle.model.named_parameters()}
    known = stored_tensors(handle, names_in(handle.model, checkpoint_shapes(folder)))
    additions = {}
    for parameter, addition in bias_additions(handle, recipe.edit.shifts):
        name = owners[id(parameter)]
        writer = next(w for w in layout(handle).writers if name in (w.name, w.bias))
        entries = [t for t in known[writer.name] if t.bias or name == writer.name]
        if len(entries) != 1 or entries[0].shape != tuple(addition.shape):
            raise WriterError(
                f"{name}, which would hold the shift, is stored as {len(entries)} tensors in {folder}; "
                "these forms can hold it: adapter (with lora_bias), control-vector, hooks"
            )
        additions[entries[0].name] = addition.float()
    return additions


def tied_names(
    recipe: Recipe, folder: Path, config: dict[str, Any], there: set[str], changed: set[str]
) -> tuple[str, str] | None:
    """The stored names of embedding and head where they are one tensor that the edit touches, else None.

    A head that the checkpoint doesn't hold is tied; one that it holds is when the config says so, since loading then
    may tie it.
    """
    embedding, head = (recipe.model.get(key) for key in ("embedding", "head"))
    if embedding not in there:
        if not changed & _looks_like_embedding(there):
            return None
        from abliterate.stored import checkpoint_shapes, names_in, skeleton, stored_names

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
    if head in checkpoint.files and torch.equal(read_tensor(checkpoint, head), read_tensor(checkpoint, embedding)):
        changes[head] = changes[embedding]
    if head not in checkpoint.files or head in changes:
        notes.append("embedding and head stay tied, so the head is edited too (--keep-tied)")


def _output(shard: Shard, changes: dict[str, Change], head_copy: tuple[str, str] | None) -> Output:
    own = {name: changes[name] for name in shard.tensors if name in changes}
    if head_copy is None or head_copy[0] not in shard.tensors:
        return Output(shard, own)
    embedding = shard.tensors[head_copy[0]]
    copy = StoredRange(head_copy[1], embedding.dtype, embedding.shape, embedding.start, embedding.end)
    head, places = shard.with_tensors([copy])
    return Output(shard, own, head, ((places[copy.name], embedding),))


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


def check_config(recipe: Recipe, folder: Path, *, force: bool) -> None:
    """Raise RecipeError when the recipe was made for a model of another config (`recipe.check_model`)."""
    from abliterate.model import config_hash
    from abliterate.recipe import check_model

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


def untied_config(config: dict[str, Any]) -> bytes:
    """The config's JSON, saying that head and embedding are two tensors."""
    changed = {**config, "tie_word_embeddings": False}
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            changed[key] = {**config[key], "tie_word_embeddings": False}
    return _json(changed)


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
