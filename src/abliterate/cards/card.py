"""The model card: what was done, to what, with which prompts, and the numbers; as text and as Hub metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.common.names import is_local, public_name

if TYPE_CHECKING:
    from abliterate.edit.recipe import Recipe
    from abliterate.models.handle import Handle

LICENCE_KEYS = ("license", "license_name", "license_link")
TIED = {
    "kept": "embedding and head stay tied, so the head is edited with the embedding",
    "untied": "the embedding, tied to the head in the base model, is untied: it is edited and the head is not",
}

MEANING = (
    "## What this means for you",
    "",
    "A learnt guardrail was removed: the model answers requests that its makers had it refuse, also harmful "
    "ones, and says nothing of the risk. Guardrails are now yours to provide. The base model's licence and "
    "terms still hold.",
    "",
)


def write_card(path: Path, handle: Handle, document: dict[str, Any]) -> None:
    """Write README.md for the saved model."""
    path.write_text(card(handle, document), encoding="utf-8")


def card(handle: Handle, document: dict[str, Any]) -> str:
    """The card's text.

    Args:
        handle: the original, for its licence.
        document: results.json.
    """
    model, recipe = document["model"], document["recipe"]
    name = public_name(model["source"])
    upstream = find_upstream(handle.source, handle.revision)
    metadata: dict[str, Any] = {
        "base_model": upstream.pop("base_model", name) if is_local(model["source"]) else name,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["abliterate", "abliterated"],
        **{key: value for key, value in upstream.items() if key in LICENCE_KEYS},
    }
    direction = recipe["direction"]
    tied = TIED.get(recipe.get("tied"))
    lines = [
        *_head(metadata),
        f"# {Path(name).name}, abliterated",
        "",
        f"This is `{name}`"
        + (f" at revision `{model['revision']}`" if model["revision"] else "")
        + f" with the direction that carries {_carried(document)} taken out of the weights that write to its residual "
        "stream (Arditi et al. 2024). Nothing was trained.",
        "",
        "## What was changed",
        "",
        f"- direction: difference of means at layer {direction['layer']}, site `{direction['site']}`, "
        f"position {direction['position']}{_second(direction)}; method `{recipe['method']}`",
        f"- {recipe['writers']} writers, strength {_span(recipe['strength'])}; the recipe lies beside the model",
        f"- proof: largest component of a direction left in the stream when every writer is edited: "
        f"{recipe['proof']['writers']['component']:.1e}; of this direction in this model: "
        f"{recipe['proof']['edited']['component']:.1e} at {recipe['proof']['edited']['where']}",
        *([f"- {tied}"] if tied else []),
        "",
        "## What it did",
        "",
        _table(document),
        "",
        f"Greedy answers of at most {document['settings']['measure']['max_new_tokens']} tokens; refusals judged by the "
        f"`{document['settings']['measure']['judge']}` judge; divergence is KL(original || edited) in nats on baseline "
        "prompts that the original answers. Intervals are 95% Wilson intervals. These prompts were used neither for "
        "finding nor for choosing the direction.",
        "",
        "## Prompts",
        "",
        *(_prompts(side, document["prompts"][side]) for side in ("target", "baseline")),
        "",
        *_meaning(document),
        f"Made with abliterate {document['environment']['abliterate']}, torch {document['environment']['torch']}, "
        f"transformers {document['environment']['transformers']}, seed {document['settings']['seed']}.",
        "",
    ]
    return "\n".join(lines)


def _carried(document: dict[str, Any]) -> str:
    behaviour = document.get("behaviour") or {"name": "refusal"}
    return "refusing" if behaviour["name"] == "refusal" else f"`{behaviour['name']}` (it {behaviour['about']})"


def _meaning(document: dict[str, Any]) -> Sequence[str]:
    """What the change means: of a guardrail, or of any other behaviour."""
    behaviour = document.get("behaviour") or {"name": "refusal"}
    if behaviour["name"] == "refusal":
        return MEANING
    return (
        "## What this means for you", "",
        f"The model's answers are no longer {behaviour['words']['shows']} as the base model's were, as far as the "
        "table shows; other behaviour may have moved with it. The base model's licence and terms still hold.", "",
    )  # fmt: skip


def healed_card(handle: Handle, document: dict[str, Any]) -> str:
    """The card of a healed model: what was taken out, how it was trained back, and the numbers of all three.

    Args:
        handle: the healed model, for the licence that its source names.
        document: results.json of `abliterate heal`.
    """
    model, heal, recipe = document["model"], document["heal"], document.get("recipe")
    source = heal["original"] or heal["model"]
    name = public_name(source)
    upstream = find_upstream(source, model["revision"] if heal["original"] else None)
    metadata: dict[str, Any] = {
        "base_model": upstream.pop("base_model", name) if is_local(source) else name,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["abliterate", "abliterated", "healed"],
        **{key: value for key, value in upstream.items() if key in LICENCE_KEYS},
    }
    measure, environment = document["settings"]["measure"], document["environment"]
    lines = [
        *_head(metadata),
        f"# {Path(name).name}, abliterated and healed",
        "",
        f"This is `{name}` with the direction that carries refusing taken out of its weights (Arditi et al. 2024), and "
        "then trained to win back the quality which that cost.",
        "",
        "## What was changed",
        "",
        *(_edit_lines(recipe) if recipe else [f"- the edited model: `{public_name(heal['model'])}`"]),
        *healing_lines(heal),
        "",
        "## What it did",
        "",
        _table(document),
        "",
        f"Greedy answers of at most {measure['max_new_tokens']} tokens; refusals judged by the `{measure['judge']}` "
        "judge; divergence is KL(original || model) in nats on baseline prompts that the original answers. Intervals "
        "are 95% Wilson intervals. These prompts were used neither for finding the direction nor for training.",
        "",
        "## Prompts",
        "",
        *(_prompts(side, document["prompts"][side]) for side in ("target", "baseline")),
        "",
        *MEANING,
        f"Made with abliterate {environment['abliterate']}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}, seed {document['settings']['seed']}.",
        "",
    ]
    return "\n".join(lines)


def _edit_lines(recipe: dict[str, Any]) -> list[str]:
    direction = recipe["direction"]
    return [
        f"- direction: difference of means at layer {direction['layer']}, site `{direction['site']}`, position "
        f"{direction['position']}{_second(direction)}; method `{recipe['method']}`",
        f"- {recipe['writers']} writers, strength {_span(recipe['strength'])}",
    ]


def healing_lines(heal: dict[str, Any]) -> list[str]:
    """How a model was healed, as list items of a card.

    Args:
        heal: that object of results.json.
    """
    used = heal["settings"]
    lora = f"LoRA of rank {used['rank']}, alpha {used['alpha']:g}, merged; it lies beside the model in `adapter/`"
    rate = f"learning rate {used['learning_rate']:g}, {heal['steps']} steps"
    if heal["preset"] == "self":
        how = (
            f"- healed by the original model's teaching: its distributions along its own answers to {heal['lessons']} "
            f"training baseline prompts, its refusals of {heal['held_away']} prompts held away"
        )
    else:
        data = heal.get("data") or {}
        pairs = f" ({data['train']} pairs)" if data.get("train") else ""
        how = f"- healed by preference tuning (DPO, Rafailov et al. 2023) on `{public_name(used['data'])}`{pairs}"
    return [how, f"- {lora}; {rate}"]


def recipe_card(recipe: Recipe, file: str) -> str:
    """The card of a recipe that is shared alone.

    Args:
        recipe: its model and provenance say what the card tells.
        file: the recipe's name in the repository.
    """
    source = str(recipe.model.get("source") or "the model it was made for")
    name = public_name(source)
    base = {"base_model": name} if "/" in name else {}
    lines = [
        *_head({**base, "library_name": "abliterate", "tags": ["abliterate", "abliterated", "recipe"]}),
        f"# Recipe for {Path(name).name}",
        "",
        f"`{file}` is an edit for `{name}`"
        + (f" at revision `{recipe.model['revision']}`" if recipe.model.get("revision") else "")
        + ": which directions of the residual stream are taken out of which weights, and how much of each. "
        "It holds no weights of the model.",
        "",
        f"    abliterate apply {file} {name if base else 'MODEL'} --as checkpoint --out edited",
        "",
        "## What it changes",
        "",
        *recipe_lines(recipe),
        "",
        *_measured(recipe.provenance),
        *MEANING,
    ]
    return "\n".join(lines)


def recipe_lines(recipe: Recipe) -> list[str]:
    """What a recipe takes out and adds, as list items of a card."""
    edit, lines = recipe.edit, []
    if edit.parts:
        used = edit.strengths[edit.strengths != 0]
        strength = _span({"min": float(used.min()), "max": float(used.max())})
        lines.append(
            f"- {_count(len(edit.parts), 'weight')}, {_count(len(edit.directions), 'direction')} of width "
            f"{edit.d_model}, strength {strength}"
        )
    lines += [f"- {shift.size:g} along a direction added at the output of block {shift.layer}" for shift in edit.shifts]
    found = recipe.provenance.get("found_at")
    if isinstance(found, dict) and {"layer", "site", "position"} <= found.keys():
        lines.append(
            f"- found at layer {found['layer']}, site `{found['site']}`, position {found['position']}{_second(found)}"
        )
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _measured(provenance: dict[str, Any]) -> list[str]:
    """The numbers a recipe brings along, as a section; nothing where it brings none."""
    if not all(isinstance(provenance.get(key), dict) for key in ("original", "edited")):
        return []
    try:
        return ["## What it did", "", _table(provenance), ""]
    except (KeyError, TypeError):  # provenance is free-form: another program may write other numbers
        return []


def gguf_card(path: Path, header: Mapping[str, Any]) -> str:
    """The card of a GGUF file, from its header: key -> value, None for an array."""
    name = str(header.get("general.name") or path.stem)
    repository = str(header.get("general.base_model.0.repo_url") or "").removeprefix("https://huggingface.co/")
    metadata: dict[str, Any] = {
        **({"base_model": repository, "base_model_relation": "quantized"} if repository.count("/") == 1 else {}),
        "library_name": "gguf",
        "tags": ["abliterate", "abliterated", "gguf"],
    }
    if header.get("general.license"):
        metadata["license"] = str(header["general.license"])
    told = [(key.removeprefix("abliterate."), value) for key, value in header.items() if key.startswith("abliterate.")]
    lines = [
        *_head(metadata),
        f"# {name}, abliterated, GGUF",
        "",
        f"`{path.name}`: architecture `{header.get('general.architecture')}`, "
        f"{len(header)} header fields, {path.stat().st_size:,} bytes.",
        "",
        *(f"- {key}: {shown}" for key, shown in told if shown is not None and len(str(shown)) < 200),
        *([""] if told else []),
        *MEANING,
    ]
    return "\n".join(lines)


def adapter_card(recipe: Recipe, base: str, notes: list[str], rank: int, *, tied: bool, as_measured: bool) -> str:
    """The card of a PEFT adapter that holds a recipe's edit.

    Args:
        recipe: the edit.
        base: the base model as others know it (Hub id or name).
        notes: what the adapter leaves out or only approximates.
        rank: the largest rank of its factors.
        tied: whether it edits an embedding that the base model shares with its head.
        as_measured: whether it is the very edit that the recipe's numbers are of.
    """
    metadata: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "adapter"} if "/" in base else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["abliterate", "abliterated", "lora"],
    }
    lines = [
        *_head(metadata),
        f"# {Path(base).name}, abliterated, as an adapter",
        "",
        f"A LoRA of rank {rank} that takes a direction out of what `{base}` writes to its residual stream. "
        "Nothing was trained: the factors are computed from the weights. Take it off and the base model is back.",
        "",
        f'    base = AutoModelForCausalLM.from_pretrained("{base}")',
        '    model = PeftModel.from_pretrained(base, "THIS_REPOSITORY")',
        "",
        "## What it changes",
        "",
        *recipe_lines(recipe),
        *(f"- {note}" for note in notes),
        "",
        *(
            [
                "The base model's embedding is tied to its head. With the adapter attached, the head stays as it was. "
                "Merging it as it is would change the head too; untie first:",
                "",
                "    head = base.get_output_embeddings()",
                "    head.weight = torch.nn.Parameter(head.weight.detach().clone())",
                "    base.config.tie_word_embeddings = False",
                "",
            ]
            if tied
            else []
        ),
        *(_measured(recipe.provenance) if as_measured else []),
        *MEANING,
    ]
    return "\n".join(lines)


def _head(metadata: dict[str, Any]) -> list[str]:
    """The YAML head of a card, which the Hub reads."""
    import yaml

    return ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", ""]


BENCHMARK = "<!-- benchmark -->"


def with_benchmark(card: str, model_index: list[dict[str, Any]], section: str) -> str:
    """A card with benchmark results in its head, which the Hub reads, and as a section; those it had are replaced.

    Args:
        card: README.md, with a YAML head or without.
        model_index: the Hub's `model-index`.
        section: Markdown, its heading included.
    """
    body = re.sub(r"\A\ufeff?---\s*\n.*?\n---[^\S\n]*\n?", "", card, count=1, flags=re.DOTALL)
    body = re.sub(rf"\n*{BENCHMARK}.*?{BENCHMARK}\n?", "\n", body, flags=re.DOTALL)
    head = "\n".join(_head({**_metadata(card), "model-index": model_index}))
    return f"{head}\n{body.strip()}\n\n{BENCHMARK}\n{section.strip()}\n{BENCHMARK}\n"


def find_upstream(source: str, revision: str | None = None) -> dict[str, Any]:
    """What the base model says of itself: licence, and for a local copy the model it is of; empty when unknown.

    Read from its own card, or from its GGUF header.
    """
    path = Path(source).expanduser()
    if path.is_dir() and (path / "README.md").is_file():
        text = (path / "README.md").read_text(encoding="utf-8", errors="replace")
    elif path.is_file():
        return _gguf_licence(path)
    elif path.exists():
        return {}
    else:
        text = _hub_card(source, revision)
    metadata = _metadata(text)
    return {key: metadata[key] for key in (*LICENCE_KEYS, "base_model") if metadata.get(key)}


def _metadata(card: str) -> dict[str, Any]:
    """The YAML head of a card; empty when there is none or it can't be read."""
    import yaml

    head = re.match(r"\ufeff?---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _gguf_licence(path: Path) -> dict[str, str]:
    from gguf import GGUFReader

    field = GGUFReader(str(path)).get_field("general.license")
    return {"license": str(field.contents())} if field else {}


def _hub_card(source: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(source, "README.md", revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return ""  # no card, or no network: the licence is unknown, and the card leaves it out
    return Path(file).read_text(encoding="utf-8", errors="replace")


def _second(direction: dict[str, Any]) -> str:
    second = direction.get("second")
    return f", with layer {second['layer']} `{second['site']}` position {second['position']}" if second else ""


def _span(strength: dict[str, float]) -> str:
    low, high = strength["min"], strength["max"]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _prompts(side: str, sets: dict[str, Any]) -> str:
    counts = ", ".join(f"{sets[name]['count']} {name}" for name in ("train", "validation", "test"))
    return f"- {side}: `{sets['source']}` ({counts}; test set sha256 `{sets['test']['sha256'][:16]}`)"


STATES = ("original", "edited", "healed")


def _table(document: dict[str, Any]) -> str:
    states = measured_states(document)
    rows = ["| | " + " | ".join(states) + " |", "| --- |" + " --- |" * len(states)]
    return "\n".join([*rows, *(f"| {' | '.join(row)} |" for row in result_rows(document))])


def measured_states(document: dict[str, Any]) -> list[str]:
    """The models that a results.json has numbers of: original, edited, healed."""
    return [state for state in STATES if document.get(state)]


def result_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """(name, a value for each of `measured_states`) of each number measured, as people read them."""
    measured = {state: document[state] for state in measured_states(document)}

    def rates(name: str, key: str, counted: str) -> tuple[str, ...]:
        return name, *(_rate(found[key], counted) for found in measured.values())

    def divergences(name: str, key: str) -> tuple[str, ...]:
        return name, *(_divergence(state, found["divergence"], key) for state, found in measured.items())

    return [
        *_behaviour_rows(document, measured, rates),
        divergences("divergence, first token", "first_token"),
        divergences("divergence, along answers", "answer"),
        rates("degenerate answers", "degenerate", "count"),
        ("loss on the original's answers", *(f"{m['loss']['baseline_answers']:.3f}" for m in measured.values())),
    ]


def _behaviour_rows(
    document: dict[str, Any], measured: dict[str, Any], rates: Callable[[str, str, str], tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Rows of how often the behaviour shows, in its own words; a style's with the coherent share and its score."""
    behaviour = document.get("behaviour") or {}
    words = behaviour.get("words") or {"rate": "refusals", "over": "over-refusals"}
    rows = [rates(words["rate"], "refusal", "refused")]
    if all("coherent" in found for found in measured.values()):
        rows.append(rates("of them not degenerate", "coherent", "refused"))
        rows.append(("mean score per 100 words", *(f"{found['score']['target']:.2f}" for found in measured.values())))
    if not behaviour.get("one_set"):
        rows.append(rates(words["over"], "over_refusal", "refused"))
    return rows


def _divergence(state: str, divergence: dict[str, float] | None, key: str) -> str:
    if divergence:
        return f"{divergence[key]:.3f}"
    return "0" if state == "original" else "-"


def _rate(rate: dict[str, Any], counted: str) -> str:
    low, high = rate["ci95"]
    return f"{rate[counted]} of {rate['total']} = {rate['rate']:.1%} ({low:.1%} to {high:.1%})"
