"""A behaviour's measured prompts: the user's where given, else the behaviour's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abliterate.common.errors import PromptError, shorten
from abliterate.prompts.behaviour import Behaviour
from abliterate.prompts.sets import Sides, load_one_set, load_sides, normalise
from abliterate.settings.run import PromptSettings


def behaviour_sides(behaviour: Behaviour, settings: PromptSettings, seed: int) -> Sides:
    """Both sides' prompts; for a behaviour of one set, that set twice.

    Raises:
        PromptError: a source can't be read, or a prompt of the answer pairs is measured too.
    """
    own, limits = behaviour.definition.prompts, _limits(settings)
    if own.both is not None:
        if settings.baseline is not None:
            raise PromptError(f"behaviour {behaviour.name} has one set of prompts; give yours with --target alone")
        sides = load_one_set(
            settings.target or _source(behaviour, own.both) or (), column=settings.target_column, seed=seed, **limits
        )
    else:
        sides = load_sides(
            settings.target or _source(behaviour, own.target),
            settings.baseline or _source(behaviour, own.baseline),
            target_column=settings.target_column or (None if settings.target else own.target_column),
            baseline_column=settings.baseline_column or (None if settings.baseline else own.baseline_column),
            seed=seed,
            **limits,
        )
    _check_apart(behaviour, sides)
    return sides


def _limits(settings: PromptSettings) -> dict[str, Any]:
    return {
        "limit_train": settings.train_prompts,
        "limit_validation": settings.validation_prompts,
        "limit_test": settings.test_prompts,
    }


def _source(behaviour: Behaviour, source: str | tuple[str, ...] | None) -> str | Sequence[str] | None:
    """A source as the file names it; a file beside the TOML file is found there."""
    if not isinstance(source, str):
        return source
    beside = behaviour.folder / source
    return str(beside) if beside.is_file() else source


def _check_apart(behaviour: Behaviour, sides: Sides) -> None:
    """Raise when the direction would be made of a prompt on which it is measured."""
    contrasted = {normalise(text) for text in behaviour.own_prompts}
    for side in (sides.target, sides.baseline):
        for part in (side.validation, side.test):
            for text in part:
                if normalise(text) in contrasted:
                    raise PromptError(
                        f"prompt '{shorten(text)}' makes the contrast of {behaviour.source} and is measured too, in "
                        f"{part.source}; keep it in one"
                    )
