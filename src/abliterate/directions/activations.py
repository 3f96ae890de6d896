"""One pass over prompts: the statistics of the residual stream at its sites, without keeping the stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.errors import PromptError
from abliterate.common.reporting import Tick, untold
from abliterate.models.batches import Prefix, in_passes, inputs, share_prefix
from abliterate.models.handle import Handle, check_finite
from abliterate.models.replicas import shards
from abliterate.models.writers import SITES, layout, watch_sites
from abliterate.prompts.chat import instruction_suffix_length

MOST_POSITIONS = 5
Look = Callable[[list[int], int, str, Tensor], None]


@dataclass
class SideStatistics:
    """What is kept of one side's prompts.

    Attributes:
        count: number of prompts.
        mean: [layer, site, position, d_model] float64, the mean stream.
        variance: [layer, site, position] float64, the summed variance over d_model.
        vectors: [prompt, layer, site, position, d_model] float32, or None unless asked for.
    """

    count: int
    mean: Float[Tensor, "layer site position d_model"]
    variance: Float[Tensor, "layer site position"]
    vectors: Float[Tensor, "prompt layer site position d_model"] | None = None


@dataclass
class Activations:
    """The stream's statistics on both sides.

    Sites run `pre`, `mid`, `post`; position index i is token i - positions of the prompt (the last index
    is position -1). A parallel block has no `mid`: its entries are NaN.
    """

    target: SideStatistics
    baseline: SideStatistics
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return self.target.mean.shape[0]

    @property
    def positions(self) -> int:
        return self.target.mean.shape[2]

    @property
    def d_model(self) -> int:
        return self.target.mean.shape[3]


class _Running:
    """Sums in float64 that give mean and variance; updated batch by batch around a first guess of the mean."""

    def __init__(self, keep: bool) -> None:
        self.count = 0
        self.keep: list[Tensor] | None = [] if keep else None
        self.order: list[int] = []
        self.offset: Tensor | None = None

    def add(self, stream: Float[Tensor, "prompt layer site position d_model"], order: Sequence[int]) -> None:
        if self.offset is None:
            self.offset = stream.mean(0, dtype=torch.float64)
            self.total = torch.zeros_like(self.offset)
            self.squares = torch.zeros_like(self.offset[..., 0])
        for one in stream:  # prompt by prompt: the whole batch in float64 would be most of the memory
            around = one - self.offset
            self.total += around
            self.squares += around.square().sum(-1)
        self.count += len(stream)
        if self.keep is not None:
            self.keep.append(stream.float().cpu())
            self.order.extend(order)

    def done(self) -> SideStatistics:
        assert self.offset is not None
        shift = self.total / self.count
        variance = (self.squares / self.count - shift.square().sum(-1)).clamp_min(0)
        vectors = None
        if self.keep is not None:
            vectors = torch.cat(self.keep)[torch.tensor(self.order).argsort()]
        return SideStatistics(self.count, (self.offset + shift).cpu(), variance.cpu(), vectors)


def default_positions(handle: Handle) -> int:
    """As many last positions as the chat template adds after the instruction, at most 5."""
    suffix = instruction_suffix_length(
        handle.tokenizer,
        system_prompt=handle.system_prompt,
        chat_template=handle.chat_template,
        prefill=handle.prefill,
        switches=handle.template_switches,
    )
    return max(1, min(MOST_POSITIONS, suffix))


def collect(
    handle: Handle,
    target: Sequence[str],
    baseline: Sequence[str],
    *,
    positions: int | None = None,
    batch_size: int = 32,
    winsorise: float | None = None,
    keep_vectors: bool = False,
    tick: Tick = untold,
) -> Activations:
    """Means and variances of the stream at every site, over target and over baseline prompts.

    One forward pass per batch without logits; the prefix that all prompts share is run once; statistics
    are summed in float64, so memory doesn't grow with the number of prompts.

    Args:
        handle: a loaded model.
        target: prompts that show the behaviour.
        baseline: prompts that don't.
        positions: last token positions to read; None takes `default_positions`.
        batch_size: most prompts in a batch.
        winsorise: clamp each activation vector to this quantile of its absolute entries (e.g. 0.995),
            against outliers; None leaves it as it is.
        keep_vectors: keep every prompt's activations too.
        tick: called with the number of prompts done.

    Raises:
        PromptError: when a side is empty.
        NonFiniteError: naming the layer where the stream is NaN or infinite.

    Example:
        >>> acts = collect(h, ["Write a virus"], ["Write a poem"])
        >>> acts.target.mean.shape  # layer, site, position, d_model
        torch.Size([30, 3, 5, 576])
    """
    if not len(target) or not len(baseline):
        raise PromptError("collecting needs prompts on both sides; one side is empty")
    positions = positions or default_positions(handle)
    sides = [handle.prompt_ids(target), handle.prompt_ids(baseline)]
    shortest = min(len(row) for side in sides for row in side)
    if shortest < positions:
        raise PromptError(f"a prompt has only {shortest} tokens, fewer than the {positions} positions asked for")
    prefix = None if handle.workers is not None else share_prefix(handle, sides[0] + sides[1], keep=positions)
    asked = _Asked(positions, batch_size, winsorise, keep_vectors)
    found = [_side(handle, asked, ids, None, prefix, tick) for ids in sides]
    return Activations(found[0], found[1])


def collect_rows(
    handle: Handle,
    target: Sequence[Sequence[int]],
    baseline: Sequence[Sequence[int]],
    *,
    positions: int = 1,
    answers: tuple[Sequence[int], Sequence[int]] | None = None,
    batch_size: int = 32,
    winsorise: float | None = None,
    keep_vectors: bool = False,
    tick: Tick = untold,
) -> Activations:
    """`collect` over token ids, at their last positions or averaged along the answers that they end with.

    Args:
        handle: a loaded model.
        target, baseline: token ids of each row.
        positions: last positions to read, where `answers` is None.
        answers: how many of each row's last tokens are its answer, per side: what is kept of a row is then the mean
            of the stream over them, as one position.
        batch_size, winsorise, keep_vectors, tick: as for `collect`.

    Raises:
        PromptError: when a side is empty, or a row is shorter than what is read of it.
        NonFiniteError: naming the layer where the stream is NaN or infinite.
    """
    statistics, asked = [], _Asked(positions, batch_size, winsorise, keep_vectors)
    for place, ids in enumerate((target, baseline)):
        if not len(ids):
            raise PromptError("collecting needs rows on both sides; one side is empty")
        lengths = answers[place] if answers else [positions] * len(ids)
        if not all(0 < length <= len(row) for row, length in zip(ids, lengths, strict=True)):
            raise PromptError("an answer is empty, or a row is shorter than what is to be read of it")
        statistics.append(_side(handle, asked, ids, list(lengths) if answers else None, None, tick))
    return Activations(statistics[0], statistics[1])


class _Asked(NamedTuple):
    """What is read of each row, and how: as for `collect_rows`."""

    positions: int
    batch_size: int
    winsorise: float | None
    keep_vectors: bool


@torch.inference_mode()
def _side(
    handle: Handle, asked: _Asked, ids: Sequence[Sequence[int]], along: Sequence[int] | None,
    prefix: Prefix | None = None, tick: Tick = untold,
) -> SideStatistics:  # fmt: skip
    if handle.workers is not None:
        parts = shards([len(row) for row in ids])
        calls = [([ids[i] for i in part], along and [along[i] for i in part]) for part in parts]
        return merged(handle.workers.map(handle, _side_shard, asked, calls, lambda i: tick(len(parts[i]))), parts)
    running = _Running(asked.keep_vectors)
    shared = prefix or share_prefix(handle, ids, keep=max(along or [asked.positions]))

    def read(part: Sequence[int]) -> Tensor:
        lengths = [along[i] for i in part] if along else None
        return _read(handle, [ids[i] for i in part], shared, asked.positions, lengths)

    for part, stream in in_passes(handle, ids, asked.batch_size, shared.length, read):
        check_finite(stream.transpose(0, 1)[:, :, ::2], f"model {handle.source}")
        running.add(winsorised(stream, asked.winsorise) if asked.winsorise else stream, part)
        tick(len(part))
    return running.done()


def _side_shard(handle: Handle, asked: _Asked, call: tuple[list[list[int]], list[int] | None]) -> SideStatistics:
    return _side(handle, asked, *call)


def merged(statistics: Sequence[SideStatistics], rows: Sequence[Sequence[int]]) -> SideStatistics:
    """The statistics of all rows, in float64, from those of parts; `rows` are the indices of each part's rows."""
    share = torch.tensor([float(part.count) for part in statistics], dtype=torch.float64)
    share /= share.sum()
    means = torch.stack([part.mean for part in statistics])
    mean = torch.einsum("n,n...->...", share, means)
    within = torch.stack([part.variance for part in statistics]) + (means - mean).square().sum(-1)
    variance, vectors = torch.einsum("n,n...->...", share, within), None
    if statistics[0].vectors is not None:
        order = torch.tensor([i for part in rows for i in part]).argsort()
        vectors = torch.cat([part.vectors for part in statistics if part.vectors is not None])[order]
    return SideStatistics(sum(part.count for part in statistics), mean, variance, vectors)


