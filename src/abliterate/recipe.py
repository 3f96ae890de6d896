"""A recipe: an Edit in one small safetensors file, with where it comes from. The format: docs/recipe.md."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from abliterate.edit import Edit, Shift
from abliterate.errors import RecipeError, shorten
from abliterate.files import whole_file

if TYPE_CHECKING:
    from abliterate.model import Handle
    from abliterate.stored import StoredTensor

SCHEMA = 1
KEY = "abliterate.recipe"
MOST_BYTES = 64 * 2**20
TENSORS = {"directions", "strengths"}
SHIFT_TENSORS = {"shift_directions", "shift_sizes"}

_TEXT: tuple[type, str] = (str, "a string")
_COUNT: tuple[type, str] = (int, "a positive integer")
# What a recipe says of its model, where it says it: (type, its name in errors, whether null will do).
_MODEL_FIELDS = {
    "source": (*_TEXT, True), "revision": (*_TEXT, True), "class": (*_TEXT, True), "config_hash": (*_TEXT, True),
    "layers": (*_COUNT, False), "d_model": (*_COUNT, False), "tied": (bool, "true or false", False),
    "embedding": (*_TEXT, True), "head": (*_TEXT, True),
}  # fmt: skip


@dataclass
class Recipe:
    """An edit and its provenance.

    Attributes:
        edit: what to take out of which writers, and what to add at which blocks.
        model: source, revision, class, config_hash, layers, d_model, tied, embedding, head of the model it was
            made for.
        provenance: prompts' hashes, settings, versions, numbers measured; free-form JSON.
        tensors: writer -> the tensors of a saved checkpoint that it is; empty where that isn't known
            (`stored.tensors_for` makes them from a checkpoint).
    """

    edit: Edit
    model: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[StoredTensor, ...]] = field(default_factory=dict)


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write a recipe. The same recipe gives the same bytes: there is no time and no path of the output in it."""
    from safetensors.torch import save_file

    edit = recipe.edit
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "writers": list(edit.writers),
        "model": recipe.model,
        "provenance": recipe.provenance,
    }
    tensors = {"directions": edit.directions.contiguous(), "strengths": edit.strengths.contiguous()}
    if recipe.tensors:
        document["tensors"] = {w: [t.to_json() for t in entries] for w, entries in recipe.tensors.items()}
    if edit.shifts:
        document["shift_layers"] = [shift.layer for shift in edit.shifts]
        tensors["shift_directions"] = torch.stack([shift.direction for shift in edit.shifts])
        tensors["shift_sizes"] = torch.tensor([shift.size for shift in edit.shifts])
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={KEY: json.dumps(document, sort_keys=True)})


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe, strictly.

    Raises:
        RecipeError: naming the rule of docs/recipe.md that the file breaks.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    if set(tensors) not in (TENSORS, TENSORS | SHIFT_TENSORS):
        raise RecipeError(
            f"recipe {path} holds tensors {sorted(tensors)}; rule 2: exactly directions and strengths, "
            "and with shifts shift_directions and shift_sizes"
        )
    wrong = [name for name, tensor in tensors.items() if tensor.dtype != torch.float32]
    if wrong:
        raise RecipeError(f"recipe {path}: rule 2: all tensors are float32, {wrong[0]} is not")
    try:
        document = _document(metadata)
    except ValueError as error:
        raise RecipeError(f"recipe {path}: rule 3: {error}") from error
    try:
        edit = _edit(document, tensors)
        _check_width(document, edit)
    except ValueError as error:
        raise RecipeError(f"recipe {path}: rule 4: {error}") from error
    try:
        stored = _stored(document, edit)
    except ValueError as error:
        raise RecipeError(f"recipe {path}: rule 5: {error}") from error
    return Recipe(edit, document["model"], document["provenance"], stored)


