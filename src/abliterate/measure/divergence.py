"""How far an edited model's distributions are from the original's, along the original's own answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.common.errors import NonFiniteError
from abliterate.common.reporting import Tick, untold
from abliterate.measure.decode import Answer
from abliterate.models.batches import in_passes, inputs, share_prefix
from abliterate.models.handle import Handle
from abliterate.models.replicas import spread

KEPT = 1024  # likeliest tokens kept of each of the original's distributions
ANSWER_TOKENS = 24
BATCH = 16
Read = TypeVar("Read")


class Divergence(NamedTuple):
    """KL(original || edited) in nats per token, on `prompts` baseline prompts that the original answers.

    Attributes:
        first_token: at the first answer token, averaged over prompts.
        answer: averaged over each answer's first tokens, then over prompts.
        loss: mean negative log-likelihood of the original's own answer tokens, in nats.
        prompts: number of prompts.
    """

    first_token: float
    answer: float
    loss: float
    prompts: int

    def to_json(self) -> dict[str, Any]:
        """As it stands in results.json: without the loss, which stands by itself."""
        return {"first_token": self.first_token, "answer": self.answer, "prompts": self.prompts}


@dataclass
class Reference:
    """The original's distributions along its own answers, kept compactly.

    Attributes:
        rows: prompt and answer token ids, per prompt, without the last answer token.
        answers: answer token ids, per prompt (the end token among them when it comes early enough).
        tokens: per prompt, [token, kept] int32: the likeliest tokens.
        logprobs: per prompt, [token, kept + 1] float32: their log-probabilities, then that of all the rest.
        loss: the original's own mean negative log-likelihood of these answers.
    """

    rows: list[list[int]]
    answers: list[list[int]]
    tokens: list[Int[Tensor, "token kept"]]
    logprobs: list[Float[Tensor, "token kept_and_rest"]]
    loss: float


def make_reference(
    handle: Handle,
    ids: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    *,
    answer_tokens: int = ANSWER_TOKENS,
    kept: int = KEPT,
    tick: Tick = untold,
) -> Reference:
    """Run the original over its own answers and keep what a comparison needs.

    Each distribution is kept as its likeliest tokens and the mass of all others together; the divergence of that
    coarser distribution is a lower bound on the full one, tight to about 1e-4 with 1,024 tokens.

    Args:
        handle: the original model.
        ids: token ids of baseline prompts that it answers.
        answers: its answers to them; none empty of tokens.
        answer_tokens: how many tokens of each answer count.
        kept: how many tokens of each distribution are named.
        tick: told how many answers are read.
    """
    rows, wanted = [], []
    for prompt, answer in zip(ids, answers, strict=True):
        tokens = answer.whole[:answer_tokens]
        rows.append([*prompt, *tokens[:-1]])
        wanted.append(tokens)
    each = read_each(handle, rows, wanted, _kept, [kept] * len(rows), tick)
    likeliest, logprobs, losses = map(list, zip(*each, strict=True)) if each else ([], [], [])
    return Reference(rows, wanted, likeliest, logprobs, sum(losses) / max(1, sum(map(len, wanted))))


def _kept(
    logprobs: Float[Tensor, "token vocab"], answer: Sequence[int], kept: int
) -> tuple[Int[Tensor, "token kept"], Float[Tensor, "token kept_and_rest"], float]:
    top = logprobs.topk(min(kept, logprobs.shape[-1]), dim=-1)
    return top.indices.int().cpu(), _coarse(logprobs, top.indices).cpu(), summed_loss(logprobs, answer)


def compare(handle: Handle, reference: Reference, tick: Tick = untold) -> Divergence:
    """Divergence of a model from the original behind a reference.

    Args:
        handle: the edited model, or the original with an edit attached.
        reference: from `make_reference` on the original.
    """
    each = compare_each(handle, reference, tick)
    count = len(each)
    if not count:
        return Divergence(0.0, 0.0, 0.0, 0)
    first, along, losses = map(sum, zip(*each, strict=True))
    return Divergence(first / count, along / count, losses / sum(map(len, reference.answers)), count)


def compare_each(handle: Handle, reference: Reference, tick: Tick = untold) -> list[tuple[float, float, float]]:
    """The same prompt by prompt: divergence at the first answer token, along the answer (nats per token), and the
    answer's summed negative log-likelihood."""
    originals = list(zip(reference.tokens, reference.logprobs, strict=True))
    return read_each(handle, reference.rows, reference.answers, _apart, originals, tick)


