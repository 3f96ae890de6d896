"""Running many short sequences with gradients, and computing only what is read.

Sequences that share a prefix are laid one after the other into a few long rows: the prefix once per row, no
padding between them, a mask that lets each see the prefix and itself. Blocks below the first edited one don't
depend on the edit, so what enters that block is computed once per sequence and kept. Logits are computed at
the positions asked for only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from abliterate.models.batches import Prefix, attention_window, inputs, takes_positions
from abliterate.models.handle import Handle, common_prefix
from abliterate.models.memory import free_for, out_of_memory, saved
from abliterate.models.outputs import changed
from abliterate.models.placement import devices_of, offloaded
from abliterate.models.writers import layout

CHUNK = 32  # rows read together up to the first edited block
ROW_TOKENS = 256  # longer rows waste more in attention than they save in prefixes
KEPT_BYTES = 2 * 2**30  # most memory for what enters the first edited block
KEEPING = 0.5  # share of what is free that blocks may keep for the backward pass; logits and their like take the rest


class Row(NamedTuple):
    """A sequence: its token ids and how many of its last positions logits are wanted at."""

    ids: list[int]
    outputs: int


@dataclass
class Packer:
    """Runs rows through a frozen model so that gradients reach whatever hooks put into its blocks.

    Attributes:
        handle: a loaded model; its parameters are never changed.
        rows: every row that may be asked for; they share a prefix.
        first_block: the first block whose output may change; what enters it is kept per row.
        checkpointing: recompute blocks in the backward pass instead of keeping their insides; by default
            when that would take more than half of the memory that is free, going by what the first one keeps, or
            weights are offloaded. Hooks in blocks must then stay until the backward pass is done.
    """

    handle: Handle
    rows: list[Row]
    first_block: int = 0
    checkpointing: bool | None = None
    _entering: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _chunks: list[range] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._chunks = _chunked(0, len(self.rows))
        self.handle.model.requires_grad_(False)
        length = min(common_prefix([r.ids for r in self.rows]), min(len(r.ids) - r.outputs for r in self.rows))
        self.prefix = list(self.rows[0].ids[: max(0, length)])
        self.packs = self._packs_exactly()

    def add(self, rows: Sequence[Row]) -> list[int]:
        """Take in further rows and return their indices.

        Raises:
            ValueError: when one doesn't start with the prefix that the others share.
        """
        if any(row.ids[: len(self.prefix)] != self.prefix for row in rows):
            raise ValueError("a row doesn't start with the prefix that the others share")
        start = len(self.rows)
        self.rows.extend(rows)
        self._chunks += _chunked(start, len(self.rows))
        return list(range(start, len(self.rows)))

    def logprobs(self, picked: Sequence[int]) -> list[Float[Tensor, "output vocab"]]:
        """Log-probabilities (float32) at each picked row's wanted positions, with gradients."""
        states = self._packed(picked) if self.packs else self._padded(picked)
        logits = self.handle.logits(torch.cat(states))
        return list(logits.float().log_softmax(-1).split([len(s) for s in states]))

    def _packed(self, picked: Sequence[int]) -> list[Tensor]:
        lay = _lay(self.prefix, [self.rows[i].ids for i in picked], self.handle)
        entering = self._entering_of(picked, lay)
        with _skipping(self.handle, self.first_block, entering), self._checkpointed():
            states = self._states(lay.arguments)
        return [
            states[row, end - self.rows[i].outputs : end] for i, (row, _, end) in zip(picked, lay.spans, strict=True)
        ]

    def _padded(self, picked: Sequence[int]) -> list[Tensor]:
        """The plain way, for models that don't take a mask of this kind: whole rows, padded on the left."""
        rows = [self.rows[i] for i in picked]
        arguments = inputs(self.handle, [r.ids for r in rows], Prefix(0))
        with self._checkpointed():
            states = self._states(arguments)
        return [states[place, -row.outputs :] for place, row in enumerate(rows)]

    def _states(self, arguments: dict[str, Any]) -> Tensor:
        return self.handle.hidden_states(**arguments).last_hidden_state

    def _entering_of(self, picked: Sequence[int], lay: _Lay) -> Tensor | None:
        """What enters the first edited block [row, position, d_model], unless that isn't kept."""
        if not self.first_block or self._too_much_to_keep() or layout(self.handle).rows_first:
            return None
        if -1 not in self._entering:
            self._read(self._chunks[0])  # the prefix is that of the first rows, whoever is asked for first
        for i in picked:
            if i not in self._entering:
                self._read(next(chunk for chunk in self._chunks if i in chunk))
        prefix = self._entering[-1]
        out = prefix.new_zeros(*lay.arguments["input_ids"].shape, *prefix.shape[1:])
        out[:, : len(prefix)] = prefix
        for i, (row, start, end) in zip(picked, lay.spans, strict=True):
            out[row, start:end] = self._entering[i]
        return out

    @torch.no_grad()
    def _read(self, chunk: range) -> None:
        """Keep what enters the first edited block for rows that are always read together.

        In half precision the states depend on what else is in the batch; so read, they don't depend on the order
        in which rows are asked for, and a resumed fit finds the same ones.
        """
        lay = _lay(self.prefix, [self.rows[i].ids for i in chunk], self.handle)
        with _seen(self.handle.blocks[self.first_block]) as seen, contextlib.suppress(_EnoughError):
            self._states(lay.arguments)
        if chunk.start == 0:
            self._entering[-1] = seen[0][0, : len(self.prefix)].clone()
        for i, (row, start, end) in zip(chunk, lay.spans, strict=True):
            self._entering[i] = seen[0][row, start:end].clone()

    def _too_much_to_keep(self) -> bool:
        tokens = sum(len(r.ids) - len(self.prefix) for r in self.rows)
        return tokens * self.handle.d_model * self.handle.dtype.itemsize > KEPT_BYTES

    @contextlib.contextmanager
    def _checkpointed(self) -> Iterator[None]:
        handle, blocks = self.handle, list(self.handle.blocks)
        keeping = _Keeping(handle, len(blocks) - self.first_block, self.checkpointing)
        if self.checkpointing is None and offloaded(handle.model):
            keeping.too_much = True  # what backward keeps would hold every weight brought
        try:
            if torch.is_grad_enabled() and self.checkpointing is not False:
                for i, block in enumerate(blocks[self.first_block :], start=self.first_block):
                    handle.blocks[i] = _Checkpointed(block, keeping)
            yield
        finally:
            for i, block in enumerate(blocks):
                handle.blocks[i] = block

    @torch.no_grad()
    def _packs_exactly(self) -> bool:
        """Whether packed rows give the states that plain ones give; tried out on a few."""
        window = attention_window(self.handle)
        longest = max(len(r.ids) for r in self.rows)
        if not takes_positions(self.handle) or (window is not None and longest > window):
            return False
        picked = list(range(len(self.rows)))[:3]
        try:
            packed, plain = (torch.cat(way(picked)).double() for way in (self._packed, self._padded))
        except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, IndexError) as error:
            if out_of_memory(error):
                raise
            return False
        finally:
            self._entering.clear()
        apart = (packed - plain).norm() / plain.norm()
        return bool(apart < (1e-3 if self.handle.dtype == torch.float32 else 0.05))


