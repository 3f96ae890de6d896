"""Find the direction that carries a behaviour in a language model, remove it, and prove what that did.

Example:
    >>> import abliterate as ab
    >>> h = ab.load("Qwen/Qwen3-0.6B")
    >>> prompts = ab.load_sides("bundled", "bundled")
    >>> acts = ab.collect(h, prompts.target.train, prompts.baseline.train)
    >>> r = ab.difference_of_means(acts).unit[14, 0, -1]
    >>> edit = ab.Edit.uniform(ab.find_writers(h), r, 1.0)
    >>> with edit.attached(h):
    ...     print(ab.measure(h, prompts.target.test, prompts.baseline.test).refusal)
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from abliterate.common.version import __version__ as __version__

# Where each public name lives: imported when first used, so that `--help` needs no torch.
_PUBLIC = {
    "AbliterateError": "common.errors",
    "Activations": "directions.activations",
    "Directions": "directions.means",
    "Edit": "edit.edit",
    "Examples": "search.examples",
    "FitSettings": "search.fit_settings",
    "Handle": "models.handle",
    "Measurement": "measure",
    "Recipe": "edit.recipe",
    "RunSettings": "settings.run",
    "Shift": "edit.edit",
    "Writer": "models.writers",
    "check_model": "edit.recipe",
    "collect": "directions.activations",
    "demo_model": "models.demo",
    "difference_of_means": "directions.means",
    "find_writers": "models.writers",
    "fit": "search.fit",
    "is_refusal": "measure.refusal",
    "load": "models.loading",
    "load_activations": "directions.activations_file",
    "load_recipe": "edit.recipe",
    "load_sides": "prompts.sets",
    "measure": "measure",
    "prove": "apply.proof",
    "recipe_for": "models.recipes",
    "run": "run.pipeline",
    "save_activations": "directions.activations_file",
    "save_recipe": "edit.recipe",
    "sweep": "search.sweep",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from abliterate.apply.proof import prove as prove
    from abliterate.common.errors import AbliterateError as AbliterateError
    from abliterate.directions.activations import Activations as Activations
    from abliterate.directions.activations import collect as collect
    from abliterate.directions.activations_file import load_activations as load_activations
    from abliterate.directions.activations_file import save_activations as save_activations
    from abliterate.directions.means import Directions as Directions
    from abliterate.directions.means import difference_of_means as difference_of_means
    from abliterate.edit.edit import Edit as Edit
    from abliterate.edit.edit import Shift as Shift
    from abliterate.edit.recipe import Recipe as Recipe
    from abliterate.edit.recipe import check_model as check_model
    from abliterate.edit.recipe import load_recipe as load_recipe
    from abliterate.edit.recipe import save_recipe as save_recipe
    from abliterate.measure import Measurement as Measurement
    from abliterate.measure import measure as measure
    from abliterate.measure.refusal import is_refusal as is_refusal
    from abliterate.models.demo import demo_model as demo_model
    from abliterate.models.handle import Handle as Handle
    from abliterate.models.loading import load as load
    from abliterate.models.recipes import recipe_for as recipe_for
    from abliterate.models.writers import Writer as Writer
    from abliterate.models.writers import find_writers as find_writers
    from abliterate.prompts.sets import load_sides as load_sides
    from abliterate.run.pipeline import run as run
    from abliterate.search.examples import Examples as Examples
    from abliterate.search.fit import fit as fit
    from abliterate.search.fit_settings import FitSettings as FitSettings
    from abliterate.search.sweep import sweep as sweep
    from abliterate.settings.run import RunSettings as RunSettings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'abliterate' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(f"abliterate.{_PUBLIC[name]}"), name)
    if not _PUBLIC[name].startswith(("common.", "settings.")):  # they need no torch
        import_module("abliterate.api")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """This package: `abliterate.measure` is the function, also once the folder of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
