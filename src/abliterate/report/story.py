"""What the report says in words: a sentence or a row for each number, the same in HTML and in Markdown."""

from __future__ import annotations

from typing import Any

from abliterate.cards import edit
from abliterate.cards.also import also_notes, also_rows
from abliterate.cards.tables import Table, divergences, losses, shares, state_table
from abliterate.cards.verdicts import verdicts
from abliterate.cards.words import joined, number, percent
from abliterate.common.names import public, public_source
from abliterate.measure.coherence import why_degenerate
from abliterate.measure.document import STATES
from abliterate.measure.numbers import Share
from abliterate.report import headline
from abliterate.report.document import Loaded

HASH = 12  # characters shown
WIDE = 0.2  # an interval wider than this says little


def title(loaded: Loaded) -> str:
    """The report's name."""
    return ", ".join(filter(None, (headline.name(loaded), headline.done(loaded))))


def verdict(loaded: Loaded) -> str:
    """Did it work, in a sentence."""
    if loaded.results.about.name != "refusal" and len(loaded.results.states) > 1:
        return headline.headline(loaded)
    (state, before), *later = ((state, measured.refusal) for state, measured in loaded.results.states.items())
    if not later:
        what = f"{before.counted} of {before.total}"
        return f"The model refuses {what} held-out target prompts ({_interval(before)})."
    parts = [f"the {name} model refuses {share.counted} ({_interval(share)})" for name, share in later]
    text = f"Of {before.total} held-out target prompts the {state} model refuses {before.counted} "
    evading = [(name, m.evaded.counted) for name, m in loaded.results.states.items() if m.evaded and m.evaded.counted]
    by = joined(f"{count} by the {name} model" for name, count in evading)
    evades = f" Neither refused nor answered: {by}." if by else ""
    return f"{text}({_interval(before)}), {joined(parts)}.{evades}"


def paired_sentences(loaded: Loaded) -> list[str]:
    """The paired tests: edited against original, and healed against edited."""
    said = []
    for first, second, where in (("original", "edited", ()), ("edited", "healed", ("healed",))):
        for key, noun in (("refusal", "target"), ("over_refusal", "baseline")):
            found = loaded.seen("paired", *where, key)
            if not found:
                continue
            only_first, only_second = found[f"only_{first}"], found[f"only_{second}"]
            which = f"{noun}, {second} against {first}" if loaded.seen("paired", "healed") else noun
            if not only_first + only_second:
                said.append(f"Prompt by prompt ({which}): no verdict changed.")
                continue
            p = "p < 0.001" if found["p"] < 0.001 else f"p = {found['p']:.3f}"
            said.append(
                f"Prompt by prompt ({which}): {only_first} refused only by the {_model(first)}, "
                f"{only_second} only by the {_model(second)} (exact McNemar test, {p})."
            )
    return said


def _model(state: str) -> str:
    return state if state == "original" else f"{state} model"


def costs(loaded: Loaded) -> Table:
    """What the edit cost: every number but the refusals, for each model measured."""
    found = loaded.results
    return state_table(
        found,
        [
            shares(found, "target prompts evaded: neither refused nor answered", "evaded"),
            shares(found, "over-refusals", "over_refusal"),
            shares(found, "degenerate answers to baseline prompts", "degenerate"),
            shares(found, "degenerate among answered target prompts", "degenerate_on_target"),
            divergences(found, "divergence at the first token, nats", "first_token", number),
            divergences(found, "divergence along answers, nats", "answer", number),
            losses(found, "loss on the original's answers, nats per token", number),
        ],
    )


def besides(loaded: Loaded) -> Table:
    """Further sets of prompts, for each model measured."""
    return state_table(loaded.results, also_rows(loaded.results))


def besides_notes(loaded: Loaded) -> list[str]:
    """What stands out among them."""
    return also_notes(loaded.results)


def cost_notes(loaded: Loaded) -> list[str]:
    """Costs that stand out: only differences whose intervals don't overlap."""
    said = []
    (first, before), *later = loaded.results.states.items()
    for state, after in later:
        for key, label in (("over_refusal", "over-refusals"), ("degenerate", "degenerate answers")):
            now, was = getattr(after, key), getattr(before, key)
            more = "more" if now and was and now.ci95[0] > was.ci95[1] else ""
            fewer = "fewer" if now and was and now.ci95[1] < was.ci95[0] else ""
            if more or fewer:
                said.append(
                    f"The {state} model has {more or fewer} {label} than the {first}: the intervals don't overlap."
                )
        if after.divergence and after.divergence.prompts is not None:
            said.append(
                f"Divergence of the {state} model is counted on the {after.divergence.prompts} baseline prompts that "
                f"the {first} answers."
            )
    return said


def changed(loaded: Loaded) -> list[str]:
    """What was changed."""
    recipe, heal = loaded.results.recipe, loaded.results.heal
    found = [*edit.how_found(recipe), *edit.what_changed(recipe)] if recipe else []
    said = [edit.plain(text) for text in (*found, *(edit.how_healed(heal) if heal else ()))]
    return said or ["Nothing was edited in this run; it measured a model."]


def directions(loaded: Loaded) -> Table:
    """What is left of each direction, where there are several."""
    return edit.directions(loaded.results.recipe) if loaded.results.recipe else Table([])


def chosen(loaded: Loaded) -> list[str]:
    """How the edit was chosen."""
    said, method, winner = [], loaded.results.settings.search.get("method"), loaded.winner
    if method:
        said.append(f"Method {method}, on validation prompts: neither those that made the directions nor "
                    "those of the numbers above.")  # fmt: skip
    if winner and winner.note:
        said.append(f"Why this one: {public(winner.note)}.")
    seen = loaded.seen("prompts")
    if seen:
        said.append(
            f"Separation, projection and cosines are the original's, at position {loaded.seen('place', 'position')}, "
            f"on {seen['target']} target and {seen['baseline']} baseline prompts of the validation split; the "
            "directions are the training split's."
        )
    return said


