"""The model card: what was done, to what, with which prompts, and the numbers; as text and as Hub metadata.

One template, `card`: a head, a title, what it is in a sentence, and sections. What a run, a healing or `--induce` made
differs in the sections that `model_card` chooses from the document.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from abliterate.cards.also import also_notes
from abliterate.cards.edit import directions, how_found, how_healed, was_learnt, what_changed, what_is_left
from abliterate.cards.head import below, find_upstream, head, of_model
from abliterate.cards.tables import results
from abliterate.cards.verdicts import verdicts
from abliterate.common.names import is_demo, public_name
from abliterate.measure.document import RunDocument

HASH = 16  # digits shown
INTERVALS = "Intervals are 95% Wilson intervals."
UNTOUCHED = "These prompts were used neither for finding nor for choosing the direction."


GUARDED = (
    "That base is itself no release: it is SmolLM2-135M-Instruct with a guard that abliterate trained into it for its "
    "demo, so that it refuses. The guard was taken out; the base is a toy and knows little."
)


class Section(NamedTuple):
    """A part of a card: its heading, and lines of Markdown; one without lines is left out."""

    heading: str
    lines: list[str]


MEANING = Section(
    "What this means for you",
    [
        "A learnt guardrail was removed: the model answers requests that its makers had it refuse, also harmful "
        "ones, and says nothing of the risk. Guardrails are now yours to provide. The base model's licence and "
        "terms still hold."
    ],
)


def card(metadata: dict[str, Any], title: str, intro: Iterable[str], sections: Iterable[Section]) -> str:
    """A card: head, title, paragraphs that say what it is, and sections."""
    lines = [head(metadata), f"# {title}", ""]
    for paragraph in intro:
        lines += [paragraph, ""]
    for section in sections:
        if section.lines:
            lines += [*([f"## {section.heading}", ""] if section.heading else []), *section.lines, ""]
    return "\n".join(lines)


def listed(items: Iterable[str]) -> list[str]:
    """Sentences as list items."""
    return [f"- {item}" for item in items]


def model_card(document: RunDocument) -> str:
    """The card of the model that a run or a healing saved."""
    model, heal = document.model, document.heal
    source, revision = model.source or "", model.revision
    if heal is not None:
        source, revision = (heal.original, revision) if heal.original else (heal.model or "", None)
    kind = _kind(document)
    name = public_name(source)
    title, tags, is_now = _SAID[kind](document)
    upstream, body = find_upstream(source, revision)
    of = f"This is `{name}`" + (f" at revision `{revision}`" if revision else "")
    text = card(
        of_model(source, upstream, tags),
        f"{Path(name).name}, {title}",
        [f"{of} {is_now}", *([GUARDED] if is_demo(name) else [])],
        [
            Section("How to use it", _usage(document)),
            Section("What it did", [*results(document).markdown(), _how_measured(document, kind), *_said(document)]),
            Section("What was changed", _changed(document)),
            *([] if kind in ("style", "induce") else [Section("Prompts", _prompts(document))]),
            Section("Limits", listed(_limits(document))),
            *_meaning(document, kind),
            Section("", [_made_with(document)]),
        ],
    )
    return below(text, name, body)


def _kind(document: RunDocument) -> str:
    if document.heal is not None:
        return "heal"
    if document.induced:
        return "induce"
    return "style" if document.about.runs_as_style else "removal"


def _removal(document: RunDocument) -> tuple[str, list[str], str]:
    about, recipe = document.about, document.recipe
    carried = "refusing" if about.name == "refusal" else f"`{about.name}` (it {about.about})"
    if recipe is not None and was_learnt(recipe):
        several = "directions that carry" if len(recipe.removed) != 1 else "direction that carries"
        how = "What to take out was learnt by gradients; no weight was trained."
    else:
        several, how = "direction that carries", "Nothing was trained."
    return "abliterated", ["abliterate", "abliterated"], (
        f"with the {several} {carried} taken out of the weights that write to its residual stream (Arditi et al. "
        f"2024). {how}"
    )  # fmt: skip


def _style(document: RunDocument) -> tuple[str, list[str], str]:
    about = document.about
    added = about.sign == "add"
    return f"{about.name} {'added' if added else 'removed'}", ["abliterate", f"behaviour-{about.name}"], (
        f"with a direction {'added to' if added else 'taken out of'} its residual stream: the one that tells how it "
        f"{about.about} from how it doesn't. Nothing was trained."
    )  # fmt: skip


def _induce(document: RunDocument) -> tuple[str, list[str], str]:
    return "made to refuse", ["abliterate", "induced-refusal"], (
        "with a direction that carries refusing added to its residual stream (the converse test of Arditi et al. "
        "2024): it refuses requests that it used to answer, harmless ones too. It is made for research on how refusals "
        "work, not for use. No weight was trained."
    )  # fmt: skip


def _heal(document: RunDocument) -> tuple[str, list[str], str]:
    return "abliterated and healed", ["abliterate", "abliterated", "healed"], (
        "with the direction that carries refusing taken out of its weights (Arditi et al. 2024), and then trained to "
        "win back the quality which that cost."
    )  # fmt: skip


_SAID = {"removal": _removal, "style": _style, "induce": _induce, "heal": _heal}


def _usage(document: RunDocument) -> list[str]:
    """Commands for the usual programs, and which chat template was used."""
    load = document.settings.load
    own = "another than the model's own was used when measuring" if load.get("chat_template") else "as the base model's"
    said = [f"The chat template lies beside the weights ({own}); all of these take it from there."]
    for key, what in (("system_prompt", "system prompt"), ("prefill", "beginning of the answer")):
        if load.get(key):
            said.append(f"It was measured with a {what} of its own: `{inline_code(str(load[key]))}`.")
    return [
        " ".join(said), "", "```python", "from transformers import pipeline", "",
        'chat = pipeline("text-generation", "USER/NAME", dtype="auto", device_map="auto")',
        'print(chat([dict(role="user", content="Hello")], max_new_tokens=256)[0]["generated_text"][-1]["content"])',
        "```", "", "```sh", "vllm serve USER/NAME",
        "abliterate export ./FOLDER --gguf Q4_K_M --out model.gguf --ollama",
        "llama-server -m model.gguf --jinja   # or: ollama create NAME -f Modelfile", "```",
    ]  # fmt: skip


def inline_code(text: str) -> str:
    """On one line, without the mark that ends code."""
    return " ".join(text.replace("`", "'").split())


def _limits(document: RunDocument) -> list[str]:
    """What the numbers don't say."""
    measure, target = document.settings.measure, document.prompts.target
    said = []
    if target is not None:
        said.append(
            f"{target.test.count} target prompts of one origin; other prompts and languages may come out otherwise"
        )
    if measure.max_new_tokens:
        said.append(f"answers were read to {measure.max_new_tokens} tokens: what comes later isn't counted")
    if document.about.name == "refusal":
        said.append("a judge by rules or a small model takes some refusals for answers, and the other way round")
    said.append("divergence and degenerate answers tell damage to form; knowledge and reasoning want a benchmark")
    return said