def _read(
    handle: Handle, rows: Sequence[Sequence[int]], prefix: Prefix, positions: int, along: Sequence[int] | None = None
) -> Float[Tensor, "prompt layer site position d_model"]:
    """The stream of one batch at every site's last positions, on the CPU in the model's dtype.

    With `along`, the mean over so many last tokens of each row instead, in float32.
    """
    read: Tensor | None = None

    def look(layer: int, site: str, stream: Tensor) -> None:
        nonlocal read
        last = stream[:, -positions:] if along is None else _means(stream, along)
        if read is None:
            shape = (len(rows), handle.layers, len(SITES), *last.shape[1:])
            read = torch.full(shape, float("nan"), dtype=last.dtype)
        # Copied, not kept: a view would hold on to the whole stream, and change when a model adds in place.
        read[:, layer, SITES.index(site)] = last

    arguments = inputs(handle, rows, prefix)
    with watch_sites(handle, look):
        handle.hidden_states(**arguments)
    assert read is not None
    return read


@torch.inference_mode()
def watched(
    handle: Handle, prompts: Sequence[str], look: Look, *, keep: int = 1, batch_size: int = 32, tick: Tick = untold
) -> None:
    """Run prompts and show their streams.

    Args:
        handle: the model.
        prompts: texts.
        look: look(indices of prompts, layer, site, their stream [prompt token d_model]), for every site. It may see
            prompts again, where memory didn't hold the first try.
        keep: how many last tokens of each prompt the streams have at least.
        batch_size: most prompts at a time.
        tick: told how many prompts are done.
    """
    ids = handle.prompt_ids(prompts)
    prefix = share_prefix(handle, ids, keep=keep)

    def run(part: Sequence[int]) -> None:
        with watch_sites(handle, partial(look, list(part))):
            handle.hidden_states(**inputs(handle, [ids[i] for i in part], prefix))

    for part, _ in in_passes(handle, ids, batch_size, prefix.length, run):
        tick(len(part))


def _means(stream: Float[Tensor, "prompt token d_model"], along: Sequence[int]) -> Float[Tensor, "prompt one d_model"]:
    """Each row's mean over its last tokens, as many as `along` says; rows are padded on the left."""
    means = [row[-length:].float().mean(0) for row, length in zip(stream, along, strict=True)]
    return torch.stack(means)[:, None]


def winsorised(vectors: Float[Tensor, "*any d_model"], quantile: float) -> Float[Tensor, "*any d_model"]:
    """Each vector with its entries clamped to +- the given quantile of their absolute values (Lai 2025)."""
    wide = vectors.float()
    limit = wide.abs().quantile(quantile, dim=-1, keepdim=True)
    return wide.clamp(-limit, limit).to(vectors.dtype)


def sites_with_stream(handle: Handle) -> list[str]:
    """Site names that exist in this model: parallel blocks have no `mid`."""
    has_mid = any(reader is not None for reader in layout(handle).mid_readers)
    return list(SITES) if has_mid else ["pre", "post"]
