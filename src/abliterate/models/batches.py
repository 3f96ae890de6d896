"""Batches that waste nothing: the prefix all prompts share is run once, and rows of like length go together."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from abliterate.common.errors import ModelError
from abliterate.models.handle import Handle, common_prefix, once
from abliterate.models.memory import in_parts, out_of_memory
from abliterate.models.placement import offloaded
from abliterate.models.pretrained import text_config

PADDING_SHARE = 0.15
AWAY_TOKENS = 16384  # of a batch of a model whose weights are brought for each pass: few passes, and room for states
WORTH = 64  # tokens that a CPU computes while it brings such a model's weights for a pass of their prefix alone
Result = TypeVar("Result")


@dataclass
class Prefix:
    """The leading tokens that all prompts share, with the keys and values they leave behind.

    Attributes:
        length: number of tokens; 0 when nothing is shared or the model can't start from a cache.
        cache: transformers cache of batch size 1, or None.
    """

    length: int
    cache: Any = None

    def expanded(self, rows: int) -> Any:
        """A cache of its own for a batch of `rows`."""
        if self.cache is None:
            return None
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


@torch.inference_mode()
def share_prefix(handle: Handle, ids: Sequence[Sequence[int]], keep: int = 1, room: int = 0) -> Prefix:
    """Run the prompts' common prefix once.

    Padding then stands between the prefix and the rest of a row. Attention that looks back over a window
    counts it as distance, so with a window shorter than the rows nothing is shared.

    Args:
        handle: a loaded model, with the edit to be measured attached or baked.
        ids: token ids of the prompts.
        keep: how many of each prompt's last tokens must stay outside the prefix.
        room: how many tokens will follow a prompt.
    """
    length = min(common_prefix(ids), min(map(len, ids)) - keep)
    window = attention_window(handle)
    if window is not None and max(map(len, ids)) + room > window:
        return Prefix(0)
    least = 4
    if offloaded(handle.model):  # a pass of its own is dear; a card computes many times as fast as weights come
        least = (WORTH if handle.device.type == "cpu" else AWAY_TOKENS) // max(1, len(ids) - 1)
    if length < max(4, least) or not continues_from_cache(handle):
        return Prefix(0)
    return Prefix(length, _run_prefix(handle, ids[0][:length]))


def attention_window(handle: Handle) -> int | None:
    """How many tokens back the model's attention looks where that is limited, as the config has it."""
    config = text_config(handle.model.config)
    names = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
    sizes = [size for size in (getattr(config, name, None) for name in names) if isinstance(size, int)]
    return min(sizes, default=None)


def _run_prefix(handle: Handle, ids: Sequence[int]) -> Any:
    tokens = torch.tensor([list(ids)], device=handle.device)
    return handle.hidden_states_and_cache(input_ids=tokens, use_cache=True)[1]


@once
def continues_from_cache(handle: Handle) -> bool:
    """Whether this model gives the same states when a padded batch starts from a cached prefix.

    Tried out on a few tokens, once per handle: recurrent and hybrid models may not.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, min(handle.vocabulary, 1000), (2, 14), generator=generator).tolist()
    rows = [tokens[0][:6] + tokens[0][6:12], tokens[0][:6] + tokens[1][6:14]]

    def from_prefix() -> Tensor:
        prefix = Prefix(6, _run_prefix(handle, rows[0][:6]))
        return handle.hidden_states(**inputs(handle, rows, prefix)).last_hidden_state[:, -1]

    return as_alone(handle, rows, from_prefix)


@torch.inference_mode()
def as_alone(handle: Handle, rows: Sequence[Sequence[int]], together: Callable[[], Tensor]) -> bool:
    """Whether a way to run rows together leaves the states [row, d_model] that each has when it is run alone.

    False where the model doesn't run that way at all.
    """
    try:
        ours = together().float()
        ids = (torch.tensor([list(row)], device=handle.device) for row in rows)
        alone = torch.stack([handle.hidden_states(input_ids=row).last_hidden_state[0, -1] for row in ids]).float()
    except (ModelError, TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, IndexError) as error:
        if out_of_memory(error):
            raise
        return False
    apart = (ours - alone).norm(dim=-1) / alone.norm(dim=-1)
    return bool((apart < (1e-3 if handle.dtype == torch.float32 else 0.1)).all())


def inputs(handle: Handle, rows: Sequence[Sequence[int]], prefix: Prefix) -> dict[str, Any]:
    """Arguments for a forward pass over left-padded rows that start with the prefix.

    Args:
        handle: a loaded model.
        rows: whole token ids, prefix included.
        prefix: what `share_prefix` gave for them.
    """
    rest = [list(row[prefix.length :]) for row in rows]
    width = max(map(len, rest))
    pad = handle.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rest])
    own = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rest])
    mask = torch.cat([torch.ones(len(rows), prefix.length, dtype=own.dtype), own], dim=1)
    device = handle.device
    arguments = {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "cache": prefix.expanded(len(rows)),
        "use_cache": prefix.cache is not None,
    }
    if takes_positions(handle):
        arguments["position_ids"] = positions(mask)[:, prefix.length :].to(device)
    return arguments


def positions(mask: Tensor) -> Tensor:
    """Position ids [batch, position] that count only the tokens a mask [batch, position] keeps."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def takes_positions(handle: Handle) -> bool:
    return "position_ids" in inspect.signature(handle.decoder.forward).parameters


def in_passes(
    handle: Handle, ids: Sequence[Sequence[int]], batch_size: int, shared: int,
    run: Callable[[Sequence[int]], Result], outputs: int = 0,
) -> Iterator[tuple[Sequence[int], Result]]:  # fmt: skip
    """Run all rows of a stage, batch by batch, and in parts where memory doesn't hold a batch.

    Of a model whose weights are brought for each pass, batches are as few as there can be.

    Args:
        handle: the model.
        ids: token ids of the rows.
        batch_size, shared: as for `buckets`.
        run: runs the rows of some indices.
        outputs: at how many tokens of a row logits are wanted.

    Yields:
        Indices of rows, and what running these gave.

    Raises:
        ModelError: when memory doesn't hold one row.
    """
    lengths, padding = [len(row) for row in ids], PADDING_SHARE
    if offloaded(handle.model):
        width = max(1, max(lengths, default=1) - shared)
        batch_size, padding = max(batch_size, AWAY_TOKENS // width), 1.0
    for batch in buckets(lengths, batch_size, shared, padding):
        yield from in_parts(handle, batch, run, lengths[batch[0]], outputs)


def buckets(
    lengths: Sequence[int], batch_size: int, shared: int = 0, padding: float = PADDING_SHARE
) -> Iterator[list[int]]:
    """Indices of rows, batch by batch: longest first, at most `batch_size`, little padding.

    Args:
        lengths: tokens per row.
        batch_size: most rows in a batch.
        shared: tokens of each row that cost nothing (the shared prefix).
        padding: largest share of a batch that may be padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batch: list[int] = []
    used = 0
    for index in order:
        own = lengths[index] - shared
        width = lengths[batch[0]] - shared if batch else own
        wasted = width * (len(batch) + 1) - used - own
        if batch and (len(batch) == batch_size or wasted > padding * width * (len(batch) + 1)):
            yield batch
            batch, used = [], 0
        batch.append(index)
        used += own
    if batch:
        yield batch
