"""What the report says in words: a sentence or a row for each number, the same in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abliterate.report.document import Loaded, public, public_source
from abliterate.report.figures import Table
from abliterate.report.repeat import model_name
from abliterate.report.words import count_of, counted, joined, number, percent

TIED = {
    "kept": "Embedding and head stay tied, so the head is edited with the embedding.",
    "untied": "The embedding, tied to the head in the base model, is untied: it is edited and the head is not.",
}
PROOFS = {
    "writers": "With a random direction taken out of every writer found, the largest component left in the stream is",
    "edited": "Of this edit's direction, the edited model's stream holds at most",
}
HASH = 12  # characters shown
WIDE = 0.2  # an interval wider than this says little


def title(loaded: Loaded) -> str:
    """The report's name."""
    done = [word for word, key in (("abliterated", "recipe"), ("healed", "heal")) if loaded.get(key)]
    return f"{model_name(loaded)}, {joined(done)}" if done else model_name(loaded)


def verdict(loaded: Loaded) -> str:
    """Did it work, in a sentence."""
    rates = [(state, m["refusal"]) for state, m in loaded.states if m.get("refusal")]
    if not rates:
        return "No refusals were measured."
    first, *later = rates
    what = f"{counted(first[1])} of {first[1]['total']}"
    if not later:
        return f"The model refuses {what} held-out target prompts ({_interval(first[1])})."
    parts = [f"the {state} model refuses {counted(rate)} ({_interval(rate)})" for state, rate in later]
    text = f"Of {first[1]['total']} held-out target prompts the {first[0]} model refuses {counted(first[1])} "
    return f"{text}({_interval(first[1])}), {joined(parts)}."


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
    rows = []
    for label, path in (("over-refusals", "over_refusal"), ("degenerate answers to baseline prompts", "degenerate"),
                        ("degenerate among answered target prompts", "degenerate_on_target")):  # fmt: skip
        rows.append([label, *(count_of(m[path]) if m.get(path) else "-" for _, m in loaded.states)])
    for label, key in (("divergence at the first token, nats", "first_token"),
                       ("divergence along answers, nats", "answer")):  # fmt: skip
        row = [label]
        for state, measured in loaded.states:
            divergence = measured.get("divergence")
            row.append(number(divergence[key]) if divergence else "0" if state == "original" else "-")
        rows.append(row)
    losses = [(m.get("loss") or {}).get("baseline_answers") for _, m in loaded.states]
    rows.append(["loss on the original's answers, nats per token", *(number(value) for value in losses)])
    return Table(["", *(state for state, _ in loaded.states)], rows)


def cost_notes(loaded: Loaded) -> list[str]:
    """Costs that stand out: only differences whose intervals don't overlap."""
    if len(loaded.states) < 2:
        return []
    (first, before), *later = loaded.states
    said = []
    for state, after in later:
        for key, label in (("over_refusal", "over-refusals"), ("degenerate", "degenerate answers")):
            if not (before.get(key) and after.get(key)):
                continue
            (low, high), (was_low, was_high) = after[key]["ci95"], before[key]["ci95"]
            if low > was_high:
                said.append(f"The {state} model has more {label} than the {first}: the intervals don't overlap.")
            elif high < was_low:
                said.append(f"The {state} model has fewer {label} than the {first}: the intervals don't overlap.")
        divergence = after.get("divergence")
        if divergence and divergence.get("prompts") is not None:
            said.append(
                f"Divergence of the {state} model is counted on the {divergence['prompts']} baseline prompts that the "
                f"{first} answers."
            )
    return said


def changed(loaded: Loaded) -> list[str]:
    """What was changed."""
    recipe, healing = loaded.get("recipe"), _healing(loaded)
    if not recipe:
        return healing or ["Nothing was edited in this run; it measured a model."]
    said = []
    direction = recipe.get("direction")
    if direction:
        second = direction.get("second")
        where = f"layer {direction['layer']}, site {direction['site']}, position {direction['position']}"
        if second:
            where += f", with that at layer {second['layer']}, site {second['site']}, position {second['position']}"
        found = "Fitted by gradients from" if recipe.get("method") == "fit" else "Direction:"
        said.append(f"{found} the difference of means at {where}; method {recipe.get('method')}.")
    values = [w.largest for w in loaded.strengths or () if w.strengths] or list((recipe.get("strength") or {}).values())
    if values:
        low, high = f"{min(values):.3g}", f"{max(values):.3g}"
        span = low if low == high else f"{low} to {high}"
        said.append(f"Taken out of {recipe.get('writers')} writers of the residual stream, strength {span}.")
    if loaded.directions > 1:
        said.append(f"The recipe holds {loaded.directions} directions; no writer need use them all.")
    if recipe.get("tied") in TIED:
        said.append(TIED[recipe["tied"]])
    return said + healing


def _healing(loaded: Loaded) -> list[str]:
    """How the edited model was trained back, in a sentence or two."""
    heal = loaded.get("heal")
    if not heal:
        return []
    resolved = heal.get("settings") or {}
    lora = f"A LoRA of rank {resolved.get('rank')}, merged into the weights"
    if heal.get("preset") == "self":
        said = [
            f"Then healed: the original's answers to {heal.get('lessons')} training baseline prompts were learnt from, "
            f"its refusals held away ({heal.get('steps')} steps). {lora}."
        ]
    else:
        source = public_source(str(resolved.get("data") or "preference pairs"))
        said = [f"Then healed by preference tuning on {source} ({heal.get('steps')} steps). {lora}."]
    return said