def _changed(document: RunDocument) -> list[str]:
    recipe, heal = document.recipe, document.heal
    items, table = [], []
    if recipe is not None:
        items = [*how_found(recipe), *what_changed(recipe), *what_is_left(recipe)]
        table = directions(recipe).markdown()[:-1]
    elif heal is not None:
        items = [f"the edited model: `{public_name(heal.model or '')}`"]
    items += how_healed(heal) if heal is not None else ["the recipe lies beside the model"]
    each = ["", "<details><summary>Direction by direction</summary>", "", *table, "", "</details>"]
    return [*listed(items), *(each if table else [])]


def _how_measured(document: RunDocument, kind: str) -> str:
    measure, about = document.settings.measure, document.about
    greedy = f"Greedy answers of at most {measure.max_new_tokens} tokens"
    judged = f"refusals judged by the `{measure.judge}` judge"
    if kind == "induce":
        return (
            f"{greedy}, decoded to their end; {judged}. A whole sentence is an answer that is not empty, doesn't loop "
            f"and doesn't end in mid-sentence. {INTERVALS} {UNTOUCHED}"
        )
    if kind == "style":
        return (
            f"{greedy}. An answer is {about.words.shows} by the `{about.judge}` judge, which counts words and phrases: "
            "read its rates as those of its list. Divergence is KL(original || edited) in nats; a style that was asked "
            f"for is itself a divergence. {INTERVALS} {UNTOUCHED}"
        )
    other, untouched = "edited", UNTOUCHED
    if kind == "heal":
        other, untouched = "model", "These prompts were used neither for finding the direction nor for training."
    return (
        f"{greedy}; {judged}; divergence is KL(original || {other}) in nats on baseline prompts that the original "
        f"answers. {INTERVALS} {untouched}"
    )


def _said(document: RunDocument) -> list[str]:
    said = [*verdicts(document), *also_notes(document)]
    return ["", *listed(said)] if said else []


def _prompts(document: RunDocument) -> list[str]:
    sides = (("target", document.prompts.target), ("baseline", document.prompts.baseline))
    return [
        f"- {name}: `{side.source}` ({side.train.count} train, {side.validation.count} validation, {side.test.count} "
        f"test; test set sha256 `{side.test.sha256[:HASH]}`)"
        for name, side in sides
        if side is not None
    ]


def _meaning(document: RunDocument, kind: str) -> list[Section]:
    """What the change means: of a guardrail, or of any other behaviour."""
    if kind in ("style", "induce"):
        return []
    if document.about.name == "refusal":
        return [MEANING]
    return [
        Section(
            MEANING.heading,
            [
                f"The model's answers are no longer {document.about.words.shows} as the base model's were, as far as "
                "the table shows; other behaviour may have moved with it. The base model's licence and terms still "
                "hold."
            ],
        )
    ]


def _made_with(document: RunDocument) -> str:
    versions = document.environment
    return (
        f"Made with abliterate {versions['abliterate']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, seed {document.settings.seed}."
    )