def _apart(
    logprobs: Float[Tensor, "token vocab"], answer: Sequence[int], original: tuple[Tensor, Tensor]
) -> tuple[float, float, float]:
    divergence = _divergence(*original, logprobs.double()).clamp_min(0).cpu()
    return float(divergence[0]), float(divergence.mean()), summed_loss(logprobs, answer)


def reference_divergence(
    reference: Reference, index: int, logprobs: Float[Tensor, "token vocab"]
) -> Float[Tensor, " token"]:
    """KL(original || model) in nats along one answer of a reference; gradients flow through `logprobs`."""
    return _divergence(reference.tokens[index], reference.logprobs[index], logprobs)


def _divergence(
    tokens: Int[Tensor, "token kept"], original: Float[Tensor, "token kept_and_rest"],
    logprobs: Float[Tensor, "token vocab"],
) -> Float[Tensor, " token"]:  # fmt: skip
    original = original.to(logprobs)
    return (original.exp() * (original - _coarse(logprobs, tokens.long().to(logprobs.device)))).sum(-1)


@torch.inference_mode()
def read_each(
    handle: Handle, rows: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], read: Callable[..., Read],
    beside: Sequence[Any], tick: Tick = untold,
) -> list[Read]:  # fmt: skip
    """What a function makes of the log-probabilities at the answer positions of every row.

    Args:
        handle: the model that reads the rows.
        rows: token ids, without the last one of the answer.
        wanted: token ids of the answer that each row ends with.
        read: read(log-probabilities [token, vocab] in float32, answer, beside); of a module, as it may go to workers.
        beside: what `read` needs besides, for each row.
        tick: told how many rows are read.

    Raises:
        NonFiniteError: when logits are NaN or infinite.
    """
    if not rows:
        return []
    if handle.workers is not None:
        columns = (rows, wanted, beside)
        lengths = [len(row) for row in rows]
        return spread(handle, _read_shard, read, lengths, lambda part: [[x[i] for i in part] for x in columns], tick)
    found: dict[int, Read] = {}
    longest = max(map(len, wanted))
    prefix = share_prefix(handle, rows, keep=longest)

    def run(part: Sequence[int]) -> Tensor:
        keep = max(len(wanted[i]) for i in part)
        return handle.last_logits(keep, **inputs(handle, [rows[i] for i in part], prefix))[0]

    for part, logits in in_passes(handle, rows, BATCH, prefix.length, run, longest):
        for place, index in enumerate(part):
            own = logits[place, -len(wanted[index]) :].float().log_softmax(-1)
            if not own.isfinite().any(-1).all() or own.isnan().any():
                raise NonFiniteError(f"model {handle.source}: logits are NaN or infinite; try --dtype float32")
            found[index] = read(own, wanted[index], beside[index])
        tick(len(part))
    return [found[i] for i in range(len(rows))]


def _read_shard(handle: Handle, read: Callable[..., Read], call: tuple[Any, Any, Any]) -> list[Read]:
    rows, wanted, beside = call
    return read_each(handle, rows, wanted, read, beside)


def _coarse(
    logprobs: Float[Tensor, "token vocab"], tokens: Int[Tensor, "token kept"]
) -> Float[Tensor, "token kept_and_rest"]:
    """Log-probabilities of the tokens named, and of all the others together."""
    named = logprobs.gather(-1, tokens)
    if tokens.shape[-1] == logprobs.shape[-1]:
        rest = torch.full_like(named[..., :1], -60.0)
    else:
        rest = logprobs.scatter(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True).clamp_min(-60.0)
    return torch.cat([named.clamp_min(-60.0), rest], dim=-1)


def summed_loss(logprobs: Float[Tensor, "token vocab"], answer: Sequence[int]) -> float:
    """Summed negative log-likelihood of an answer's tokens."""
    ids = torch.tensor(list(answer), device=logprobs.device)
    return float(-logprobs.gather(-1, ids[:, None]).double().sum())