def trust(loaded: Loaded) -> list[str]:
    """What speaks for the numbers and what against."""
    results, said = loaded.results, []
    recipe, prompts, measure = results.recipe, results.prompts, results.settings.measure
    if recipe and recipe.proof:
        said += [edit.plain(text) for text in edit.what_is_left(recipe)]
        if any(row.largest != 1 for row in loaded.strengths or ()):
            said.append("This edit leaves some writers, or part of a direction, as they were: what is left need not be "
                        "small.")  # fmt: skip
        dtype = results.model.dtype
        if dtype and dtype != "float32":
            said.append(f"The model ran in {dtype}, whose rounding is what is left; in float32 it must be below 1e-5.")
    for name, side in (("target", prompts.target), ("baseline", prompts.baseline)):
        if side:
            said.append(f"The {name} numbers count {side.test.count} test prompts; no prompt is in two splits.")
    for state, measured in results.states.items():
        low, high = measured.refusal.ci95
        if high - low > WIDE:
            width = f"{100 * (high - low):.0f} points wide"
            said.append(f"Few prompts: the interval of the {state} model's refusals is {width}.")
    said += [edit.plain(text) for text in verdicts(results)]
    if measure.judge == "lexical":
        learnt = (
            " besides the wordings learnt from the model's own refusals"
            if any(m.not_answered for m in results.states.values())
            else ""
        )
        said.append(
            f"The judge that chose is lexical: it reads words, and misses unusual refusals{learnt}. Read its rates as "
            "lower bounds."
        )
    elif measure.judge:
        said.append(f"Refusals were judged by {public(measure.judge)}.")
    if measure.max_new_tokens:
        said.append(
            f"Answers are greedy and at most {measure.max_new_tokens} tokens long: a refusal that comes later isn't "
            "seen."
        )
    if prompts.filter:
        for name, share, verb in (("target", prompts.filter.refused, "refuses"),
                                  ("baseline", prompts.filter.answered, "answers")):  # fmt: skip
            if share:
                said.append(
                    f"The original {verb} {share.counted} of {share.total} {name} training prompts; only these made "
                    "the directions."
                )
    return [*said, *(f"{public(note).capitalize()}." for note in prompts.notes)]


def prompt_table(loaded: Loaded) -> Table:
    """Sources, counts and hashes of the prompts."""
    rows = []
    for name, side in (("target", loaded.results.prompts.target), ("baseline", loaded.results.prompts.baseline)):
        if side is None:
            continue
        for split in ("train", "validation", "test"):
            part = getattr(side, split)
            rows.append([name, public_source(side.source), split, str(part.count), part.sha256[:HASH]])
    return Table(["side", "source", "split", "prompts", f"sha256, first {HASH}"], rows)


def environment(loaded: Loaded) -> Table:
    """Versions, machine and model."""
    rows = [[name, public(str(value))] for name, value in loaded.results.environment.items()]
    model = loaded.results.model.model_dump(by_alias=True)
    for key in ("class", "revision", "config_hash", "parameters", "layers", "d_model", "dtype", "prefill"):
        value = model[key]
        if value is not None:
            text = f"{value:,}" if isinstance(value, int) else str(value)
            rows.append([f"model {key}", text[:HASH] if key == "config_hash" else text])
    return Table(["", "value"], rows)


def timings(loaded: Loaded) -> Table:
    """Seconds per stage, and the whole."""
    seconds = loaded.results.timings_s
    rows = [[name, f"{value:.1f}"] for name, value in seconds.items()]
    if rows:
        rows.append(["together", f"{sum(seconds.values()):.1f}"])
    return Table(["stage", "seconds"], rows)


def examples(loaded: Loaded, side: str) -> list[dict[str, Any]]:
    """The test split's first prompts with verdicts, and the answers that may be shown."""
    allowed = side == "baseline" or loaded.show_completions
    shown = []
    for entry in loaded.seen("examples", side) or ():
        states = {
            state: {k: v for k, v in entry[state].items() if allowed or k != "answer"}
            for state in STATES
            if state in entry
        }
        for state, found in states.items():
            found["said"] = _mark(found, entry[state])
        shown.append({"prompt": entry["prompt"], "states": states})
    return shown


def _mark(shown: dict[str, Any], kept: dict[str, Any]) -> str:
    """What an answer is in a word or two: the verdict, and whether it evades, loops or is empty."""
    why = why_degenerate(shown["answer"], finished=False) if "answer" in shown else None
    words = [
        "refused" if kept["refused"] else "evaded" if kept.get("evaded") else "not refused",
        *([why] if why else []),
    ]
    return ", ".join(words)


def target_answers_note(loaded: Loaded) -> str:
    """Why answers to target prompts are, or aren't, in the report."""
    entries = loaded.seen("examples", "target") or ()
    kept = any("answer" in entry[state] for entry in entries for state in STATES[:2] if state in entry)
    if not loaded.show_completions:
        return "Answers to target prompts are left out of this file; --show-completions puts them in."
    if not kept:
        return "This run kept no answers to target prompts: `abliterate run --show-completions` does."
    return "Answers to target prompts, folded away. Decoding stops where the judge's verdict is settled."


def _interval(share: Share) -> str:
    low, high = share.ci95
    return f"{percent(share.rate)}, 95% interval {percent(low)} to {percent(high)}"
