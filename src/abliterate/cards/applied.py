"""The card of a model that a recipe was applied to: what was removed, by the recipe's own account."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.cards.card import MEANING, recipe_lines, result_rows
from abliterate.common.names import is_local, public_name

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions
    from abliterate.edit.recipe import Recipe

TAGS = ("abliterate", "abliterated")
_HEAD = re.compile(r"\ufeff?---\s*\n(.*?)\n---[^\n]*\n?", re.DOTALL)


def applied_card(recipe: Recipe, source: str, options: ApplyOptions, notes: list[str], existing: str | None) -> str:
    """README.md for an edited copy of a model.

    Args:
        recipe: the edit that was applied; its provenance gives the numbers, if it has any.
        source: the model it was applied to.
        options: how.
        notes: what else was done or left.
        existing: the model's own README, kept below; its metadata (licence, language ...) is kept above.
    """
    import yaml

    name = public_name(source)
    metadata, body = _split(existing or "")
    if not is_local(source) and "/" in source:
        metadata["base_model"] = name
        metadata["base_model_relation"] = "finetune"
    tags = metadata.get("tags")
    metadata["tags"] = list(dict.fromkeys([*(tags if isinstance(tags, list) else []), *TAGS]))
    metadata.setdefault("library_name", "transformers")
    lines = [
        "---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(), "---", "",
        f"# {Path(name).name}, abliterated", "",
        f"This is `{name}` with directions taken out of the weights that write to its residual stream "
        "(Arditi et al. 2024). Nothing was trained.", "",
        "## What was changed", "",
        *recipe_lines(recipe),
        *([f"- applied at {options.strength:g} times the recipe's strengths"] if options.strength != 1 else []),
        *(["- the weights' columns keep their norms (Lai 2025)"] if options.norm_preserving else []),
        *(f"- {note}" for note in notes), "",
        *_numbers(recipe.provenance, options),
        *MEANING,
    ]  # fmt: skip
    if body.strip():
        lines += [f"# The card of {name}", "", body.strip(), ""]
    return "\n".join(lines)


def _numbers(provenance: dict[str, Any], options: ApplyOptions) -> list[str]:
    """What the recipe's maker measured; nothing where the recipe brings no numbers, or they are of another edit."""
    if options.strength != 1 or options.norm_preserving or options.skip_unsupported:
        return []
    try:
        rows = result_rows({"original": provenance["original"], "edited": provenance["edited"]})
    except (KeyError, TypeError, ValueError):  # provenance is free-form
        return []
    table = ["| | original | edited |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    return ["## What it did", "", "As measured when the recipe was made:", "", *table, ""]


def _split(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text."""
    import yaml

    head = _HEAD.match(card)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}, card
    return (found, card[head.end() :]) if head and isinstance(found, dict) else ({}, card)