class _Lay(NamedTuple):
    """Rows laid one after the other: the model's arguments, and (row, start, end) of each one's own tokens."""

    arguments: dict[str, Any]
    spans: list[tuple[int, int, int]]
    tokens: int


def _lay(prefix: Sequence[int], rows: Sequence[Sequence[int]], handle: Handle) -> _Lay:
    own = [list(row[len(prefix) :]) for row in rows]
    bins = _bins([len(o) for o in own], ROW_TOKENS)
    width = len(prefix) + max(sum(len(own[i]) for i in members) for members in bins)
    ids = torch.full((len(bins), width), handle.tokenizer.pad_token_id or 0)
    positions = torch.zeros(len(bins), width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(bins), 1, 1)  # what is left over sees itself
    past = torch.ones(width, width, dtype=torch.bool).tril()
    spans: list[tuple[int, int, int]] = [(0, 0, 0)] * len(rows)
    first = len(prefix)
    for row, members in enumerate(bins):
        ids[row, :first] = torch.tensor(prefix, dtype=torch.long)
        positions[row, :first] = torch.arange(first)
        sees[row, :first] = past[:first]
        start = first
        for i in members:
            end = start + len(own[i])
            ids[row, start:end] = torch.tensor(own[i])
            positions[row, start:end] = torch.arange(first, first + len(own[i]))
            sees[row, start:end, :first] = True
            sees[row, start:end, start:end] = past[: end - start, : end - start]
            spans[i] = (row, start, end)
            start = end
    mask = torch.zeros(len(bins), 1, width, width, dtype=handle.dtype)
    mask.masked_fill_(~sees[:, None], torch.finfo(handle.dtype).min)
    arguments = {
        "input_ids": ids.to(handle.device),
        "attention_mask": mask.to(handle.device),
        "position_ids": positions.to(handle.device),
        "use_cache": False,
    }
    return _Lay(arguments, spans, ids.numel())


