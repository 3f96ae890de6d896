"""Cards of recipes, of models they were applied to, of adapters and GGUF files; benchmark results on a card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ValidationError

from abliterate.cards.card import MEANING, Section, card, listed
from abliterate.cards.edit import place
from abliterate.cards.head import below, head, split
from abliterate.cards.tables import results_of
from abliterate.cards.words import span
from abliterate.common.errors import counted
from abliterate.common.names import is_local, public_name
from abliterate.measure.numbers import Candidate, Span

if TYPE_CHECKING:
    from abliterate.edit.recipe import Recipe

BENCHMARK = "<!-- benchmark -->"


def recipe_card(recipe: Recipe, file: str) -> str:
    """The card of a recipe that is shared alone.

    Args:
        recipe: its model and provenance say what the card tells.
        file: the recipe's name in the repository.
    """
    name = public_name(str(recipe.model.get("source") or "the model it was made for"))
    base = {"base_model": name} if "/" in name else {}
    revision = recipe.model.get("revision")
    return card(
        {**base, "library_name": "abliterate", "tags": ["abliterate", "abliterated", "recipe"]},
        f"Recipe for {Path(name).name}",
        [
            f"`{file}` is an edit for `{name}`" + (f" at revision `{revision}`" if revision else "")
            + ": which directions of the residual stream are taken out of which weights, and how much of each. "
            "It holds no weights of the model.",
            f"    abliterate apply {file} {name if base else 'MODEL'} --as checkpoint --out edited",
        ],
        [Section("What it changes", listed(recipe_items(recipe))), _measured(recipe.provenance), MEANING],
    )  # fmt: skip


class Applied(Protocol):
    """What was asked of an application: `apply.forms.ApplyOptions`."""

    @property
    def strength(self) -> float: ...
    @property
    def norm_preserving(self) -> bool: ...
    @property
    def skip_unsupported(self) -> bool: ...


def applied_card(recipe: Recipe, source: str, options: Applied, notes: list[str], existing: str | None) -> str:
    """README.md for a copy of a model that a recipe was applied to.

    Args:
        recipe: the edit that was applied; its provenance gives the numbers, if it has any and the edit is the very one.
        source: the model it was applied to.
        options: how.
        notes: what else was done or left.
        existing: the model's own README, kept below; its metadata (licence, language ...) is kept above.
    """
    as_measured = options.strength == 1 and not (options.norm_preserving or options.skip_unsupported)
    items = [
        *([] if options.strength == 1 else [f"applied at {options.strength:g} times the recipe's strengths"]),
        *(["the weights' columns keep their norms (Lai 2025)"] if options.norm_preserving else []),
        *notes,
    ]
    name = public_name(source)
    metadata, body = split(existing or "")
    if not is_local(source) and "/" in source:
        metadata |= {"base_model": name, "base_model_relation": "finetune"}
    tags = metadata.get("tags")
    tags = [*(tags if isinstance(tags, list) else []), "abliterate", "abliterated"]
    metadata["tags"] = list(dict.fromkeys(tags))
    metadata.setdefault("library_name", "transformers")
    learnt = _method(recipe.provenance) == "fit"
    how = "What to take out was learnt by gradients; no weight was trained." if learnt else "Nothing was trained."
    text = card(
        metadata,
        f"{Path(name).name}, abliterated",
        [f"This is `{name}` with directions taken out of the weights that write to its residual stream "
         f"(Arditi et al. 2024). {how}"],
        [
            Section("What was changed", listed([*recipe_items(recipe), *items])),
            _measured(recipe.provenance, "As measured when the recipe was made:") if as_measured else Section("", []),
            MEANING,
        ],
    )  # fmt: skip
    return below(text, name, body)


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
    untie = [
        "The base model's embedding is tied to its head. With the adapter attached, the head stays as it was. "
        "Merging it as it is would change the head too; untie first:",
        "",
        "    head = base.get_output_embeddings()",
        "    head.weight = torch.nn.Parameter(head.weight.detach().clone())",
        "    base.config.tie_word_embeddings = False",
    ]
    return card(
        metadata,
        f"{Path(base).name}, abliterated, as an adapter",
        [
            f"A LoRA of rank {rank} that takes a direction out of what `{base}` writes to its residual stream. "
            "No weight was trained: the factors are computed from the weights. Take it off and the base model is back.",
            f'    base = AutoModelForCausalLM.from_pretrained("{base}")\n'
            '    model = PeftModel.from_pretrained(base, "THIS_REPOSITORY")',
        ],
        [
            Section("What it changes", listed([*recipe_items(recipe), *notes])),
            Section("", untie if tied else []),
            _measured(recipe.provenance) if as_measured else Section("", []),
            MEANING,
        ],
    )


def gguf_card(path: Path, header: Mapping[str, Any]) -> str:
    """The card of a GGUF file, from its header: key -> value, None for an array."""
    repository = str(header.get("general.base_model.0.repo_url") or "").removeprefix("https://huggingface.co/")
    metadata: dict[str, Any] = {
        **({"base_model": repository, "base_model_relation": "quantized"} if repository.count("/") == 1 else {}),
        "library_name": "gguf",
        "tags": ["abliterate", "abliterated", "gguf"],
    }
    if header.get("general.license"):
        metadata["license"] = str(header["general.license"])
    told = [(key.removeprefix("abliterate."), value) for key, value in header.items() if key.startswith("abliterate.")]
    return card(
        metadata,
        f"{header.get('general.name') or path.stem}, abliterated, GGUF",
        [f"`{path.name}`: architecture `{header.get('general.architecture')}`, {len(header)} header fields, "
         f"{path.stat().st_size:,} bytes."],
        [Section("", listed(f"{k}: {v}" for k, v in told if v is not None and len(str(v)) < 200)), MEANING],
    )  # fmt: skip


def with_benchmark(text: str, model_index: list[dict[str, Any]], section: str) -> str:
    """A card with benchmark results in its head, which the Hub reads, and as a section; those it had are replaced.

    Args:
        text: README.md, with a YAML head or without.
        model_index: the Hub's `model-index`.
        section: Markdown, its heading included.
    """
    metadata, body = split(text)
    body = re.sub(rf"\n*{BENCHMARK}.*?{BENCHMARK}\n?", "\n", body, flags=re.DOTALL)
    top = head({**metadata, "model-index": model_index})
    return f"{top}\n{body.strip()}\n\n{BENCHMARK}\n{section.strip()}\n{BENCHMARK}\n"


def recipe_items(recipe: Recipe) -> list[str]:
    """What a recipe takes out and adds, as list items of a card."""
    edit, items = recipe.edit, []
    if edit.parts:
        used = edit.strengths[edit.strengths != 0]
        strength = span(Span(min=float(used.min()), max=float(used.max())))
        items.append(
            f"{counted(len(edit.parts), 'weight')}, {counted(len(edit.directions), 'direction')} of width "
            f"{edit.d_model}, strength {strength}"
        )
    items += [f"{shift.size:g} along a direction added at the output of block {shift.layer}" for shift in edit.shifts]
    try:
        found = Candidate.model_validate(recipe.provenance.get("found_at"))
    except ValidationError:  # provenance is free-form: another program may write other things
        return items
    if found.position is not None:
        learnt = _method(recipe.provenance) in ("fit", "tpe")
        items.append(f"{'the two sides part best' if learnt else 'found'} at {place(found)}")
    return items


def _method(provenance: dict[str, Any]) -> str | None:
    """How a recipe's maker searched, where it says so."""
    settings = provenance.get("settings")
    search = settings.get("search") if isinstance(settings, dict) else None
    return search.get("method") if isinstance(search, dict) else None


def _measured(provenance: dict[str, Any], intro: str | None = None) -> Section:
    """The numbers a recipe brings along; without lines where it brings none."""
    table = results_of(provenance)
    if table is None:
        return Section("", [])
    return Section("What it did", [*([intro, ""] if intro else []), *table.markdown()[:-1]])
