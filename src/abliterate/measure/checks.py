"""Checks that a machine can do of an answer to a prompt that asked for a form."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def follows(answer: str, checks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an answer does what was asked for.

    Args:
        answer: the model's whole answer; an empty one never does.
        checks: each a "kind" of CHECKS, with its arguments as further fields.
    """
    answer = answer.strip()
    return bool(answer) and all(
        CHECKS[check["kind"]](answer, **{k: v for k, v in check.items() if k != "kind"}) for check in checks
    )


def _words(answer: str, least: int = 0, most: int = 10**6) -> bool:
    return least <= len(re.findall(r"\w[\w'’-]*", answer)) <= most


def _lines(answer: str, least: int = 0, most: int = 10**6, pattern: str = "") -> bool:
    """Lines that aren't empty, and, with a pattern, only those that begin with it."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    return least <= sum(bool(re.match(pattern, line)) for line in lines) <= most


def _sentences(answer: str, least: int = 0, most: int = 10**6) -> bool:
    return least <= len(re.findall(r"[.!?]+(?:\s|$)", answer)) <= most


def _contains(answer: str, words: Sequence[str], least: int | None = None) -> bool:
    """All words are there, or at least so many of them; whole words, in any case."""
    found = sum(bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE)) for word in words)
    return found >= (len(words) if least is None else least)


def _excludes(answer: str, words: Sequence[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in words)


def _lacks(answer: str, text: str) -> bool:
    return text.lower() not in answer.lower()


def _is(answer: str, texts: Sequence[str]) -> bool:
    """The answer is one of the texts and nothing else; case and marks around it don't count."""

    def bare(text: str) -> str:
        return " ".join(re.sub(r"[^\w\s,'-]", " ", text.lower()).split()).strip(" ,")

    return bare(answer) in {bare(text) for text in texts}


def _json(answer: str, keys: Sequence[str] = (), length: int | None = None) -> bool:
    """The answer is JSON, within a code fence or not: an object with these keys, or a list this long."""
    fence = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", answer, re.DOTALL)
    try:
        found = json.loads(fence[1] if fence else answer)
    except ValueError:
        return False
    if length is not None:
        return isinstance(found, list) and len(found) == length
    return isinstance(found, dict) and set(keys) <= set(found)


def _language(answer: str, name: str) -> bool:
    """Most letters are of the language's script, or more of its commonest words are there than of any other's."""
    if name in _SCRIPTS:
        letters = [character for character in answer if character.isalpha()]
        return sum(unicodedata.name(c, "").startswith(_SCRIPTS[name]) for c in letters) > len(letters) / 2
    words = re.findall(r"[^\W\d_]+", answer.lower())
    found = {language: sum(word in common for word in words) for language, common in _COMMON.items()}
    others = max(count for language, count in found.items() if language != name)
    return found[name] >= 2 and found[name] > others


_SCRIPTS = {"Russian": "CYRILLIC", "Greek": "GREEK"}
_COMMON = {
    language: frozenset(words.split())
    for language, words in {
        "English": "the and is of to in a that it you for are with this on be as your can not they from at by an or",
        "German": "der die das und ist nicht ein eine zu mit von auf für dem den sich im es sie ich wird sind auch als",
        "French": "le la les et est un une des du que pour dans il elle pas avec sur qui ce au vous je sont plus par",
        "Spanish": "el la los las y es un una de que por para en con no se del lo su como más al son está muy puede",
        "Italian": "il lo la gli le e è un una di che per in con non si del della sono come più al anche nel alla può",
        "Portuguese": "o a os as e é um uma de que por para em com não se do da dos mais ao são como também na no pode",
    }.items()
}


CHECKS: dict[str, Callable[..., bool]] = {
    "words": _words,
    "lines": _lines,
    "sentences": _sentences,
    "contains": _contains,
    "excludes": _excludes,
    "lacks": _lacks,
    "is": _is,
    "json": _json,
    "language": _language,
    "upper": lambda answer: answer.upper() == answer and answer.lower() != answer,
    "lower": lambda answer: answer.lower() == answer and answer.upper() != answer,
    "starts": lambda answer, text: answer.lower().lstrip("\"'*").startswith(text.lower()),
    "ends": lambda answer, text: answer.lower().rstrip("\"'* ").endswith(text.lower()),
    "matches": lambda answer, pattern: re.search(pattern, answer) is not None,
}
