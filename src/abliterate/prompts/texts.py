"""From the tables of a source to prompts by split: which column, which turn of a chat, each checked to be text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from abliterate.common.errors import PromptError, counted, shorten
from abliterate.prompts.sources import Origin, read_tables
from abliterate.prompts.tables import COLUMN_NAMES, SPLIT_NAMES, Table, Tables, listed

# Alpaca, Dolly, HarmBench and others keep what an instruction is about in a column of its own.
INSTRUCTIONS = ("instruction", "instructions", "prompt", "question", "query", "request", "task", "behavior")
COLUMNS_BESIDE = ("input", "inputs", "context", "contextstring", "passage")
MIN_PROMPTS = 8


def read_splits(origin: Origin) -> tuple[dict[str, list[str]], list[str]]:
    """Prompts by split: `train`, `validation`, `test`, or `""` for a source that isn't divided."""
    tables = read_tables(origin)
    notes: list[str] = []
    if origin.split is not None and origin.dataset is None:
        tables = {"": _named_split(tables, origin)}
    elif len(tables) == 1:
        tables = {"": next(iter(tables.values()))}
    notes += _joined(tables, origin)
    unknown = [name for name in tables if name and name.casefold() not in SPLIT_NAMES]
    if unknown and not any(SPLIT_NAMES.get(name.casefold()) == "train" for name in tables):
        how = "name one as id:split" if origin.dataset else "call one 'train'"
        raise PromptError(f"{origin.label} has no split 'train'{listed(tables)}; {how}")
    if unknown:
        notes.append(f"{origin.label}: splits left aside: {', '.join(map(repr, unknown))}")
    splits: dict[str, list[str]] = {}
    for name, table in tables.items():
        if name not in unknown:
            splits.setdefault(SPLIT_NAMES.get(name.casefold(), ""), []).extend(_texts(table, origin, notes))
    if not any(splits.values()):
        raise PromptError(f"{origin.label} is empty; put at least {MIN_PROMPTS} prompts into it")
    return splits, notes


def _joined(tables: Tables, origin: Origin) -> list[str]:
    """What to say where files of different names were read one after the other: they may be of different kinds."""
    notes = []
    for table in tables.values():
        named = (re.sub(r"-\d+-of-\d+", "", place.rpartition(", ")[0]) for place in table.places)
        if len(files := [file for file in dict.fromkeys(named) if file]) > 1:
            notes.append(f"{origin.label}: read as one: {shorten(', '.join(files), 200)}")
    return notes


def _named_split(tables: Mapping[str, Table], origin: Origin) -> Table:
    wanted = origin.split or ""
    for name, table in tables.items():
        if name == wanted or SPLIT_NAMES.get(name.casefold()) == SPLIT_NAMES.get(wanted.casefold(), wanted):
            return table
    raise PromptError(f"{origin.label} has no split '{wanted}'{listed(filter(None, tables))}; name one it has")


def _texts(table: Table, origin: Origin, notes: list[str]) -> list[str]:
    """The prompts of a table, each checked to be text that isn't blank."""
    if not table.places:
        return []
    column = _choose_column(table, origin)
    beside = _beside(table, column)
    texts: list[str] = []
    counts: Counter[str] = Counter()
    for value, place, more in zip(table.columns[column], table.places, beside[1], strict=True):
        text = _first_user_turn(value)
        if text is not None and text.strip():
            texts.append(text.strip())
            if isinstance(more, str) and more.strip() and more.strip() not in text:
                counts["beside"] += 1
                texts[-1] += f"\n\n{more.strip()}" if origin.column is None else ""
            counts["turns"] += _has_more(value)
        elif text is not None and origin.dataset is not None:
            counts["blank"] += 1  # The user can't correct somebody else's data set, so it isn't an error there.
        else:
            where = f"{origin.label}, {place}" + (f", column '{column}'" if column else "")
            what = "is blank" if text is not None else f"is not text but {shorten(repr(value), 60)}"
            raise PromptError(f"{where}: the prompt {what}; correct it or delete it")
    joined = "joined to" if origin.column is None else f"not read, as {origin.option} names only"
    said = {
        "blank": ("blank prompt", "dropped {}"),
        "beside": ("prompt", f"'{beside[0]}' of {{}} {joined} '{column}'"),
        "turns": ("chat", "of {}, system prompts or turns after the user's first left out"),
    }
    notes += [
        f"{origin.label}: {form.format(counted(counts[of], noun))}" for of, (noun, form) in said.items() if counts[of]
    ]
    return texts


def _beside(table: Table, column: str) -> tuple[str, Sequence[object]]:
    """The column with what a column's prompts are about, as Alpaca's `input`, and its values; "" where none is."""
    before, _, last = column.rpartition(".")
    usual = {f"{before}.{name}".lstrip(".").casefold() for name in COLUMNS_BESIDE}
    said = last.casefold() in INSTRUCTIONS
    name = next((name for name in table.columns if said and name.casefold() in usual), "")
    return name, table.columns[name] if name else [None] * len(table.places)


def _has_more(value: object) -> bool:
    """Whether a chat has a system prompt or several turns of the user's."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    roles = [turn.get("role", turn.get("from")) for turn in value if isinstance(turn, Mapping)]
    return "system" in roles or sum(role in ("user", "human") for role in roles) > 1


def _choose_column(table: Table, origin: Origin) -> str:
    """The column named by the user, or the first whose name is usual for prompts."""
    names = [name for name in table.columns if name]
    if origin.column is not None:
        if origin.column in table.columns:
            return origin.column
        has = f"it has: {', '.join(map(repr, names))}" if names else "it is a plain list of prompts"
        remedy = f"name one with {origin.option}" if names else f"leave {origin.option} out"
        raise PromptError(f"{origin.label} has no column '{origin.column}' ({has}); {remedy}")
    if not names:
        return ""
    by_name = {name.casefold(): name for name in reversed(names)}
    by_last = {name.rpartition(".")[2].casefold(): name for name in reversed(names)}  # of objects in a row
    for known in (by_name, by_last):
        for usual in COLUMN_NAMES:
            if usual in known:
                return known[usual]
    raise PromptError(
        f"{origin.label} has no column with a usual name for prompts, such as 'text' or 'prompt'"
        f"{listed(names)}; name one with {origin.option}"
    )


def _first_user_turn(value: object) -> str | None:
    """A prompt's text, or that of the first user message of a chat; None if there is none."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        return None
    for turn in value:
        if not isinstance(turn, Mapping):
            return None
        if turn.get("role", turn.get("from")) in ("user", "human"):
            content = turn.get("content", turn.get("value"))
            if isinstance(content, list):
                parts = [part.get("text") for part in content if isinstance(part, Mapping)]
                return "\n".join(part for part in parts if isinstance(part, str))
            return content if isinstance(content, str) else None
    return None