def recipe_for(edit: Edit, model: str | os.PathLike[str] | Handle | None = None) -> Recipe:
    """A recipe of an edit made by hand, for a model that isn't run.

    Args:
        edit: its writers named as in memory or as in the checkpoint.
        model: a folder (no weights are loaded) or a loaded handle; None leaves names, and what the recipe says of the
            model, to whoever applies it.

    Raises:
        RecipeError: when the edit has another width than the model, or names what doesn't write to its stream.
    """
    if model is None:
        return Recipe(edit)
    from abliterate.model import Handle
    from abliterate.publish.card import public_name
    from abliterate.stored import checkpoint_shapes, names_in, skeleton, stored_names, stored_tensors

    sources = None
    if not isinstance(model, Handle):
        handle = skeleton(model)
        sources = names_in(handle.model, checkpoint_shapes(model))
    else:
        handle = model
    if edit.d_model != handle.d_model:
        raise RecipeError(
            f"the edit's directions have {edit.d_model} entries, {handle.source} has d_model {handle.d_model}; "
            "is it for another model?"
        )
    beyond = [shift.layer for shift in edit.shifts if shift.layer >= handle.layers]
    if beyond:
        raise RecipeError(f"the edit shifts at layer {beyond[0]}, {handle.source} has layers 0 to {handle.layers - 1}")
    known = stored_tensors(handle, sources)
    renamed = _renamed(edit, known, handle.source)
    about = {
        "source": public_name(handle.source),
        "revision": handle.revision,
        "class": type(handle.model).__name__,
        "config_hash": handle.config_hash,
        "layers": handle.layers,
        "d_model": handle.d_model,
        **stored_names(handle, sources),
    }
    about |= config_file(handle.source)
    return Recipe(renamed, about, {}, {writer: known[writer] for writer in renamed.writers})


def config_file(source: str) -> dict[str, str]:
    """`config_file_hash` of a local model: where the file is the same, so is the config, and apply need not ask
    transformers."""
    from abliterate.model import config_hash

    file = Path(source).expanduser() / "config.json"
    return {"config_file_hash": config_hash(json.loads(file.read_text(encoding="utf-8")))} if file.is_file() else {}


def check_model(recipe: Recipe, config_hash: str, *, force: bool = False) -> None:
    """Raise RecipeError when a recipe was made for a model of another config.

    Args:
        recipe: one that says no config hash fits any model.
        config_hash: of the model at hand (`Handle.config_hash`).
        force: let it pass.
    """
    made_for = recipe.model.get("config_hash")
    if force or not made_for or made_for == config_hash:
        return
    name = recipe.model.get("source") or "another model"
    raise RecipeError(
        f"the recipe was made for {name} with config hash {shorten(made_for, 13)}, this model's is "
        f"{shorten(config_hash, 13)}; give the model it was made for, or --force to apply it all the same"
    )


