"""The card of a model whose style was changed: a voice put in, or prose made plainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.cards.card import LICENCE_KEYS, find_upstream, result_rows
from abliterate.common.names import is_local, public_name

if TYPE_CHECKING:
    from abliterate.models.handle import Handle


def style_card(handle: Handle, document: dict[str, Any]) -> str:
    """The card's text.

    Args:
        handle: the original, for its licence.
        document: results.json of a run of a style.
    """
    import yaml

    model, recipe, behaviour = document["model"], document["recipe"], document["behaviour"]
    name, added = public_name(model["source"]), behaviour["sign"] == "add"
    upstream = find_upstream(handle.source, handle.revision)
    metadata: dict[str, Any] = {
        "base_model": upstream.pop("base_model", name) if is_local(model["source"]) else name,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["abliterate", f"behaviour-{behaviour['name']}"],
        **{key: value for key, value in upstream.items() if key in LICENCE_KEYS},
    }
    measure, environment = document["settings"]["measure"], document["environment"]
    lines = [
        "---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", "",
        f"# {Path(name).name}, {behaviour['name']} {'added' if added else 'removed'}", "",
        f"This is `{name}`" + (f" at revision `{model['revision']}`" if model["revision"] else "")
        + f" with a direction {'added to' if added else 'taken out of'} its residual stream: the one that tells how it "
        f"{behaviour['about']} from how it doesn't. Nothing was trained.", "",
        "## What was changed", "",
        *_changed(recipe), "",
        "## What it did", "",
        "| | original | edited |", "| --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in result_rows(document)), "",
        f"Greedy answers of at most {measure['max_new_tokens']} tokens. An answer is {behaviour['words']['shows']} by "
        f"the `{behaviour['judge']}` judge, which counts words and phrases: read its rates as those of its list. "
        "Divergence is KL(original || edited) in nats; a style that was asked for is itself a divergence. Intervals "
        "are 95% Wilson intervals. These prompts were used neither for finding nor for choosing the direction.", "",
        f"Made with abliterate {environment['abliterate']}, torch {environment['torch']}, transformers "
        f"{environment['transformers']}, seed {document['settings']['seed']}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _changed(recipe: dict[str, Any]) -> list[str]:
    direction = recipe["direction"]
    lines = [f"- direction: difference of means at layer {direction['layer']}, site `{direction['site']}`"]
    for shift in recipe["shifts"]:
        held = (
            f"; a bias holds it, which `{recipe['switch']}` in config.json gives the class" if recipe["switch"] else ""
        )
        lines.append(f"- {shift['size']:.4g} along it, added at the output of block {shift['layer']}{held}")
    if recipe["writers"]:
        lines.append(f"- taken out of {recipe['writers']} writers at strength {recipe['strength']['max']:g}")
    return [*lines, "- the recipe lies beside the model"]
