"""A cheap stand-in for refusing: how the model would open its answer, learnt from its own refusals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.reporting import untold
from abliterate.models.batches import in_passes, inputs, share_prefix
from abliterate.models.handle import Handle
from abliterate.models.replicas import spread


@torch.inference_mode()
def first_token(handle: Handle, ids: Sequence[Sequence[int]], *, batch_size: int = 32) -> Float[Tensor, "prompt vocab"]:
    """Log-probabilities of the first answer token of each prompt, float32, on the CPU."""
    if handle.workers is not None:
        lengths = [len(row) for row in ids]
        return torch.stack(
            spread(handle, _first_shard, batch_size, lengths, lambda part: [ids[i] for i in part], untold)
        )
    rows: list[Tensor | None] = [None] * len(ids)
    prefix = share_prefix(handle, ids)

    def run(part: Sequence[int]) -> Tensor:
        logits, _ = handle.last_logits(**inputs(handle, [ids[i] for i in part], prefix))
        return logits[:, -1].float().log_softmax(-1).cpu()

    for part, logprobs in in_passes(handle, ids, batch_size, prefix.length, run, 1):
        for place, index in enumerate(part):
            rows[index] = logprobs[place]
    return torch.stack([row for row in rows if row is not None])


def _first_shard(handle: Handle, batch_size: int, ids: list[list[int]]) -> list[Float[Tensor, " vocab"]]:
    return list(first_token(handle, ids, batch_size=batch_size))


def refusal_weights(
    refused: Float[Tensor, "target vocab"], answered: Float[Tensor, "baseline vocab"]
) -> Float[Tensor, " vocab"]:
    """How much each first token speaks for a refusal: its share among openings of refusals, against answers.

    No word list: a token's weight is p_refused / (p_refused + p_answered), from the model's mean
    distributions over prompts it refuses and over prompts it answers.

    Args:
        refused, answered: log-probabilities of the original's first tokens on the two kinds of prompts.
    """
    p, q = refused.exp().mean(0), answered.exp().mean(0)
    return p / (p + q + 1e-6)


def refusal_log_odds(
    logprobs: Float[Tensor, "prompt vocab"], weights: Float[Tensor, " vocab"]
) -> Float[Tensor, " prompt"]:
    """log(s / (1 - s)) of s = sum_t p(t) w(t), the share of an opening that speaks for refusing.

    The refusal metric of Arditi et al. 2024 (section 2.3), with the weights learnt instead of listed.
    """
    share = (logprobs.exp() @ weights).double().clamp(1e-6, 1 - 1e-6)
    return (share / (1 - share)).log()


def first_token_divergence(original: Float[Tensor, "prompt vocab"], edited: Float[Tensor, "prompt vocab"]) -> float:
    """Mean KL(original || edited) over prompts, in nats."""
    return float((original.exp() * (original - edited)).sum(-1).double().mean())
