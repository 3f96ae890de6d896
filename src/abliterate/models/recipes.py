"""Recipes and models: what a recipe says of the model at hand, and which tensors of a checkpoint its writers are."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from abliterate.common.errors import RecipeError
from abliterate.common.files import sha256_of
from abliterate.common.names import public_name
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe, config_hash
from abliterate.edit.stored_tensor import StoredTensor, misfit
from abliterate.models.handle import Handle
from abliterate.models.packed import checkpoint_shapes
from abliterate.models.stored import names_in, skeleton, stored_names, stored_tensors
from abliterate.models.writers import NO_WEIGHT, STREAM


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
    sources = None
    if not isinstance(model, Handle):
        handle = skeleton(model)
        sources = names_in(handle.model, checkpoint_shapes(model))
    else:
        handle = model
    handle.check_width(edit.d_model, "the edit's directions", RecipeError)
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


def config_file(source: str | os.PathLike[str]) -> dict[str, str]:
    """`config_file_hash` of a local model: where the file is the same, so is the config, and apply need not ask
    transformers."""
    file = Path(source).expanduser() / "config.json"
    return {"config_file_hash": config_hash(json.loads(file.read_text(encoding="utf-8")))} if file.is_file() else {}


def weights_hash(folder: str | os.PathLike[str]) -> str:
    """Sha256 (hex) over the names and hashes of a folder's safetensors files.

    A file of the Hub's cache is named by its hash and isn't read; others are read once a process.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    lines = (f"{file.name} {_file_hash(file.resolve(), file.stat().st_mtime_ns)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@cache
def _file_hash(file: Path, _changed: int) -> str:
    if file.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", file.name):
        return file.name
    return sha256_of(file)


def _renamed(edit: Edit, known: dict[str, tuple[StoredTensor, ...]], source: str) -> Edit:
    """The edit with its writers named as in memory; all the tensors of one writer, named alike, become that one."""
    rows = dict(zip(edit.writers, edit.strengths, strict=True))
    names = list(edit.writers)
    for writer, tensors in known.items():
        parts = [t.name for t in tensors if not t.bias]
        if len(parts) > 1 and all(p in rows and np.array_equal(rows[p], rows[parts[0]]) for p in parts):
            names[names.index(parts[0])] = writer
            rows[writer] = rows[parts[0]]
            names = [name for name in names if name not in parts]
    writers = resolved(names, known, source)
    if len(set(writers.values())) != len(writers):
        raise RecipeError("the edit names a writer twice, by its names in memory and in the checkpoint")
    strengths = np.stack([rows[name] for name in names]) if names else edit.strengths
    return Edit(tuple(writers[name] for name in names), edit.directions, strengths, edit.shifts)


def tensors_for(recipe: Recipe, folder: str | os.PathLike[str]) -> dict[str, tuple[StoredTensor, ...]]:
    """The tensors of a checkpoint folder that a recipe's writers are: names and shapes checked against its files.

    What the recipe says is taken where it fits; where it says nothing, or the folder names its tensors otherwise
    (GPT-2's have no prefix on the Hub), a skeleton of the folder's model says it. No weights are loaded.

    Args:
        recipe: of this model.
        folder: with config.json and safetensors files, or their index alone (then names are checked, not shapes).

    Raises:
        RecipeError: when the recipe names something that doesn't write to this model's stream, or the folder
            lacks a tensor or has it in another shape.
        ModelError: when the folder holds no config.json or no safetensors.
    """
    there = checkpoint_shapes(folder)
    if recipe.tensors and all(w in recipe.tensors for w in recipe.edit.writers) and not misfit(recipe.tensors, there):
        return recipe.tensors
    handle = skeleton(folder)
    handle.check_width(recipe.edit.d_model, "the recipe's directions", RecipeError)
    known = stored_tensors(handle, names_in(handle.model, there))
    found = {name: known[writer] for name, writer in resolved(recipe.edit.writers, known, handle.source).items()}
    problem = misfit(found, there)
    if problem:
        raise RecipeError(f"the recipe doesn't fit {handle.source}: {problem}; is it for another model?")
    return found


def resolved(names: Iterable[str], known: Mapping[str, Sequence[StoredTensor]], source: str) -> dict[str, str]:
    """The writer that each name means: a writer's own, or that of the one tensor it is in the checkpoint.

    Args:
        names: parameter or checkpoint names.
        known: the model's writers and their stored tensors.
        source: the model's name, for errors.

    Raises:
        RecipeError: on a name that is no writer (naming the nearest), or is only a part of one.
    """
    owners = {tensor.name: (writer, tensor) for writer, tensors in known.items() for tensor in tensors}
    found = {}
    for name in names:
        if name in known:
            found[name] = name
            continue
        if name.startswith(STREAM):
            raise RecipeError(f"{name} {NO_WEIGHT}")
        if name not in owners:
            near = difflib.get_close_matches(name, [*known, *owners], 3, 0.6)
            hint = f"near it: {', '.join(near)}" if near else "`abliterate inspect` lists those that do"
            raise RecipeError(f"{name} doesn't write to the stream of {source}; {hint}")
        writer, tensor = owners[name]
        weights = sum(not other.bias for other in known[writer])
        if tensor.bias:
            raise RecipeError(f"{name} is the bias of {writer} in {source} and is edited with it; name {writer}")
        if weights > 1:
            raise RecipeError(f"{name} is one of the {weights} tensors of {writer} in {source}; name {writer}")
        found[name] = writer
    return found
