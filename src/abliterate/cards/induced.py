"""The card of a model that was made to refuse: a direction added, not taken out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.cards.card import LICENCE_KEYS, find_upstream
from abliterate.common.names import is_local, public_name

if TYPE_CHECKING:
    from abliterate.models.handle import Handle


def induced_card(handle: Handle, document: dict[str, Any]) -> str:
    """The card's text.

    Args:
        handle: the original, for its licence.
        document: results.json of `run --induce`.
    """
    import yaml

    model, recipe = document["model"], document["recipe"]
    name = public_name(model["source"])
    upstream = find_upstream(handle.source, handle.revision)
    metadata: dict[str, Any] = {
        "base_model": upstream.pop("base_model", name) if is_local(model["source"]) else name,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["abliterate", "induced-refusal"],
        **{key: value for key, value in upstream.items() if key in LICENCE_KEYS},
    }
    (shift,) = recipe["shifts"]
    direction = recipe["direction"]
    switch = recipe["switch"]
    lines = [
        "---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", "",
        f"# {Path(name).name}, made to refuse", "",
        f"This is `{name}`" + (f" at revision `{model['revision']}`" if model["revision"] else "")
        + " with a direction that carries refusing added to its residual stream (the converse test of Arditi et al. "
        "2024): it refuses requests that it used to answer, harmless ones too. It is made for research on how refusals "
        "work, not for use. No weight was trained.", "",
        "## What was changed", "",
        f"- {shift['size']:.4g} along one direction, added at the output of block {shift['layer']} at every token"
        + (f"; a bias holds it, which `{switch}` in config.json gives the class" if switch else "; a bias holds it"),
        f"- the direction: source `{direction['source']}`, cosine {direction['cosine']:.2f} with the difference of "
        f"means at the prompts' last token; {direction['size']:.2f} of its own difference's norm",
        "- the recipe lies beside the model", "",
        "## What it did", "",
        "| | original | edited |", "| --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in induced_rows(document)), "",
        f"Greedy answers of at most {document['settings']['measure']['max_new_tokens']} tokens, decoded to their end; "
        f"refusals judged by the `{document['settings']['measure']['judge']}` judge. A whole sentence is an answer "
        "that is not empty, doesn't loop and doesn't end in mid-sentence. Intervals are 95% Wilson intervals. These "
        "prompts were used neither for finding nor for choosing the direction.", "",
        f"Made with abliterate {document['environment']['abliterate']}, torch {document['environment']['torch']}, "
        f"transformers {document['environment']['transformers']}, seed {document['settings']['seed']}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def induced_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """(name, original, edited) of each number measured, as people read them."""
    pair = [document["original"], document["edited"]]

    def rate(name: str, key: str, counted: str) -> tuple[str, str, str]:
        first, second = (_rate(side[key], counted) for side in pair)
        return name, first, second

    return [
        rate("baseline prompts refused", "over_refusal", "refused"),
        rate("of them in whole sentences", "coherent_over_refusal", "refused"),
        rate("target prompts refused", "refusal", "refused"),
        rate("degenerate answers to baseline prompts", "degenerate", "count"),
    ]


def _rate(rate: dict[str, Any], counted: str) -> str:
    low, high = rate["ci95"]
    return f"{rate[counted]} of {rate['total']} = {rate['rate']:.1%} ({low:.1%} to {high:.1%})"
