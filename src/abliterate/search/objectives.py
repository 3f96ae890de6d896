"""What a search can aim at without gradients: a number for a model, lower is better."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

from abliterate.apply.hooks import attached
from abliterate.common.errors import PromptError
from abliterate.edit.edit import Edit
from abliterate.measure import Judged, judged
from abliterate.measure.decode import BATCH, decode
from abliterate.measure.divergence import Divergence, Reference, compare, make_reference
from abliterate.measure.judges import Judge, LexicalJudge
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle

DECODE_TOKENS = 48


def tried(
    handle: Handle,
    edit: Edit,
    prompts: Sequence[str],
    judge: Judge,
    reference: Reference | None = None,
    **decoding: Any,
) -> tuple[Judged, Divergence | None]:  # fmt: skip
    """Answers with an edit attached, judged, and the divergence behind a reference where there is one.

    Args:
        handle: the loaded original; the edit is gone afterwards.
        edit: what is tried; one that does nothing leaves the model as it is.
        prompts, judge: what is answered, and what decides whether the answers show the behaviour.
        reference: of the original.
        decoding: as for `measure.judged`.
    """
    with attached(handle, edit) if edit.shifts or edit.writers else contextlib.nullcontext():
        answers = judged(handle, prompts, judge, **decoding)
        return answers, compare(handle, reference) if reference is not None else None


class Objective(Protocol):
    """Anything with these two members is an objective.

    Several behaviours at once are a list of objectives: `[Refusals("violence", a), Refusals("medicine", b, keep=True),
    divergence]` removes one, keeps another and stays close to the original.
    """

    name: str

    def score(self, handle: Handle) -> float:
        """The number to make small, of a model with the edit under test attached."""
        ...


class Refusals:
    """How many prompts are refused, by decoded answers; with `keep`, how many are not.

    Args:
        prompts: texts of the user's turns.
        judge: decides what a refusal is; the lexical one by default.
        keep: this behaviour is to stay, so what counts is prompts no longer refused.
        name: tells objectives apart in a study.
        max_new_tokens: longest answer decoded.

    Raises:
        PromptError: when there are no prompts.
    """

    def __init__(
        self, prompts: Sequence[str], judge: Judge | None = None, *, keep: bool = False, name: str = "refusals",
        max_new_tokens: int = DECODE_TOKENS, batch_size: int = BATCH,
    ) -> None:  # fmt: skip
        if not prompts:
            raise PromptError(f"objective {name!r} has no prompts")
        self.prompts, self.judge, self.keep, self.name = list(prompts), judge or LexicalJudge(), keep, name
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def score(self, handle: Handle) -> float:
        _, refused = judged(
            handle, self.prompts, self.judge, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
        )
        return float(sum(refused) if not self.keep else len(refused) - sum(refused))

    def rate(self, score: float) -> Rate:
        """A score as a rate of the prompts."""
        return Rate(int(score), len(self.prompts))


class DivergenceFromOriginal:
    """KL(original || edited) on baseline prompts, in nats per token, averaged over the answers' first tokens.

    Args:
        reference: the original's distributions, from `original_reference` or `measure.divergence.make_reference`.
        name: tells objectives apart in a study.
    """

    def __init__(self, reference: Reference, name: str = "divergence") -> None:
        self.reference, self.name = reference, name

    def score(self, handle: Handle) -> float:
        return compare(handle, self.reference).answer


def original_reference(handle: Handle, baseline: Sequence[str], *, answer_tokens: int = 1) -> Reference:
    """What the original gives on baseline prompts, to compare edits with.

    Args:
        handle: the original model, no edit attached.
        baseline: prompts that it answers.
        answer_tokens: how many tokens of each answer count; 1 is the first-token divergence.

    Raises:
        PromptError: when there are no prompts.
    """
    if not baseline:
        raise PromptError("a divergence needs baseline prompts that the model answers; there are none")
    ids = handle.prompt_ids(baseline)
    answers = decode(handle, ids, max_new_tokens=answer_tokens)
    return make_reference(handle, ids, answers, answer_tokens=answer_tokens)
