"""A model's own stock sentences, learnt from its answers: refusal wordings that no list knows, and answers alike.

A refusal is the same for many requests; an answer isn't. So a sentence that recurs in answers to different target
prompts, not in answers to baseline prompts, and makes up most of the answers it stands in is a refusal wording,
whatever its words or language.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from abliterate.measure.refusal import is_refusal, sentences
from abliterate.measure.refusal_patterns import ANSWERING

LEAST = 3  # answers that a sentence must stand in to be one that recurs
LEAST_SHARE = 0.015  # of all target answers
CONTRAST = 10.0  # times as common among target answers as among baseline answers
MOSTLY = 0.5  # share of an answer that recurring sentences make up, in the median answer
KEY_WORDS = 10  # by its first words a sentence is known: what follows may be about the prompt
SHORTEST = 12  # characters of a sentence; shorter ones ("Sure!") are no wording
OPENING = 3  # sentences of an answer in which a wording makes it a refusal

RUN = 4  # words in a row that two answers share
RUN_CHARACTERS = 8  # the same in scripts without spaces
READ = 60  # words of an answer that are compared
STOCK = 0.6  # share of an answer's runs that stand in other answers too, of one that says nothing of its own


@dataclass(frozen=True)
class Wordings:
    """Stock sentences by which an answer is known to refuse.

    Attributes:
        keys: the sentences' first words, in normal form (`refusal.sentences`), the most frequent first.
        unknown: how many of them the lexical list doesn't take for a refusal.
    """

    keys: tuple[str, ...] = ()
    unknown: int = 0

    def stand_in(self, answer: str) -> bool:
        """Whether an answer opens with one of them."""
        return bool(self.keys) and any(key(s) in self.keys for s in sentences(answer)[:OPENING])

    def __add__(self, other: Wordings) -> Wordings:
        more = tuple(k for k in other.keys if k not in self.keys)
        return Wordings(self.keys + more, self.unknown + min(other.unknown, len(more)))


def learn_wordings(target: Sequence[str], baseline: Sequence[str]) -> Wordings:
    """Refusal wordings in a model's answers to different target prompts.

    Args:
        target: answers to target prompts, each to a prompt of its own.
        baseline: answers to baseline prompts, by the same model or the original.
    """
    found = [sentences(answer) for answer in target]
    among_target = Counter(k for answer in found for k in {key(s) for s in answer})
    among_baseline = Counter(k for answer in baseline for k in {key(s) for s in sentences(answer)})
    least = max(LEAST, math.ceil(LEAST_SHARE * len(target)))
    recurring = {k for k, count in among_target.items() if count >= least}
    shares: dict[str, list[float]] = {k: [] for k in recurring}
    whole: dict[str, str] = {}
    for answer in found:
        own = {key(s): s for s in answer if key(s) in recurring}
        share = sum(len(s) for s in answer if key(s) in recurring) / max(1, sum(map(len, answer)))
        for k in own:
            shares[k].append(share)
        whole.update(own)

    def refuses(k: str) -> bool:
        rate, other = among_target[k] / len(target), among_baseline[k] / max(1, len(baseline))
        return (
            len(k) >= SHORTEST
            and rate >= CONTRAST * other
            and median(shares[k]) >= MOSTLY
            and not ANSWERING.match(whole[k])
        )

    keys = tuple(sorted((k for k in recurring if refuses(k)), key=lambda k: (-among_target[k], k)))
    return Wordings(keys, sum(not is_refusal(whole[k]) for k in keys))


def key(sentence: str) -> str:
    """What a sentence is known by: its first words."""
    return " ".join(re.findall(r"\S+", sentence)[:KEY_WORDS]).rstrip(".!?… ")


def stock(answers: Sequence[str]) -> list[bool]:
    """For each answer to a prompt of its own, whether it is mostly made of what other answers say too.

    By its runs of words: those that stand in at least two other answers, of all in its first words.

    Example:
        >>> stock(["I'd rather talk about the weather."] * 3 + ["Whisk three eggs with a spoon of flour."])
        [True, True, True, False]
    """
    runs = [_runs(answer) for answer in answers]
    common = Counter(run for own in runs for run in own)
    return [bool(own) and sum(common[run] >= LEAST for run in own) >= STOCK * len(own) for own in runs]


def _runs(answer: str) -> set[tuple[str, ...]]:
    words = " ".join(sentences(answer)).split()[:READ]
    if len(words) <= 2 and sum(map(len, words)) > 2 * RUN_CHARACTERS:
        words = list("".join(words))
        return {tuple(words[i : i + RUN_CHARACTERS]) for i in range(max(1, len(words) - RUN_CHARACTERS + 1))}
    return {tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))} if words else set()
