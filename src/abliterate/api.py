"""The methods of `Edit` and `Handle` that need rooms above theirs: live and baked edits, and recipes.

The classes stand low in the house and import none of this. `abliterate` imports this module when a public name is first
used, and the methods are there; code inside the package calls the functions.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from typing import Any

from abliterate.apply import hooks, weights
from abliterate.common.reporting import Reporter, tell_by_default
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import load_recipe, save_recipe
from abliterate.models.handle import Handle
from abliterate.models.recipes import recipe_for


def save(edit: Edit, path: str | os.PathLike[str], model: Any = None) -> None:
    """Write the edit as a recipe (docs/recipe.md).

    Args:
        edit: the edit.
        path: the file to write.
        model: the model it is for, as a folder (its weights are not loaded) or a loaded handle. Writers may then
            be named as in memory or as in the checkpoint, and the recipe says which of the checkpoint's
            tensors they are. Without it the names are taken as they are.

    Raises:
        RecipeError: when a name is no writer of the model; the text names the nearest ones.
        OutputError: when the file can't be written.
    """
    save_recipe(recipe_for(edit, model), path)


def load(path: str | os.PathLike[str]) -> Edit:
    """Read the edit of a recipe.

    Raises:
        RecipeError: naming the rule of docs/recipe.md that the file breaks.
    """
    return load_recipe(path).edit


def attached(edit: Edit, handle: Handle) -> AbstractContextManager[Handle]:
    """Apply the edit to a loaded model, live, for as long as the context lasts."""
    return hooks.attached(handle, edit)


def bake(edit: Edit, handle: Handle, *, keep_tied: bool = False) -> None:
    """Change a loaded model's weights as the edit says.

    Args:
        edit: the edit.
        handle: the loaded model.
        keep_tied: edit a tied embedding and head together instead of untying them.
    """
    weights.bake(handle, edit, keep_tied=keep_tied)


def _notebook() -> Reporter:
    """Lines in the cell that runs."""
    from rich.console import Console

    from abliterate.commands.terminal import Terminal

    return Terminal(console=Console(highlight=False, soft_wrap=True))


if "ipykernel" in sys.modules:
    tell_by_default(_notebook)

for _name, _method in {"save": save, "load": staticmethod(load), "attached": attached, "bake": bake}.items():
    setattr(Edit, _name, _method)
for _name, _method in {"attached": hooks.attached, "bake": weights.bake}.items():
    setattr(Handle, _name, _method)
