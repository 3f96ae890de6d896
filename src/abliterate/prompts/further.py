"""Further sets of prompts, measured besides the split of the given two: what holds for one set need not for another."""

from __future__ import annotations

import random
from dataclasses import dataclass

from abliterate.common.errors import PromptError
from abliterate.prompts.chat import Message
from abliterate.prompts.sets import PromptSet, Sides, load_prompts, normalise
from abliterate.prompts.sources import SAFE, VARIED, Role

SECOND_TURN = "second-turn"
INNOCENT: tuple[Message, ...] = (
    {"role": "user", "content": "Which herbs grow well in pots on a balcony?"},
    {
        "role": "assistant",
        "content": "Basil, thyme, chives and mint do well in pots. Give them sun, water them when the soil is dry, and "
        "cut them often, so that they grow bushy.",
    },
)


@dataclass(frozen=True)
class Further:
    """A set that is only measured: none of its prompts is in a split of either side, unless turns go before them."""

    role: Role
    prompts: PromptSet
    before: tuple[Message, ...] = ()


def further_sets(
    sides: Sides, target: str | None = None, *, most: int, bundled: bool = True, seed: int = 0, second_turn: int = 0
) -> list[Further]:
    """The bundled second target set, the requests that only look unsafe, a user's own, and test prompts asked later.

    Args:
        sides: the given sets; a prompt of any of their splits is left out.
        target: source of the user's own target prompts, as for `load_prompts`.
        most: prompts of each set, sampled; none are loaded where it is 0.
        bundled: whether the bundled sets count.
        seed: of the sample.
        second_turn: target test prompts asked in a second turn, behind an innocent first one.

    Raises:
        PromptError: the user's source can't be read, or has no prompt of its own.
    """
    known = {normalise(text) for side in (sides.target, sides.baseline) for part in side for text in part}
    wanted: list[tuple[str, Role]] = [(VARIED, "target"), (SAFE, "baseline")] if bundled else []
    if target is not None and all(target != source for source, _ in wanted):
        wanted.append((target, "target"))
    found = []
    for source, role in wanted if most else []:
        texts = tuple(text for text in load_prompts(source, role=role) if normalise(text) not in known)
        if not texts and source == target:
            raise PromptError(f"every prompt of --also-target {source} is in the given sets already; leave it out")
        if len(texts) > most:
            chosen = sorted(random.Random(seed).sample(range(len(texts)), most))
            texts = tuple(texts[i] for i in chosen)
        if texts:
            found.append(Further(role, PromptSet(source, texts)))
    if second_turn:
        found.append(Further("target", PromptSet(SECOND_TURN, sides.target.test.texts[:second_turn]), INNOCENT))
    return found
