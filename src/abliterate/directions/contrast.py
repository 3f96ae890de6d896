"""The rows of tokens that a behaviour's contrast is read from: one prompt under two system prompts, or answers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from abliterate.common.errors import PromptError
from abliterate.common.reporting import Reporter, Silent
from abliterate.directions.activations import Activations, collect_rows, default_positions
from abliterate.measure.coherence import is_degenerate
from abliterate.measure.decode import Answer, decode
from abliterate.measure.judges import Judge
from abliterate.models.handle import Handle
from abliterate.prompts.behaviour import Behaviour, Pair
from abliterate.settings.run import CollectSettings

ANSWER_TOKENS = 48  # of the model's own answers under a system prompt
VALIDATION_SHARE = 0.25  # of the pairs of answers
LEAST_ROWS = 8


@dataclass(frozen=True)
class Rows:
    """Token ids to read a contrast from.

    Attributes:
        target, baseline: token ids of each row: the prompt, and the answer if there is one.
        answers: how many of each row's last tokens are its answer, per side; None where there is none.
        prompts: what the rows of both sides answer, where it is one prompt for both.
    """

    target: list[list[int]]
    baseline: list[list[int]]
    answers: tuple[list[int], list[int]] | None = None
    prompts: tuple[str, ...] = ()

    def said(self, side: int) -> list[list[int]]:
        """The answers of a side (0 target, 1 baseline) without their prompts; none where there are none."""
        rows = (self.target, self.baseline)[side]
        return [row[-n:] for row, n in zip(rows, self.answers[side], strict=True)] if self.answers else []


@contextlib.contextmanager
def under(handle: Handle, system_prompt: str) -> Iterator[None]:
    """The handle with another system prompt, for as long as the context lasts."""
    was = handle.system_prompt
    handle.system_prompt = system_prompt
    try:
        yield
    finally:
        handle.system_prompt = was


def contrast(
    handle: Handle,
    behaviour: Behaviour,
    prompts: Sequence[str],
    judge: Judge,
    *,
    filter: bool = True,
    reporter: Reporter | None = None,
) -> Rows:
    """Rows for a behaviour of kind "system-prompts", or "answers" (its training pairs).

    Under two system prompts the model answers each prompt twice; a pair counts when neither answer is degenerate
    and, with `filter`, the judge finds the behaviour in the first answer and not in the second. Where too few are
    left, all coherent ones count.

    Args:
        handle: the loaded original.
        behaviour: what contrasts.
        prompts: of the training split; asked besides those that the behaviour brings.
        judge: the behaviour's.
        filter: keep only pairs of the model's answers that differ as they should.
        reporter: told how many are kept.

    Raises:
        PromptError: when too few answers under the system prompts are coherent.
    """
    reporter = reporter or Silent()
    if behaviour.kind == "answers":
        return pair_rows(handle, split_pairs(behaviour.pairs)[0])
    systems = behaviour.definition.system_prompts
    assert systems is not None
    prompts = [*systems.prompts, *prompts]
    sides = []
    for system in (systems.target, systems.baseline):
        with under(handle, system):
            sides.append(handle.prompt_ids(prompts))
    if not behaviour.along_answers:
        return Rows(sides[0], sides[1], prompts=tuple(prompts))
    tick = reporter.progress("answering under both system prompts", 2 * len(prompts))
    answers = [decode(handle, ids, max_new_tokens=ANSWER_TOKENS, tick=tick) for ids in sides]
    shown = [judge.judge(prompts, [a.text for a in side]) for side in answers]
    coherent = [i for i in range(len(prompts)) if all(_coherent(side[i]) for side in answers)]
    differing = [i for i in coherent if shown[0][i] and not shown[1][i]]
    kept = differing if filter and len(differing) >= LEAST_ROWS else coherent
    reporter.say(
        f"under the target system prompt {sum(shown[0])} of {len(prompts)} answers are {behaviour.words.shows}, under "
        f"the baseline's {sum(shown[1])}; {len(kept)} prompts count"
        + ("" if kept is differing or not filter else " (all whose answers are coherent: too few differ)")
    )
    if len(kept) < LEAST_ROWS:
        raise PromptError(
            f"{handle.source} gives only {len(kept)} of {len(prompts)} prompts coherent answers under both system "
            f"prompts of {behaviour.source}; at least {LEAST_ROWS} are needed. Give more prompts, or other such prompts"
        )
    rows = [[[*sides[k][i], *answers[k][i].ids] for i in kept] for k in (0, 1)]
    lengths = tuple([len(answers[k][i].ids) for i in kept] for k in (0, 1))
    return Rows(rows[0], rows[1], (lengths[0], lengths[1]), tuple(prompts[i] for i in kept))


def pair_rows(handle: Handle, pairs: Sequence[Pair]) -> Rows:
    """Each pair's two answers after its prompt, as token ids."""
    prompts = handle.prompt_ids([pair.prompt for pair in pairs])
    target = [_tokens(handle, pair.target) for pair in pairs]
    baseline = [_tokens(handle, pair.baseline) for pair in pairs]
    return Rows(
        [[*p, *a] for p, a in zip(prompts, target, strict=True)],
        [[*p, *a] for p, a in zip(prompts, baseline, strict=True)],
        ([len(a) for a in target], [len(a) for a in baseline]),
        tuple(pair.prompt for pair in pairs),
    )


def split_pairs(pairs: Sequence[Pair], seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Pairs for the direction, and a quarter held out."""
    order = list(pairs)
    random.Random(seed).shuffle(order)
    held_out = max(2, round(VALIDATION_SHARE * len(order)))
    return order[held_out:], order[:held_out]


def collect_contrast(
    handle: Handle,
    rows: Rows,
    settings: CollectSettings,
    *,
    keep_vectors: bool = False,
    reporter: Reporter | None = None,
) -> Activations:
    """The stream's statistics over a contrast: along the answers, or at the prompts' last positions."""
    reporter = reporter or Silent()
    return collect_rows(
        handle,
        rows.target,
        rows.baseline,
        positions=settings.positions or default_positions(handle),
        answers=rows.answers,
        batch_size=settings.batch_size,
        winsorise=settings.winsorise,
        keep_vectors=keep_vectors,
        tick=reporter.progress("collecting activations", len(rows.target) + len(rows.baseline)),
    )


def _tokens(handle: Handle, text: str) -> list[int]:
    return list(handle.tokenizer(text, add_special_tokens=False)["input_ids"])


def _coherent(answer: Answer) -> bool:
    return len(answer.ids) >= 4 and not is_degenerate(answer.text, finished=answer.finished)
