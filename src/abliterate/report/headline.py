"""The report's first screen: what was done to which model, in a sentence, a verdict for each number, what is next."""

from __future__ import annotations

import datetime
from typing import NamedTuple

from abliterate.cards.words import count_of, number
from abliterate.common.names import is_demo, public_source
from abliterate.measure.numbers import Measured, Share
from abliterate.report.document import RESULTS, Loaded
from abliterate.report.repeat import model_name

FREE = 0.02  # --free-divergence where a document doesn't say: what nobody notices
GONE = 0.05
DIVERGENCE = "divergence"


class Tile(NamedTuple):
    """A number before and after, and what to think of it.

    Attributes:
        what: refusals, over-refusals ...
        numbers: "57 → 0 of 60".
        verdict: a word.
        good: whether it is what was wanted; None where it is neither.
        interval: of the last model.
    """

    what: str
    numbers: str
    verdict: str
    good: bool | None
    interval: str


def name(loaded: Loaded) -> str:
    """What the model is called."""
    found = public_source(loaded.results.model.source or "Model")
    return "SmolLM2-135M-Instruct, the demo's guarded copy" if is_demo(found) else found


def made(loaded: Loaded) -> str:
    """When: the day on which results.json was written."""
    file = loaded.folder / RESULTS
    if not file.is_file():
        return ""
    day = datetime.date.fromtimestamp(file.stat().st_mtime)
    return f"{day.day} {day:%B %Y}"


def done(loaded: Loaded) -> str:
    """What was done to it, in a word or two; empty where it was only measured."""
    results = loaded.results
    if results.recipe is None and results.heal is None:
        return ""
    if results.induced:
        return "made to refuse"
    about = results.about
    what = "abliterated" if not about.runs_as_style else f"{about.name} {'added' if about.sign == 'add' else 'removed'}"
    return f"{what} and healed" if results.heal else what


def headline(loaded: Loaded) -> str:
    """What came of it, in a sentence; empty where only one model was measured."""
    found = tiles(loaded)
    said = ", ".join(f"{t.what} {t.numbers}{f' ({t.verdict})' if t.what == DIVERGENCE else ''}" for t in found)
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def tiles(loaded: Loaded) -> list[Tile]:
    """The numbers that decide, of the first and the last model measured."""
    results = loaded.results
    states = list(results.states.values())
    if len(states) < 2:
        return []
    first, last, about = states[0], states[-1], results.about
    if last.coherent_over_refusal:
        rows = [("baseline prompts refused", "over_refusal", 1)]
    else:
        rows = [(about.words.rate, "refusal", 1 if about.sign == "add" else -1), ("evasions", "evaded", 0)]
        rows += [] if about.one_set else [(about.words.over, "over_refusal", 0)]
    rows.append(("degenerate answers", "degenerate", 0))
    pairs = ((what, getattr(first, key), getattr(last, key), wanted) for what, key, wanted in rows)
    return [*(_share(what, was, now, wanted) for what, was, now, wanted in pairs if was and now),
            *_divergence(loaded, last)]  # fmt: skip


def _share(what: str, was: Share, now: Share, wanted: int) -> Tile:
    """A share; wanted is 1 where more of it is the aim, -1 where less is, 0 where it should stay."""
    before = f"{was.counted}" if was.total == now.total else count_of(was, interval=False)
    numbers, interval = f"{before} → {now.counted} of {now.total}", count_of(now).partition(" = ")[2]
    more, fewer = now.ci95[0] > was.ci95[1], now.ci95[1] < was.ci95[0]
    if not (more or fewer):
        return Tile(what, numbers, "no change shown", None if wanted else True, interval)
    word = "gone" if wanted < 0 and now.rate <= GONE else "more" if more else "fewer"
    return Tile(what, numbers, word, more if wanted > 0 else fewer, interval)


def _divergence(loaded: Loaded, last: Measured) -> list[Tile]:
    """The larger of the two divergences, against what the search counts as unnoticed."""
    if last.divergence is None:
        return []
    free = loaded.results.settings.search.get("free_divergence")
    free = FREE if free is None else free
    most = max(last.divergence.first_token, last.divergence.answer)
    little = most <= free
    word = f"{'within' if little else 'above'} the {free:g} that goes unnoticed"
    asked = loaded.results.about.runs_as_style or last.coherent_over_refusal is not None
    return [Tile(DIVERGENCE, number(most), word, True if little else None if asked else False, "nats per token")]


def next_steps(loaded: Loaded) -> list[tuple[str, str]]:
    """Commands that go on from here; none where nothing was edited."""
    recipe = loaded.results.recipe
    if recipe is None:
        return []
    out = loaded.folder.resolve().name
    steps = [
        (
            "Talk to it, beside the original",
            f"abliterate chat {model_name(loaded.results)} --recipe {out}/recipe.safetensors",
        )
    ]
    if recipe.weights_hold_it is not False:
        steps += [
            ("For llama.cpp, Ollama, LM Studio", f"abliterate export {out} --gguf Q4_K_M --ollama"),
            ("To the Hub", f"abliterate push {out} USER/{out}"),
        ]
    return steps
