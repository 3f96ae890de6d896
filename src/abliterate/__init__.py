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

__version__ = "0.1.0"

# Where each public name lives: imported when first used, so that `--help` needs no torch.
_PUBLIC = {
    "AbliterateError": "errors",
    "Activations": "activations",
    "Directions": "directions",
    "Edit": "edit",
    "Examples": "search.fit",
    "FitSettings": "search.fit",
    "Handle": "model",
    "Measurement": "measure",
    "Recipe": "recipe",
    "RunSettings": "settings",
    "Shift": "edit",
    "Writer": "writers",
    "check_model": "recipe",
    "collect": "activations",
    "demo_model": "demo",
    "difference_of_means": "directions",
    "find_writers": "writers",
    "fit": "search.fit",
    "is_refusal": "measure.refusal",
    "load": "loading",
    "load_activations": "activations_file",
    "load_recipe": "recipe",
    "load_sides": "prompts",
    "measure": "measure",
    "prove": "writers",
    "recipe_for": "recipe",
    "run": "pipeline",
    "save_activations": "activations_file",
    "save_recipe": "recipe",
    "sweep": "search.candidates",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from abliterate.activations import Activations as Activations
    from abliterate.activations import collect as collect
    from abliterate.activations_file import load_activations as load_activations
    from abliterate.activations_file import save_activations as save_activations
    from abliterate.demo import demo_model as demo_model
    from abliterate.directions import Directions as Directions
    from abliterate.directions import difference_of_means as difference_of_means
    from abliterate.edit import Edit as Edit
    from abliterate.edit import Shift as Shift
    from abliterate.errors import AbliterateError as AbliterateError
    from abliterate.loading import load as load
    from abliterate.measure import Measurement as Measurement
    from abliterate.measure import measure as measure
    from abliterate.measure.refusal import is_refusal as is_refusal
    from abliterate.model import Handle as Handle
    from abliterate.pipeline import run as run
    from abliterate.prompts import load_sides as load_sides
    from abliterate.recipe import Recipe as Recipe
    from abliterate.recipe import check_model as check_model
    from abliterate.recipe import load_recipe as load_recipe
    from abliterate.recipe import recipe_for as recipe_for
    from abliterate.recipe import save_recipe as save_recipe
    from abliterate.search.candidates import sweep as sweep
    from abliterate.search.fit import Examples as Examples
    from abliterate.search.fit import FitSettings as FitSettings
    from abliterate.search.fit import fit as fit
    from abliterate.settings import RunSettings as RunSettings
    from abliterate.writers import Writer as Writer
    from abliterate.writers import find_writers as find_writers
    from abliterate.writers import prove as prove


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'abliterate' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(f"abliterate.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """This package: `abliterate.measure` is the function, also once the folder of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PUBLIC and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
