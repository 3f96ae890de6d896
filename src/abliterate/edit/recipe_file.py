"""The strict reader of recipes (docs/recipe.md), on numpy arrays: what applies one to a checkpoint needs no torch.

Importing torch takes longer than copying some GiB. `recipe.load_recipe` makes an `Edit` of what is read here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from abliterate.common.errors import RecipeError, shorten
from abliterate.edit.stored_tensor import StoredTensor

if TYPE_CHECKING:
    from jaxtyping import Float

    from abliterate.edit.recipe import Recipe

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
# Fields that differ between copies of one model (its path, its version of transformers, what baking itself changes).
_UNSHAPED = (
    "_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config",
    "tie_word_embeddings", "architectures", "use_cache",
)  # fmt: skip


class ArrayPart(NamedTuple):
    """`edit.Part` in numpy: directions [k, d_model] and strengths [k], float32."""

    directions: Float[np.ndarray, "k d_model"]
    strengths: Float[np.ndarray, " k"]


@dataclass(frozen=True, eq=False)
class ArrayShift:
    """`edit.Shift` in numpy; checked as that is.

    Raises:
        ValueError: on a size that is not finite, or a direction that is not unit.
    """

    layer: int
    direction: Float[np.ndarray, " d_model"]
    size: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.size):
            raise ValueError("the size of a shift must be finite")
        _check_unit(self.direction[None])

    @property
    def vector(self) -> Float[np.ndarray, " d_model"]:
        """size * direction, float32."""
        return np.float32(self.size) * self.direction


@dataclass(frozen=True, eq=False)
class ArrayEdit:
    """`edit.Edit` in numpy: what an edit says, for those who apply it and calculate nothing else with it.

    Attributes:
        writers, directions [direction, d_model], strengths [writer, direction], shifts: as there, float32.

    Raises:
        ValueError: where an `Edit` would.
    """

    writers: tuple[str, ...]
    directions: Float[np.ndarray, "direction d_model"]
    strengths: Float[np.ndarray, "writer direction"]
    shifts: tuple[ArrayShift, ...] = ()

    def __post_init__(self) -> None:
        if self.directions.ndim != 2 or self.strengths.shape != (len(self.writers), len(self.directions)):
            raise ValueError(
                f"strengths {self.strengths.shape} don't fit {len(self.writers)} writers "
                f"and directions {self.directions.shape}"
            )
        if len(set(self.writers)) != len(self.writers):
            raise ValueError("a writer is named twice")
        if not np.isfinite(self.strengths).all():
            raise ValueError("strengths must be finite")
        _check_unit(self.directions)
        for shift in self.shifts:
            if len(shift.direction) != self.d_model:
                raise ValueError(
                    f"a shift of width {len(shift.direction)} doesn't fit directions {self.directions.shape}"
                )
        for part in self.parts.values():
            wide = part.directions.astype(np.float64)
            if np.abs(wide @ wide.T - np.eye(len(wide))).max() > 1e-4:
                raise ValueError("directions of one writer must be orthogonal to each other")

    @property
    def d_model(self) -> int:
        """Width of the model the edit is for."""
        return int(self.directions.shape[1])

    @property
    def parts(self) -> dict[str, ArrayPart]:
        """What the edit does at each writer, directions with strength zero left out."""
        used = {}
        for name, row in zip(self.writers, self.strengths, strict=True):
            kept = row.nonzero()[0]
            if len(kept):
                used[name] = ArrayPart(self.directions[kept], row[kept])
        return used

    def __mul__(self, factor: float) -> ArrayEdit:
        shifts = tuple(ArrayShift(s.layer, s.direction, s.size * float(factor)) for s in self.shifts)
        return ArrayEdit(self.writers, self.directions, self.strengths * np.float32(factor), shifts)


@dataclass
class RecipeFile:
    """What a recipe file says; `recipe.Recipe` with arrays for tensors.

    Attributes:
        edit, model, provenance, tensors: as there.
    """

    edit: ArrayEdit
    model: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[StoredTensor, ...]] = field(default_factory=dict)


def as_arrays(recipe: Recipe | RecipeFile) -> RecipeFile:
    """A recipe with its edit in numpy; the arrays share the tensors' memory."""
    if isinstance(recipe, RecipeFile):
        return recipe
    edit = recipe.edit
    shifts = tuple(ArrayShift(s.layer, s.direction.numpy(), s.size) for s in edit.shifts)
    arrays = ArrayEdit(edit.writers, edit.directions.numpy(), edit.strengths.numpy(), shifts)
    return RecipeFile(arrays, recipe.model, recipe.provenance, recipe.tensors)


def read_recipe(path: str | os.PathLike[str]) -> RecipeFile:
    """Read a recipe, strictly.

    Raises:
        RecipeError: naming the rule of docs/recipe.md that the file breaks.
    """
    path = Path(path)
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
    return RecipeFile(edit, document["model"], document["provenance"], stored)


def check_model(recipe: Recipe | RecipeFile, config_hash: str, *, force: bool = False) -> None:
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


def _edit(document: dict[str, Any], arrays: dict[str, np.ndarray]) -> ArrayEdit:
    layers = document.get("shift_layers", [])
    rows = arrays.get("shift_directions", np.zeros((0, 1), np.float32))
    sizes = arrays.get("shift_sizes", np.zeros(0, np.float32))
    if rows.ndim != 2 or sizes.ndim != 1 or not len(rows) == len(sizes) == len(layers):
        raise ValueError(f"shifts {rows.shape} and {sizes.shape} don't fit {len(layers)} layers")
    shifts = [ArrayShift(layer, row, float(size)) for layer, row, size in zip(layers, rows, sizes, strict=True)]
    return ArrayEdit(tuple(document["writers"]), arrays["directions"], arrays["strengths"], tuple(shifts))


def _check_unit(rows: Float[np.ndarray, "n d_model"]) -> None:
    """Raise ValueError unless all rows are finite and of length 1."""
    if not np.isfinite(rows).all():
        raise ValueError("directions must be finite")
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    if len(norms) and np.abs(norms - 1).max() > 1e-4:
        worst = norms[np.abs(norms - 1).argmax()]
        raise ValueError(f"directions must be unit vectors, found one of norm {worst:.4f}")


def _check_width(document: dict[str, Any], edit: ArrayEdit) -> None:
    width = document["model"].get("d_model", edit.d_model)
    if width != edit.d_model:
        raise ValueError(f"directions have {edit.d_model} entries, model.d_model is {width}")
    layers = document["model"].get("layers")
    if layers is not None and any(shift.layer >= layers for shift in edit.shifts):
        raise ValueError(f"a shift is beyond the model's {layers} layers")


def _stored(document: dict[str, Any], edit: ArrayEdit) -> dict[str, tuple[StoredTensor, ...]]:
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