def _bins(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices grouped so that each group's sizes add up to at most `most` (first fit, largest first)."""
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for place, (used, members) in enumerate(bins):
            if used + sizes[index] <= most:
                bins[place] = (used + sizes[index], [*members, index])
                break
        else:
            bins.append((sizes[index], [index]))
    return [members for _, members in bins]


class _Passing(nn.Module):
    """Stands in for a block; what the decoder asks of the block's attributes, the block answers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not as a submodule: the block's names stay what they are

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)


class _Skipped(_Passing):
    """A block left out: hands on what it is given, or the states known to come out of it."""

    def __init__(self, block: nn.Module, states: Tensor | None) -> None:
        super().__init__(block)
        self.__dict__["states"] = states

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        states = self.__dict__["states"]
        return hidden_states if states is None else states


@dataclass
class _Keeping:
    """Whether blocks keep too much for the backward pass: known, or told by what the first of them keeps."""

    handle: Handle
    blocks: int
    too_much: bool | None

    def measured(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        with saved(block) as kept:
            out = block(*args, **kwargs)
        free = free_for(self.handle) * len(devices_of(self.handle.model))
        self.too_much = kept.bytes * self.blocks > KEEPING * free
        return out


class _Checkpointed(_Passing):
    """A block whose insides are computed again in the backward pass, where keeping them takes too much."""

    def __init__(self, block: nn.Module, keeping: _Keeping) -> None:
        super().__init__(block)
        self.__dict__["keeping"] = keeping

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block, keeping = self.__dict__["block"], self.__dict__["keeping"]
        if keeping.too_much is None:
            return keeping.measured(block, args, kwargs)
        if not keeping.too_much:
            return block(*args, **kwargs)
        return checkpoint(block, *args, use_reentrant=False, **kwargs)


@contextlib.contextmanager
def _skipping(handle: Handle, first_block: int, entering: Tensor | None) -> Iterator[None]:
    """Leave out the blocks below the first edited one when what enters it is known."""
    below = [] if entering is None else list(handle.blocks)[:first_block]
    try:
        for i, block in enumerate(below):
            handle.blocks[i] = _Skipped(block, entering if i == 0 else None)
        yield
    finally:
        for i, block in enumerate(below):
            handle.blocks[i] = block


def _chunked(start: int, end: int) -> list[range]:
    return [range(first, min(first + CHUNK, end)) for first in range(start, end, CHUNK)]


class _EnoughError(Exception):
    """Raised inside a forward pass whose rest isn't wanted."""


@contextlib.contextmanager
def _seen(block: nn.Module) -> Iterator[list[Tensor]]:
    """The stream that enters a block; the pass ends there."""
    seen: list[Tensor] = []

    def look(states: Tensor) -> Tensor:
        seen.append(states.detach())
        raise _EnoughError

    with changed([], [(block, look)]):
        yield seen
