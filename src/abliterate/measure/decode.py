"""Batched greedy decoding that does only the work a verdict needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from abliterate.common.reporting import Tick, untold
from abliterate.measure.refusal import split_reasoning
from abliterate.models.batches import (
    PADDING_SHARE,
    Prefix,
    buckets,
    inputs,
    positions,
    share_prefix,
    takes_positions,
)
from abliterate.models.handle import Handle
from abliterate.models.memory import fitting, footprint, halved, in_parts
from abliterate.models.placement import offloaded
from abliterate.models.replicas import spread
from abliterate.prompts.reasoning import block_at, open_at_end

if TYPE_CHECKING:
    from abliterate.measure.slots import Slots

CHECK_EVERY = 4  # tokens between looks at whether a verdict is settled
BATCH = 256  # rows at a time: on two CPU cores a token costs a tenth less than in batches of 128
PREFILL_TOKENS = 16384  # most tokens of prompts run in one pass: long ones would take memory that short ones don't
REFILL = 1 / 8  # share of a batch that must be free before waiting prompts are run: one by one they cost more
Settled = Callable[[int, str], bool]


@dataclass
class Answer:
    """A greedy answer.

    Attributes:
        ids: its token ids, without the end token.
        text: decoded, special tokens left out.
        finished: whether the model ended it itself.
        stopped: whether decoding stopped because the verdict was settled.
        end: the end token it ended with; a model may have several.
        reasoning: what comes before `text` where the handle `thinks`; None where there is none.
        unclosed: whether it ended inside the reasoning; `text` is empty then.
    """

    ids: list[int]
    text: str
    finished: bool
    stopped: bool
    end: int | None = None
    reasoning: str | None = None
    unclosed: bool = False

    @property
    def whole(self) -> list[int]:
        """Its token ids with the end token it ended with."""
        return [*self.ids, *([self.end] if self.end is not None else [])]


@torch.inference_mode()
def decode(
    handle: Handle,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 100,
    batch_size: int = BATCH,
    settled: Settled | None = None,
    tick: Tick = untold,
    keep_special: bool = False,
) -> list[Answer]:
    """Greedy answers to formatted prompts.

    The shared prefix is run once, rows of like length go in together, logits are computed at the last position
    only, and a row that ended, or whose verdict can no longer change, leaves at once; the next prompt takes its
    place, so the batch stays full. Models that keep more than keys and values (recurrent states, attention
    windows shorter than the row) are decoded batch after batch instead.

    Args:
        handle: a loaded model.
        ids: token ids of each prompt, from `Handle.prompt_ids`.
        max_new_tokens: longest answer.
        batch_size: most rows at a time; fewer where their keys and values would take over `slots.SLOTS_BYTES`, or
            memory doesn't hold them.
        settled: settled(index of the prompt, text so far) is True when decoding that answer can stop.
        tick: called with the number of answers done.
        keep_special: keep special tokens in the texts (to see reasoning marks).

    Returns:
        One answer per prompt, in the prompts' order.
    """
    if not ids:
        return []
    if handle.workers is not None:
        common = settled, {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "keep_special": keep_special}
        lengths = [len(row) for row in ids]
        return spread(handle, _decode_shard, common, lengths, lambda part: (part, [ids[i] for i in part]), tick)
    from abliterate.measure.slots import rows_at_once, takes_slots, token_bytes

    longest = max(map(len, ids))
    prefix = share_prefix(handle, ids, room=max_new_tokens)
    answers = _Answers(handle, ids, max_new_tokens, settled, tick, keep_special)
    capacity = max(len(row) + limit for row, limit in zip(ids, answers.limits, strict=True))
    slots = takes_slots(handle, longest + max_new_tokens)
    if slots:
        batch_size = rows_at_once(token_bytes(handle), capacity, batch_size)
    # half of what is free: prompts have a cache of their own until they are in it
    each = 2 * capacity * footprint(handle).cached + footprint(handle).logits
    batch_size = fitting(handle, min(batch_size, len(ids)), each)
    while waiting := answers.waiting():
        try:
            (_decode_in_slots if slots else _decode_in_batches)(handle, ids, waiting, prefix, batch_size, answers)
        except (RuntimeError, MemoryError) as error:
            batch_size = halved(handle, min(batch_size, len(waiting)), error)
    return answers.all()


def _decode_shard(handle: Handle, common: Any, call: tuple[list[int], list[list[int]]]) -> list[Answer]:
    (settled, options), (part, ids) = common, call
    return decode(handle, ids, settled=settled and (lambda row, text: settled(part[row], text)), **options)


class _Answers:
    """The answers so far, and when each is done."""

    def __init__(
        self, handle: Handle, ids: Sequence[Sequence[int]], max_new_tokens: int, settled: Settled | None,
        tick: Tick, keep_special: bool,
    ) -> None:  # fmt: skip
        self.handle, self.settled, self.tick, self.keep_special = handle, settled, tick, keep_special
        self.tokens: list[list[int]] = [[] for _ in ids]
        self.done: list[Answer | None] = [None] * len(ids)
        self.opened = _opening_mark(handle, ids[0]) if handle.thinks else ""
        # reasoning is long, and every look decodes all of it
        self.every = CHECK_EVERY * 8 if handle.thinks else CHECK_EVERY
        context = handle.context_length
        # learned positions end with the context: the answer ends there at the latest
        self.limits = [
            min(max_new_tokens, max(1, context - len(row) + 1) if context else max_new_tokens) for row in ids
        ]

    def waiting(self) -> list[int]:
        """The prompts whose answers aren't done, at their beginning."""
        rows = [row for row, answer in enumerate(self.done) if answer is None]
        for row in rows:
            self.tokens[row] = []
        return rows

    def add(self, rows: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Append a token to each row's answer; returns which rows are done."""
        done = [self._add(row, token) for row, token in zip(rows, tokens, strict=True)]
        if any(done):
            self.tick(sum(done))
        return done

    def all(self) -> list[Answer]:
        return [answer for answer in self.done if answer is not None]

    def _add(self, row: int, token: int) -> bool:
        tokens = self.tokens[row]
        finished = token in self.handle.end_tokens
        if not finished:
            tokens.append(token)
        last = len(tokens) == self.limits[row]
        look = self.settled is not None and not finished and len(tokens) % self.every == 0
        if not (finished or last or look):
            return False
        text, reasoning, unclosed = self._read(tokens)
        stopped = look and self.settled is not None and not unclosed and self.settled(row, text)
        if finished or last or stopped:
            end = token if finished else None
            self.done[row] = Answer(tokens, text, finished, stopped, end, reasoning, unclosed)
        return self.done[row] is not None

    def _read(self, tokens: Sequence[int]) -> tuple[str, str | None, bool]:
        """The answer, the reasoning before it, and whether that is still open."""
        tokenizer, marks, special = self.handle.tokenizer, self.handle.marks, self.keep_special or self.handle.thinks
        text = tokenizer.decode(tokens, skip_special_tokens=not special)
        if not special and marks and block_at(whole := tokenizer.decode(tokens), 0, marks):
            text, special = whole, True  # marks that aren't known elsewhere are read here
        text = text.rstrip("\ufffd")  # half of a character still to come
        if self.keep_special or not special:
            return text, None, False
        reasoning, answer = split_reasoning(self.opened + text, marks)
        for token in tokenizer.all_special_tokens:
            answer = answer and answer.replace(token, "")
        return (answer or "").lstrip(), reasoning or None, answer is None


def _opening_mark(handle: Handle, ids: Sequence[int]) -> str:
    """The mark of reasoning with which the template ends its prompts, if it does."""
    marks = open_at_end(handle.tokenizer.decode(ids[-16:]), handle.marks)
    return marks.opening if marks else ""


def _likeliest(logits: Tensor) -> list[int]:
    """The likeliest token of each row, the first among equals, from logits [row, 1, vocab]."""
    # widened: over bfloat16 PyTorch's argmax takes as long on a CPU as the head's matrix product
    return logits[:, -1].float().argmax(-1).tolist()


def _decode_in_slots(
    handle: Handle, ids: Sequence[Sequence[int]], waiting: Sequence[int], prefix: Prefix, batch_size: int,
    answers: _Answers,
) -> None:  # fmt: skip
    """Decode the prompts that wait, each in a slot that the next one takes over."""
    from abliterate.measure.slots import Slots

    waiting = sorted(waiting, key=lambda i: -len(ids[i]))
    rows: list[int] = []  # the prompt in each slot
    capacity = max(len(ids[i]) + answers.limits[i] for i in waiting)

    def prefill(part: Sequence[int]) -> tuple[Tensor, Any]:
        return handle.last_logits(**_prompts(handle, [ids[i] for i in part], prefix))

    slots: Slots | None = None
    enough = max(1, int(batch_size * REFILL))
    padding = 1.0 if offloaded(handle.model) else PADDING_SHARE  # a pass more costs more than padding
    while waiting or rows:
        free = batch_size - len(rows)
        if waiting and free >= min(enough, len(waiting)):
            coming, waiting = waiting[:free], waiting[free:]
            own = max(1, max(len(ids[i]) for i in coming) - prefix.length)
            lengths = [len(ids[i]) for i in coming]
            for batch in buckets(lengths, max(1, PREFILL_TOKENS // own), prefix.length, padding):
                part = [coming[i] for i in batch]
                for new, (logits, cache) in in_parts(handle, part, prefill, len(ids[part[0]]), 1):
                    slots = slots or Slots(cache, batch_size, capacity)
                    slots.add(cache, [len(ids[i]) for i in new], prefix.length)
                    rows += new
                    _let_go(slots, rows, answers.add(new, _likeliest(logits)))
            continue
        assert slots is not None
        logits, _ = handle.last_logits(**slots.arguments(handle, [answers.tokens[row][-1] for row in rows]))
        _let_go(slots, rows, answers.add(rows, _likeliest(logits)))


def _let_go(slots: Slots, rows: list[int], done: Sequence[bool]) -> None:
    """Free the slots of the rows that are done; `done` is about the last rows."""
    first = len(rows) - len(done)
    for place in reversed([first + i for i, is_done in enumerate(done) if is_done]):
        slots.drop(place)
        rows[place] = rows[-1]
        rows.pop()


def _prompts(handle: Handle, rows: Sequence[Sequence[int]], prefix: Prefix) -> dict[str, Any]:
    return {**inputs(handle, rows, prefix), "use_cache": True}


def _decode_in_batches(
    handle: Handle, ids: Sequence[Sequence[int]], waiting: Sequence[int], prefix: Prefix, batch_size: int,
    answers: _Answers,
) -> None:  # fmt: skip
    """Decode the prompts that wait, batch by batch: padding costs once, at the prompt; full batches at every step."""
    for batch in buckets([len(ids[i]) for i in waiting], batch_size, prefix.length, padding=1.0):
        _decode_batch(handle, [waiting[i] for i in batch], ids, prefix, answers)


def _decode_batch(
    handle: Handle, batch: Sequence[int], ids: Sequence[Sequence[int]], prefix: Prefix, answers: _Answers
) -> None:
    """Decode one batch to its end; rows that are done leave when enough are."""
    rows = list(batch)  # the prompt in each row of the cache
    alive = [True] * len(rows)
    arguments = _prompts(handle, [ids[i] for i in rows], prefix)
    while True:
        logits, cache = handle.last_logits(**arguments)
        best = _likeliest(logits)
        places = [place for place, is_alive in enumerate(alive) if is_alive]
        for place, done in zip(places, answers.add([rows[p] for p in places], [best[p] for p in places]), strict=True):
            alive[place] = not done
        if not any(alive):
            return
        mask = arguments["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if sum(alive) <= 0.75 * len(rows):
            keep = [place for place, is_alive in enumerate(alive) if is_alive]
            cache.reorder_cache(torch.tensor(keep, device=mask.device))  # recurrent states know no other selection
            rows, best, mask, alive = [rows[p] for p in keep], [best[p] for p in keep], mask[keep], [True] * len(keep)
        arguments = {
            "input_ids": torch.tensor(best, device=handle.device)[:, None],
            "attention_mask": mask,
            "cache": cache,
            "use_cache": True,
        }
        if takes_positions(handle):
            arguments["position_ids"] = positions(mask)[:, -1:]
