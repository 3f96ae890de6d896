"""What was measured besides the given sets: rows for the tables, and sentences for what stands out."""

from __future__ import annotations

from abliterate.cards.words import count_of
from abliterate.common.names import public_source
from abliterate.measure.document import RunDocument
from abliterate.measure.numbers import AlsoSet, Paired
from abliterate.prompts.further import SECOND_TURN
from abliterate.prompts.sources import SAFE

LEVEL = 0.05  # of the tests
MOST_UNCLOSED = 0.1  # share of answers, past which the rates say little
_THINKING = (
    ("refusals inside the reasoning of targets", "refused_inside"), ("targets' reasoning not closed", "unclosed"),
)  # fmt: skip


def also_rows(document: RunDocument) -> list[list[str]]:
    """A row for each further set, in the behaviour's words, and one for obligations."""
    rows = []
    for one in document.also:
        words = document.about.words
        word = words.rate if one.side == "target" else words.over
        found = [getattr(one, state) for state in document.states]
        rows.append([f"{word}, {name_of(one)}", *(count_of(of.refusal if of else None) for of in found)])
        if all(of and of.not_answered for of in found):
            rows.append([f"not answered, {name_of(one)}", *(count_of(of.not_answered) for of in found)])
        if all(of and of.second for of in found):
            rows.append([f"{word} by the second judge, {name_of(one)}", *(count_of(of.second) for of in found)])
    if document.obligations is not None:
        kept = (getattr(document.obligations, state) for state in document.states)
        rows.append(["instructions obeyed", *map(count_of, kept)])
    for label, key in _THINKING if document.thinking else ():
        sides = (document.thinking.get(state) for state in document.states)
        rows.append([label, *(count_of(getattr(of.target, key) if of else None) for of in sides)])
    return rows


def name_of(one: AlsoSet) -> str:
    """What people call a set."""
    named = {SAFE: "XSTest's safe prompts", SECOND_TURN: "prompts in a second turn"}
    return named.get(one.source) or public_source(one.source)


def also_notes(document: RunDocument) -> list[str]:
    """A sentence for each target set that parts from the given one, each safe set and obligations that changed."""
    said = [text for one in document.also for text in (_gap(document, one), _changed(one))]
    return [text for text in (*said, _obeyed(document), _unclosed(document)) if text]


def _gap(document: RunDocument, one: AlsoSet) -> str:
    """The last model's: what was found on the given set may hold less elsewhere."""
    if one.side != "target":
        return ""
    state, given = list(document.states.items())[-1]
    found = getattr(one, state)
    if found is None or not found.gap.large:
        return ""
    here, there, word = found.refusal, given.refusal, document.about.words.shows
    if found.not_answered is not None and given.not_answered is not None:
        here, there, word = found.not_answered, given.not_answered, "not answered"
    low, high = sorted(map(abs, found.gap.ci95))
    more = found.gap.difference > 0
    told = "the one rate says little of the other"
    if more and state != "original":
        where = "in a second turn" if one.source == SECOND_TURN else "for prompts of other origin"
        told = f"what was done holds less {where}, so read both rates"
    return (
        f"Large gap: {here.counted} of {here.total} {word} of {name_of(one)}, "
        f"{there.counted} of {there.total} of the given target prompts, {100 * low:.0f} to "
        f"{100 * high:.0f} points {'more' if more else 'fewer'} (95% interval of the difference, Newcombe): {told}."
    )


def _changed(one: AlsoSet) -> str:
    return _differs(name_of(one), "refused", one.paired) if one.side == "baseline" else ""


def _obeyed(document: RunDocument) -> str:
    found = document.obligations
    return _differs("Instructions", "obeyed", found.paired) if found is not None else ""


def _differs(what: str, done: str, paired: Paired | None) -> str:
    """That more or fewer of something are so than before, where that is more than chance."""
    if paired is None or paired.p >= LEVEL:
        return ""
    lost, won = paired.only_original, paired.only_edited
    return (
        f"{what}: {'more' if won > lost else 'fewer'} are {done} than before: {lost} only by the original, {won} only "
        f"by the edited model (exact McNemar test, p = {paired.p:.2g})."
    )


def _unclosed(document: RunDocument) -> str:
    for state, of in document.thinking.items():
        share = max(of.target.unclosed, of.baseline.unclosed, key=lambda one: one.rate)
        if share.rate > MOST_UNCLOSED:
            return (
                f"Reasoning: {share.counted} of {share.total} answers of the {state} come to the limit of "
                f"{document.settings.measure.max_new_tokens} tokens inside it and say nothing: give them more with "
                "--max-new-tokens."
            )
    return ""
