"""Keys and values of many answers in progress: a slot per answer, allocated once and written in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from abliterate.common.errors import ModelError
from abliterate.models.batches import Prefix, as_alone, attention_window, inputs, takes_positions
from abliterate.models.handle import Handle, once

SLOTS_BYTES = 4 * 2**30  # most that keys and values of the rows in progress may take
ATTENTIONS = ("sdpa", "eager")  # these take a mask ready made


class Slots(Cache):
    """A transformers cache whose rows are answers of different lengths, each in a slot of its own.

    A token's keys and values lie in the column of its position, so nothing is padded, a row that leaves costs
    one copy of the last row into its slot, and a new one can come in at any step. The growing cache of
    transformers copies itself whole at every step, and its rows stand and fall together.

    Args:
        like: a cache that the model made; its layers' shapes, dtypes and devices are taken.
        slots: most rows.
        capacity: most tokens of a row.
    """

    def __init__(self, like: Any, slots: int, capacity: int) -> None:
        self.lengths: list[int] = []
        step = _Step()
        self._slots = [_SlotLayer(layer, slots, capacity, step) for layer in like.layers]
        super().__init__(layers=list(self._slots))
        self.step = step

    def add(self, cache: Any, lengths: Sequence[int], prefix: int) -> None:
        """Put the rows of a prefilled cache into the next slots.

        Args:
            cache: the cache after a batch made by `batches.inputs`: `prefix` columns, padding, each row's own tokens.
            lengths: tokens of each row, prefix included.
            prefix: columns before the padding.
        """
        first, width = len(self.lengths), max(lengths)
        columns = torch.arange(width)
        padding = torch.tensor([width - length for length in lengths])
        source = (columns + (columns >= prefix) * padding[:, None]).clamp_max(width - 1)
        for own, other in zip(self._slots, cache.layers, strict=True):
            rows, places = torch.arange(len(lengths))[:, None].to(own.device), source.to(own.device)
            for mine, theirs in ((own.keys, other.keys), (own.values, other.values)):
                mine[first : first + len(lengths), :, :width] = theirs[rows, :, places].transpose(1, 2)
        self.lengths += list(lengths)

    def drop(self, slot: int) -> None:
        """Free a slot: the last row moves into it."""
        last = len(self.lengths) - 1
        if slot < last:
            length = self.lengths[last]
            for layer in self._slots:
                layer.keys[slot, :, :length] = layer.keys[last, :, :length]
                layer.values[slot, :, :length] = layer.values[last, :, :length]
            self.lengths[slot] = self.lengths[last]
        self.lengths.pop()

    def arguments(self, handle: Handle, tokens: Sequence[int]) -> dict[str, Any]:
        """Arguments for a forward pass over the next token of every row, which takes its column."""
        self.step.prepare(self.lengths)
        position = torch.tensor(self.lengths)
        hidden = torch.arange(max(self.lengths) + 1) > position[:, None]
        mask = torch.zeros(hidden.shape, dtype=handle.dtype).masked_fill(hidden, float("-inf"))
        self.lengths = [length + 1 for length in self.lengths]
        return {
            "input_ids": torch.tensor(list(tokens))[:, None].to(handle.device),
            "attention_mask": mask[:, None, None].to(handle.device),
            "position_ids": position[:, None].to(handle.device),
            "cache": self,
            "use_cache": True,
        }


class _Step:
    """Which column each row writes at the step being run, on every device that holds a layer."""

    def prepare(self, lengths: Sequence[int]) -> None:
        self.rows, self.width = len(lengths), max(lengths) + 1
        self._columns = torch.tensor(list(lengths))
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on:
            self._on[device] = torch.arange(self.rows, device=device), self._columns.to(device)
        return self._on[device]


class _SlotLayer(DynamicLayer):
    """One layer's slots: keys and values [slot, head, column, width]."""

    keys: Tensor
    values: Tensor

    def __init__(self, like: Any, slots: int, capacity: int, step: _Step) -> None:
        super().__init__()
        self.step = step
        self.keys, self.values = (_empty(tensor, slots, capacity) for tensor in (like.keys, like.values))
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "row head column width"], Float[Tensor, "row head column width"]]:
        """Write one token of every row and give all that is there."""
        step = self.step
        rows, columns = step.places(self.device)
        self.keys[rows, :, columns] = key_states[:, :, 0]
        self.values[rows, :, columns] = value_states[:, :, 0]
        return self.keys[: step.rows, :, : step.width], self.values[: step.rows, :, : step.width]

    def get_seq_length(self) -> int:
        return self.step.width - 1


def _empty(like: Tensor, slots: int, capacity: int) -> Tensor:
    # zeros: what was never written is masked, but not-a-number times zero would still spoil the sum
    return torch.zeros(slots, like.shape[1], capacity, like.shape[3], dtype=like.dtype, device=like.device)


def takes_slots(handle: Handle, tokens: int) -> bool:
    """Whether this model's answers, up to so many tokens with their prompt, can be decoded in slots.

    It can where every layer keeps keys and values of all tokens and positions are passed in, as long as no
    attention window is shorter than the row. Tried out on a few tokens, once per handle.
    """
    window = attention_window(handle)
    if window is not None and tokens > window:
        return False
    return _try_slots(handle)


def rows_at_once(token_bytes: float, tokens: float, rows: int) -> int:
    """At most `rows`, fewer where keys and values of so many tokens a row would take more than `SLOTS_BYTES`.

    A fixed bound, not what is free just now: which rows share a batch decides how bfloat16 rounds, and the same
    command must give the same answers.
    """
    return max(1, min(rows, int(SLOTS_BYTES // max(1.0, token_bytes * tokens))))


@once
@torch.inference_mode()
def token_bytes(handle: Handle) -> float:
    """Bytes that a token's keys and values take in all layers; 0 where the cache is of another kind."""
    ids = torch.arange(4, device=handle.device)[None]
    _, cache = handle.hidden_states_and_cache(input_ids=ids, use_cache=True)
    layers = getattr(cache, "layers", [])
    tensors = [t for layer in layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None) / 4


@once
def _try_slots(handle: Handle) -> bool:
    attention = getattr(handle.model.config, "_attn_implementation", None)
    if not takes_positions(handle) or attention not in ATTENTIONS:
        return False
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(0, min(handle.vocabulary, 1000), (size,), generator=generator).tolist() for size in (7, 10, 12)
    ]

    def in_slots() -> Tensor:
        arguments = {**inputs(handle, [row[:-2] for row in rows], Prefix(0)), "use_cache": True}
        _, cache = handle.hidden_states_and_cache(**arguments)
        if not is_growing(cache):
            raise ModelError("its cache holds more than keys and values")
        slots = Slots(cache, 3, 12)
        slots.add(cache, [len(row) - 2 for row in rows], 0)
        for back in (-2, -1):
            output = handle.hidden_states(**slots.arguments(handle, [row[back] for row in rows]))
        return output.last_hidden_state[:, -1]

    return as_alone(handle, rows, in_slots)


def is_growing(cache: Any) -> bool:
    """Whether a cache holds keys and values alone, one per token: no recurrent state, nothing quantised."""
    return isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized  # type: ignore[union-attr]
        for layer in cache.layers
    )
