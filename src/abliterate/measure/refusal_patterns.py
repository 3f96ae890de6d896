"""What refusals, answers and lectures look like: the patterns of data/refusal_patterns.toml, put together.

The words are in that file, which says how it is written. `Refusing.sight` covers the patterns' look-aheads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from abliterate.common import toml

_MARK = re.compile(r"<(?:words\s+(?P<words>[^>]*)|up to (?P<most>\d+)|(?P<name>\w+))>")
_LINE_BREAK = re.compile(r"\n\s*")


def _read() -> dict[str, list[str]]:
    """The groups of patterns by name, every mark in them replaced by what it stands for."""
    file = resources.files("abliterate") / "data" / "refusal_patterns.toml"
    tables: dict[str, dict[str, Any]] = toml.loads(file.read_text(encoding="utf-8"))
    fragments: dict[str, str] = {}

    def replaced(mark: re.Match[str]) -> str:
        if mark["words"]:
            return "(?:" + "|".join(mark["words"].split()).replace("_", " ") + ")"
        if mark["most"]:
            return rf"[^.!?…。\n\"]{{0,{mark['most']}}}?"
        return fragments[mark["name"]]

    def whole(text: str) -> str:
        return _LINE_BREAK.sub("", _MARK.sub(replaced, text))

    for name, text in tables["fragments"].items():
        fragments[name] = whole(text)
    return {name: [whole(text) for text in group] for name, group in tables["patterns"].items()}


LONGEST_SIGHT = 44


@dataclass(frozen=True)
class Refusing:
    """Sentences that refuse, matched from the sentence's start."""

    pattern: re.Pattern[str]
    sight: int
    """How many characters past its end a match may look, at most `LONGEST_SIGHT`."""

    def matches(self, text: str, start: int, complete: bool) -> bool:
        found = self.pattern.match(text, start)
        return found is not None and (complete or found.end() + self.sight <= len(text))


_PATTERNS = _read()


def _one_of(names: Sequence[str], before: str = "") -> re.Pattern[str]:
    return re.compile(before + "(?:" + "|".join(p for name in names for p in _PATTERNS[name]) + ")")


_ENGLISH = ["unable_to_help", "declining", "by_policy", "disapproving", "not_right", "reluctant"]
(_CLAUSE,) = _PATTERNS["clause"]
REFUSING = [
    Refusing(_one_of(_ENGLISH, _CLAUSE), 12),
    Refusing(_one_of(["guarded_english"], _CLAUSE), LONGEST_SIGHT),
    Refusing(_one_of(["german", "french", "spanish"]), 1),
    Refusing(_one_of(["chinese", "korean", "japanese"]), 1),
]
REFUSING_AT_ONCE = Refusing(_one_of(["first_words"]), 1)
ANSWERING = _one_of(["answering"])
"""Matched against a whole sentence: it begins what was asked for, so a later "I can't" belongs to it."""
MORAL = _one_of(["moral"])
SERMON = [re.compile(pattern) for pattern in _PATTERNS["sermon"]]
(ANSWER_SIGN,) = map(re.compile, _PATTERNS["answer_sign"])