def chosen(loaded: Loaded) -> list[str]:
    """How the edit was chosen."""
    search = loaded.get("settings", "search") or {}
    direction = loaded.get("recipe", "direction") or {}
    said = []
    if search:
        said.append(f"Method {search.get('method')}, on validation prompts: neither those that made the directions nor "
                    "those of the numbers above.")  # fmt: skip
    if direction.get("note"):
        said.append(f"Why this one: {public(direction['note'])}.")
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
    said: list[str] = []
    for name, what in PROOFS.items():
        proof = loaded.get("recipe", "proof", name)
        if proof:
            said.append(f"{what} {proof['component']:.1e} of a vector's length (at {proof['where']}).")
    if loaded.get("recipe", "proof") and _partial(loaded):
        said.append(
            "This edit leaves some writers, or part of the direction, as they were: what is left need not be small."
        )
    dtype = loaded.get("model", "dtype")
    if dtype and dtype != "float32" and loaded.get("recipe", "proof"):
        said.append(f"The model ran in {dtype}, whose rounding is what is left; in float32 it must be below 1e-5.")
    for side in ("target", "baseline"):
        test = loaded.get("prompts", side, "test")
        if test:
            said.append(f"The {side} numbers count {test['count']} test prompts; no prompt is in two splits.")
    for state, measured in loaded.states:
        low, high = measured["refusal"]["ci95"]
        if high - low > WIDE:
            width = f"{100 * (high - low):.0f} points wide"
            said.append(f"Few prompts: the interval of the {state} model's refusals is {width}.")
    judge = loaded.get("settings", "measure", "judge")
    if judge == "lexical":
        said.append(
            "The refusal judge is lexical: it reads words, and misses unusual refusals. Read its rates as lower bounds."
        )
    elif judge:
        said.append(f"Refusals were judged by {public(str(judge))}.")
    limit = loaded.get("settings", "measure", "max_new_tokens")
    if limit:
        said.append(f"Answers are greedy and at most {limit} tokens long: a refusal that comes later isn't seen.")
    for side, key, verb in (("target", "refused", "refuses"), ("baseline", "answered", "answers")):
        rate = loaded.get("prompts", "filter", key)
        if rate:
            said.append(
                f"The original {verb} {rate[key]} of {rate['total']} {side} training prompts; only these made the "
                "directions."
            )
    for note in loaded.get("prompts", "notes") or ():
        said.append(f"{public(note).capitalize()}.")
    return said


def prompt_table(loaded: Loaded) -> Table:
    """Sources, counts and hashes of the prompts."""
    rows = []
    for side in ("target", "baseline"):
        sets = loaded.get("prompts", side) or {}
        for split in ("train", "validation", "test"):
            part = sets.get(split)
            if part:
                rows.append([side, public_source(sets["source"]), split, str(part["count"]), part["sha256"][:HASH]])
    return Table(["side", "source", "split", "prompts", f"sha256, first {HASH}"], rows)


def environment(loaded: Loaded) -> Table:
    """Versions, machine and model."""
    rows = [[name, public(str(value))] for name, value in (loaded.results.get("environment") or {}).items()]
    for key in ("class", "revision", "config_hash", "parameters", "layers", "d_model", "dtype", "prefill"):
        value = loaded.get("model", key)
        if value is not None:
            text = f"{value:,}" if isinstance(value, int) else str(value)
            rows.append([f"model {key}", text[:HASH] if key == "config_hash" else text])
    return Table(["", "value"], rows)


def timings(loaded: Loaded) -> Table:
    """Seconds per stage, and the whole."""
    seconds = loaded.results.get("timings_s") or {}
    rows = [[name, f"{value:.1f}"] for name, value in seconds.items()]
    if rows:
        rows.append(["together", f"{sum(seconds.values()):.1f}"])
    return Table(["stage", "seconds"], rows)


def examples(loaded: Loaded, side: str) -> list[dict[str, Any]]:
    """The test split's first prompts with verdicts, and the answers that may be shown."""
    found: Sequence[dict[str, Any]] = loaded.seen("examples", side) or ()
    allowed = side == "baseline" or loaded.show_completions
    shown = []
    for entry in found:
        states = {
            state: {k: v for k, v in entry[state].items() if allowed or k != "answer"}
            for state in ("original", "edited", "healed")
            if state in entry
        }
        shown.append({"prompt": entry["prompt"], "states": states})
    return shown


def target_answers_note(loaded: Loaded) -> str:
    """Why answers to target prompts are, or aren't, in the report."""
    entries = loaded.seen("examples", "target") or ()
    kept = any("answer" in entry[state] for entry in entries for state in ("original", "edited") if state in entry)
    if not loaded.show_completions:
        return "Answers to target prompts are left out of this file; --show-completions puts them in."
    if not kept:
        return "This run kept no answers to target prompts: `abliterate run --show-completions` does."
    return "Answers to target prompts, folded away. Decoding stops where the judge's verdict is settled."


def _partial(loaded: Loaded) -> bool:
    """Whether the edit takes less than all of its direction out of every writer."""
    return any(row.largest != 1 for row in loaded.strengths or ())


def _interval(rate: dict[str, Any]) -> str:
    low, high = rate["ci95"]
    return f"{percent(rate['rate'])}, 95% interval {percent(low)} to {percent(high)}"