def _renamed(edit: Edit, known: dict[str, tuple[StoredTensor, ...]], source: str) -> Edit:
    """The edit with its writers named as in memory; all the tensors of one writer, named alike, become that one."""
    from abliterate.stored import resolved

    rows = dict(zip(edit.writers, edit.strengths, strict=True))
    names = list(edit.writers)
    for writer, tensors in known.items():
        parts = [t.name for t in tensors if not t.bias]
        if len(parts) > 1 and all(p in rows and torch.equal(rows[p], rows[parts[0]]) for p in parts):
            names[names.index(parts[0])] = writer
            rows[writer] = rows[parts[0]]
            names = [name for name in names if name not in parts]
    writers = resolved(names, known, source)
    if len(set(writers.values())) != len(writers):
        raise RecipeError("the edit names a writer twice, by its names in memory and in the checkpoint")
    strengths = torch.stack([rows[name] for name in names]) if names else edit.strengths
    return Edit(tuple(writers[name] for name in names), edit.directions, strengths, edit.shifts)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file of modest size."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise RecipeError(f"recipe {path} not found")
    if path.stat().st_size > MOST_BYTES:
        raise RecipeError(f"recipe {path} is {path.stat().st_size:,} bytes; rule 1: at most {MOST_BYTES:,}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except PermissionError as error:
        raise RecipeError(f"recipe {path} can't be read: {error.strerror}") from error
    # a dtype that torch has no name for, a shape too large for it ...: the reader has errors of many kinds
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise RecipeError(f"recipe {path} is not a whole safetensors file: {shorten(str(error))}; rule 1") from error


def _document(metadata: dict[str, str]) -> dict[str, Any]:
    """The JSON of the metadata, its fields of the types they should be.

    Raises:
        ValueError: saying which is not.
    """
    if KEY not in metadata:
        raise ValueError(f"it has no '{KEY}' in its metadata")
    try:
        document = json.loads(metadata[KEY])
        json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair can't be printed
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata '{KEY}' is not JSON: {shorten(str(error))}") from error
    schema = document.get("schema") if isinstance(document, dict) else type(document).__name__
    if not isinstance(document, dict) or isinstance(schema, bool) or schema != SCHEMA:
        raise ValueError(f"schema is {shorten(str(schema))}; this version reads schema {SCHEMA}")
    if not _names(document.get("writers")):
        raise ValueError("writers is a list of parameter names")
    for name in ("model", "provenance"):
        if not isinstance(document.get(name), dict):
            raise ValueError(f"{name} is an object")
    for name, (kind, words, nullable) in _MODEL_FIELDS.items():
        value = document["model"].get(name, None if nullable else kind(1))
        wrong = type(value) is not kind or (isinstance(value, int) and kind is int and value < 1)
        if wrong and not (nullable and value is None):
            raise ValueError(f"model.{name} is {words}")
    layers = document.get("shift_layers", [])
    if not isinstance(layers, list) or not all(type(layer) is int and 0 <= layer < 10**6 for layer in layers):
        raise ValueError("shift_layers is a list of block indices")
    if not isinstance(document.get("tensors", {}), dict):
        raise ValueError("tensors is an object")
    return document


def _names(value: Any) -> bool:
    """Whether it is a list of names that can be shown."""
    return isinstance(value, list) and all(isinstance(name, str) and name.isprintable() for name in value)


def _edit(document: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
    layers = document.get("shift_layers", [])
    rows = tensors.get("shift_directions", torch.zeros(0, 1))
    sizes = tensors.get("shift_sizes", torch.zeros(0))
    if rows.ndim != 2 or sizes.ndim != 1 or not len(rows) == len(sizes) == len(layers):
        raise ValueError(f"shifts {tuple(rows.shape)} and {tuple(sizes.shape)} don't fit {len(layers)} layers")
    shifts = [Shift(layer, row, float(size)) for layer, row, size in zip(layers, rows, sizes, strict=True)]
    return Edit(tuple(document["writers"]), tensors["directions"], tensors["strengths"], tuple(shifts))


def _check_width(document: dict[str, Any], edit: Edit) -> None:
    width = document["model"].get("d_model", edit.d_model)
    if width != edit.d_model:
        raise ValueError(f"directions have {edit.d_model} entries, model.d_model is {width}")
    layers = document["model"].get("layers")
    if layers is not None and any(shift.layer >= layers for shift in edit.shifts):
        raise ValueError(f"a shift is beyond the model's {layers} layers")


def _stored(document: dict[str, Any], edit: Edit) -> dict[str, tuple[StoredTensor, ...]]:
    if "tensors" not in document:
        return {}
    from abliterate.stored import StoredTensor

    entries = document["tensors"]
    if set(entries) != set(edit.writers):
        raise ValueError("tensors has an entry for every writer, and no other")
    if not all(isinstance(found, list) and found for found in entries.values()):
        raise ValueError("an entry of tensors is a list with at least one tensor")
    stored = {writer: tuple(map(StoredTensor.from_json, entries[writer])) for writer in edit.writers}
    flat: Iterable[StoredTensor] = [tensor for found in stored.values() for tensor in found]
    seen: set[str] = set()
    for tensor in flat:
        if tensor.name in seen:
            raise ValueError(f"tensor {shorten(tensor.name)} belongs to two writers")
        if tensor.shape[tensor.axis] != edit.d_model:
            raise ValueError(f"{tensor.name} is {list(tensor.shape)}, not {edit.d_model} along dimension {tensor.axis}")
        seen.add(tensor.name)
    return stored
