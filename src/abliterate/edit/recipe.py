"""A recipe: an Edit in one small safetensors file, with where it comes from. The format: docs/recipe.md."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from abliterate.common.errors import RecipeError, shorten
from abliterate.common.files import whole_file
from abliterate.edit.edit import Edit, Shift
from abliterate.edit.stored_tensor import StoredTensor

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
    "embedding": (*_TEXT, True), "head": (*_TEXT, True), "weights_hash": (*_TEXT, True),
}  # fmt: skip
# Fields that differ between copies of one model (its path, its version of transformers, what baking itself changes).
_UNSHAPED = (
    "_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config",
    "tie_word_embeddings", "architectures", "use_cache",
)  # fmt: skip


@dataclass
class Recipe:
    """An edit and its provenance.

    Attributes:
        edit: what to take out of which writers, and what to add at which blocks.
        model: source, revision, class, config_hash, weights_hash, layers, d_model, tied, embedding, head of the
            model it was made for.
        provenance: prompts' hashes, settings, versions, numbers measured; free-form JSON.
        tensors: writer -> the tensors of a saved checkpoint that it is; empty where that isn't known
            (`recipes.tensors_for` makes them from a checkpoint).
    """

    edit: Edit
    model: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[StoredTensor, ...]] = field(default_factory=dict)


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write a recipe. The same recipe gives the same bytes: there is no time and no path of the output in it."""
    from safetensors.numpy import save_file

    edit = recipe.edit
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "writers": list(edit.writers),
        "model": recipe.model,
        "provenance": recipe.provenance,
    }
    tensors = {"directions": edit.directions, "strengths": edit.strengths}
    if recipe.tensors:
        document["tensors"] = {w: [t.to_json() for t in entries] for w, entries in recipe.tensors.items()}
    if edit.shifts:
        document["shift_layers"] = [shift.layer for shift in edit.shifts]
        tensors["shift_directions"] = np.stack([shift.direction for shift in edit.shifts])
        tensors["shift_sizes"] = np.array([shift.size for shift in edit.shifts], np.float32)
    with whole_file(path) as temporary:
        contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(contiguous, temporary, metadata={KEY: json.dumps(document, sort_keys=True)})


def recipe_file(path: str | os.PathLike[str]) -> Path:
    """The file meant by a recipe's path: of a folder that `run` wrote, the one in it."""
    return Path(path) / "recipe.safetensors" if Path(path).is_dir() else Path(path)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe, strictly.

    Args:
        path: the file, or the folder that `run` wrote.

    Raises:
        RecipeError: naming the rule of docs/recipe.md that the file breaks.
    """
    path = recipe_file(path)
    arrays, metadata = _read(path)
    try:
        document = _document(metadata)
    except ValueError as error:
        raise RecipeError(f"recipe {path}: rule 3: {error}") from error
    try:
        edit = _edit(document, arrays)
        _check_width(document, edit)
    except ValueError as error:
        raise RecipeError(f"recipe {path}: rule 4: {error}") from error
    try:
        stored = _stored(document, edit)
    except ValueError as error:
        raise RecipeError(f"recipe {path}: rule 5: {error}") from error
    return Recipe(edit, document["model"], document["provenance"], stored)


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


def config_hash(config: dict[str, Any]) -> str:
    """Sha256 (hex, 64 characters) of a config, without the fields that differ between copies of one model."""
    kept = {k: v for k, v in config.items() if k not in _UNSHAPED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file of modest size that holds a recipe's tensors."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise RecipeError(f"recipe {path} not found")
    if path.stat().st_size > MOST_BYTES:
        raise RecipeError(f"recipe {path} is {path.stat().st_size:,} bytes; rule 1: at most {MOST_BYTES:,}")
    try:
        with safe_open(str(path), framework="np") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            _check_kinds(path, kinds)
            arrays = {name: np.array(file.get_tensor(name), np.float32) for name in kinds}
            return arrays, file.metadata() or {}
    except PermissionError as error:
        raise RecipeError(f"recipe {path} can't be read: {error.strerror}") from error
    # a dtype that numpy has no name for, a shape too large for it ...: the reader has errors of many kinds
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise RecipeError(f"recipe {path} is not a whole safetensors file: {shorten(str(error))}; rule 1") from error


def _check_kinds(path: Path, kinds: dict[str, str]) -> None:
    """Names and dtypes are a recipe's."""
    if set(kinds) not in (TENSORS, TENSORS | SHIFT_TENSORS):
        raise RecipeError(
            f"recipe {path} holds tensors {sorted(kinds)}; rule 2: exactly directions and strengths, "
            "and with shifts shift_directions and shift_sizes"
        )
    wrong = [name for name, kind in kinds.items() if kind != "F32"]
    if wrong:
        raise RecipeError(f"recipe {path}: rule 2: all tensors are float32, {wrong[0]} is not")


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


def _edit(document: dict[str, Any], arrays: dict[str, np.ndarray]) -> Edit:
    layers = document.get("shift_layers", [])
    rows = arrays.get("shift_directions", np.zeros((0, 1), np.float32))
    sizes = arrays.get("shift_sizes", np.zeros(0, np.float32))
    if rows.ndim != 2 or sizes.ndim != 1 or not len(rows) == len(sizes) == len(layers):
        raise ValueError(f"shifts {rows.shape} and {sizes.shape} don't fit {len(layers)} layers")
    shifts = [Shift(layer, row, float(size)) for layer, row, size in zip(layers, rows, sizes, strict=True)]
    return Edit(tuple(document["writers"]), arrays["directions"], arrays["strengths"], tuple(shifts))


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
