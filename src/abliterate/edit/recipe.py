"""A recipe: an Edit in one small safetensors file, with where it comes from. The format: docs/recipe.md."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from abliterate.common.errors import RecipeError
from abliterate.common.files import whole_file
from abliterate.edit.edit import Edit, Shift
from abliterate.edit.recipe_file import KEY as KEY
from abliterate.edit.recipe_file import MOST_BYTES as MOST_BYTES
from abliterate.edit.recipe_file import SCHEMA, RecipeFile, read_recipe
from abliterate.edit.recipe_file import check_model as check_model

if TYPE_CHECKING:
    from abliterate.edit.stored_tensor import StoredTensor
    from abliterate.models.handle import Handle


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
    return from_arrays(read_recipe(path))


def from_arrays(recipe: RecipeFile) -> Recipe:
    """A recipe with its edit in torch."""
    edit = recipe.edit
    shifts = tuple(Shift(s.layer, torch.from_numpy(s.direction), s.size) for s in edit.shifts)
    tensors = Edit(edit.writers, torch.from_numpy(edit.directions), torch.from_numpy(edit.strengths), shifts)
    return Recipe(tensors, recipe.model, recipe.provenance, recipe.tensors)


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
    from abliterate.common.names import public_name
    from abliterate.models.handle import Handle
    from abliterate.models.stored import checkpoint_shapes, names_in, skeleton, stored_names, stored_tensors

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
    from abliterate.models.handle import config_hash

    file = Path(source).expanduser() / "config.json"
    return {"config_file_hash": config_hash(json.loads(file.read_text(encoding="utf-8")))} if file.is_file() else {}


def _renamed(edit: Edit, known: dict[str, tuple[StoredTensor, ...]], source: str) -> Edit:
    """The edit with its writers named as in memory; all the tensors of one writer, named alike, become that one."""
    from abliterate.models.stored import resolved

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
