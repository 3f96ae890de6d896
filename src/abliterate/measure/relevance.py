"""Is an answer about its prompt? By a model's own probabilities, with no list of words.

How much likelier an answer is behind its own prompt than behind others, per token: the pointwise mutual information of
prompt and answer. A stock sentence gains nothing from its prompt, whatever it says; an answer gains a nat and more.
A refusal that speaks of the subject gains too: that is for judges who read. An answer that opens politely ("Sure, I'd
be happy to help you with that") comes to its prompt later, so one that gains nothing at first is read on.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from jaxtyping import Float
from torch import Tensor

from abliterate.common.reporting import Tick, untold
from abliterate.measure.decode import Answer
from abliterate.measure.divergence import read_each, summed_loss
from abliterate.models.handle import Handle

OTHERS = 2  # prompts that an answer is put behind besides its own
TOKENS = 16  # of an answer that are read at a time
STRETCHES = 3  # such stretches that are read of an answer at most
FEWEST = 3  # tokens; of shorter answers nothing can be said, nor of a later stretch of less than half its tokens
SHARE = 0.15  # of the median baseline answer's relevance; what is below says nothing about its prompt


def relevances(
    handle: Handle, prompts: Sequence[str], answers: Sequence[Answer], wanted: Sequence[int], tick: Tick = untold,
    stretch: int = 0,
) -> list[float]:  # fmt: skip
    """The relevance of some answers to their prompts, in nats per token; infinite for those too short to tell.

    Args:
        handle: whose probabilities count: the original, where it is at hand.
        prompts: at least two, all different; the other prompts are taken from them.
        answers: one per prompt.
        wanted: indices of the answers to look at.
        tick: told how many forward rows are done.
        stretch: which `TOKENS` tokens of an answer count, given those before; minus infinity where it has ended.
    """
    ids = handle.prompt_ids(prompts)
    start, fewest = stretch * TOKENS, TOKENS // 2 if stretch else FEWEST
    looked, rows, tokens = [], [], []
    apart = max(1, len(prompts) // (OTHERS + 1))
    for i in wanted if len(prompts) > 1 else ():
        said = _said(handle, answers[i])
        before = [ids[i], *(ids[(i + step * apart) % len(ids)] for step in range(1, min(OTHERS, len(prompts) - 1) + 1))]
        room = handle.context_length - max(map(len, before)) + 1 if handle.context_length else len(said)
        end = min(start + TOKENS, max(1, room))  # behind the longest of the prompts too
        own = said[start:end]
        if len(own) < fewest and (stretch or len(said) < FEWEST):
            continue
        looked.append(i)
        for prompt in before:
            rows.append([*prompt, *said[: start + len(own) - 1]])
            tokens.append(own)
    losses = read_each(handle, rows, tokens, _loss, [None] * len(rows), tick)
    each = len(rows) // len(looked) if looked else 1
    found = {i: fmean(losses[n * each + 1 : (n + 1) * each]) - losses[n * each] for n, i in enumerate(looked)}
    return [found.get(i, float("-inf" if stretch else "inf")) for i in wanted]


def _loss(logprobs: Float[Tensor, "token vocab"], answer: Sequence[int], _: None) -> float:
    return summed_loss(logprobs, answer) / len(answer)


def _said(handle: Handle, answer: Answer) -> list[int]:
    """The tokens of an answer; of one behind its reasoning, which speaks of the prompt anyway, the answer alone."""
    if answer.reasoning is None:
        return answer.whole
    return list(handle.tokenizer(answer.text, add_special_tokens=False)["input_ids"])


def floor(baseline: Sequence[float]) -> float:
    """The relevance below which an answer says nothing about its prompt, from that of baseline answers."""
    known = [value for value in baseline if value != float("inf")]
    return max(0.0, SHARE * median(known)) if known else 0.0
