"""What shows a style: how often an answer's words do, counted per hundred words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from abliterate.common.errors import AbliterateError

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'"})


@dataclass(frozen=True)
class Style:
    """What counts as showing a style.

    Attributes:
        words: words and phrases in any case; a trailing `*` stands for any ending, a space for any space.
        patterns: regular expressions, in any case, for what words can't say (figures of speech).
        threshold: an answer shows the style from this many marks per hundred words.
        distinct: and from this many different marks; one word said over and over is no style.
        least_words: shorter answers are counted as if they had so many, or one mark would decide.

    Raises:
        AbliterateError: on a pattern that isn't a regular expression, or nothing to look for.
    """

    words: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    threshold: float = 3.0
    distinct: int = 2
    least_words: int = 25

    def __post_init__(self) -> None:
        if not self.words and not self.patterns:
            raise AbliterateError("a style judge needs words or patterns to look for; it has none")
        for pattern in self.patterns:
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise AbliterateError(f"pattern {pattern!r} is not a regular expression: {error}") from error
            if compiled.match(""):
                raise AbliterateError(f"pattern {pattern!r} matches the empty text, so it would be everywhere")

    @cached_property
    def _compiled(self) -> list[re.Pattern[str]]:
        whole = [re.compile(rf"\b(?:{'|'.join(map(_of_word, self.words))})", re.IGNORECASE)] if self.words else []
        return [*whole, *(re.compile(pattern, re.IGNORECASE) for pattern in self.patterns)]

    def marks(self, text: str) -> list[str]:
        """What in a text shows the style, in lower case, as often as it stands there."""
        plain = " ".join(text.translate(_APOSTROPHES).split())
        return [match[0].casefold() for pattern in self._compiled for match in pattern.finditer(plain)]

    def score(self, text: str) -> float:
        """Marks per hundred words."""
        return 100 * len(self.marks(text)) / max(self.least_words, len(_WORD.findall(text)))

    def shows(self, text: str) -> bool:
        """Whether a text shows the style."""
        return len(set(self.marks(text))) >= self.distinct and self.score(text) >= self.threshold


def _of_word(word: str) -> str:
    stem, star = (word[:-1], True) if word.endswith("*") else (word, False)
    return re.escape(" ".join(stem.translate(_APOSTROPHES).split())) + (r"\w*" if star else r"\b")
