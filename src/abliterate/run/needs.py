"""What a run needs of memory, stage by stage, and what is chosen for it: computed from the model's config alone.

What a token takes is measured on a twin without weights (`models.memory`); the rest is counting rows, tokens and logits
as the stages have them. On several cards, weights, keys and values, and what backward keeps are spread evenly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from abliterate.directions.activations import MOST_POSITIONS
from abliterate.measure.decode import BATCH, PREFILL_TOKENS
from abliterate.measure.divergence import ANSWER_TOKENS
from abliterate.measure.divergence import BATCH as COMPARED
from abliterate.measure.slots import rows_at_once
from abliterate.models.batches import buckets
from abliterate.models.handle import Handle
from abliterate.models.memory import USABLE, Footprint, measured
from abliterate.models.writers import SITES
from abliterate.search.fit_settings import FitSettings
from abliterate.search.packed import KEEPING, ROW_TOKENS

GIB = 2**30
PACKED = {"4bit": 0.5 + 1 / 64, "8bit": 1.0}  # bytes of a weight that bitsandbytes packs, its scales among them
FIT_LOGITS = 32  # bytes of a logit in a step of the fit: widened, as log-probabilities, in losses, and gradients
CHECKPOINTS = 3  # states of a token that a block run again leaves: what enters it, and the edit's


class Lengths(NamedTuple):
    """Tokens of prompts, of the prefix that all share, and of the longest answer measured."""

    prompts: Sequence[int]
    shared: int
    answer: int


@dataclass(frozen=True)
class Room:
    """Memory of one of the devices that are the same, and how many of them there are."""

    device: str
    free: float
    count: int = 1


@dataclass(frozen=True)
class Stage:
    """What a stage takes at most on each device, beside the weights, in bytes; and how it is run."""

    bytes: float
    chosen: str


@dataclass(frozen=True)
class Needs:
    """What a run takes of each device.

    Attributes:
        room: the devices.
        weights: bytes on each.
        stages: by name, in the order of a run.
        fits: whether every stage does.
        advice: what to change where it doesn't.
        how: "full precision", "4bit", "8bit" or "offload".
    """

    room: Room
    weights: float
    stages: Mapping[str, Stage]
    fits: bool
    how: str
    advice: str = ""

    @property
    def peak(self) -> int:
        return int(self.weights + max(stage.bytes for stage in self.stages.values()))

    def to_json(self) -> dict[str, Any]:
        stages = {name: {"bytes": int(s.bytes), "chosen": s.chosen} for name, s in self.stages.items()}
        free = int(self.room.free) if math.isfinite(self.room.free) else None
        return {"device": self.room.device, "devices": self.room.count, "free_bytes": free,
                "weight_bytes": int(self.weights), "stages": stages, "fits": self.fits, "how": self.how,
                "advice": self.advice}  # fmt: skip

    def rows(self) -> list[tuple[str, str, str]]:
        """As a table's rows: stage, what it takes on each device, how it is run."""
        each = f" on each of {self.room.count}" if self.room.count > 1 else ""
        held = {"offload": "brought from CPU or disk", "full precision": "as they are loaded"}.get(self.how, self.how)
        return [
            (f"weights{each}", f"{self.weights / GIB:.2f} GiB", held),
            *((name, f"+ {stage.bytes / GIB:.2f} GiB", stage.chosen) for name, stage in self.stages.items()),
            (f"free on {self.room.device}", f"{self.room.free / GIB:.2f} GiB", self.advice or "it fits"),
        ]


@dataclass(frozen=True)
class Model:
    """Sizes of a model, of one without weights too.

    Attributes:
        footprint: what a token takes.
        blocks: how many there are.
        block, outside: bytes of the largest, and of all that is in none, as loaded.
        matrices: numbers in blocks' matrices, which `--quantise` packs (but not stacked experts); item: bytes of one.
        state: bytes of a token's stream.
        vocabulary: rows of the head.
    """

    footprint: Footprint
    blocks: int
    block: int
    outside: int
    matrices: int
    item: int
    state: int
    vocabulary: int

    @classmethod
    def of(cls, handle: Handle, footprint: Footprint | None = None) -> Model:
        blocks = [bytes_of(block) for block in handle.blocks]
        matrices = sum(p.numel() for block in handle.blocks for p in block.parameters() if p.ndim == 2)
        item = handle.dtype.itemsize
        return cls(footprint or measured(handle), len(blocks), max(blocks), bytes_of(handle.model) - sum(blocks),
                   matrices, item, handle.d_model * item, handle.vocabulary)  # fmt: skip

    def weights(self, how: str) -> float:
        """Bytes of all weights, or of those that are in memory at once."""
        if how == "offload":
            return self.outside + 2 * self.block
        packed = self.matrices * (PACKED[how] - self.item) if how in PACKED else 0
        return self.outside + self.blocks * self.block + packed


def bytes_of(module: nn.Module) -> int:
    """Of its parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


@dataclass(frozen=True)
class Sizes:
    """What settings say: prompts collected and rows decoded at once, prompts decoded, sequences of a step."""

    lengths: Lengths
    collected: int = 32
    decoded: int = BATCH
    prompts: int = 400
    fits: bool = True
    step: int = field(default=FitSettings.target_batch + FitSettings.baseline_batch)


def needs(model: Model, room: Room, sizes: Sizes, how: str = "full precision") -> Needs:
    """What each stage takes on each device when it is run as there is room for, and what to change if there isn't."""
    found = _needs(model, room, sizes, how)
    if found.fits or how == "offload":
        return found
    ways = {"4bit": "--quantise 4bit: saved in full precision all the same", "offload": _limits(model, room)}
    working = [text for way, text in ways.items() if way != how and _needs(model, room, sizes, way).fits]
    advice = f"it doesn't fit; {working[0]}" if working else "it doesn't fit; take a device with more memory"
    return Needs(room, found.weights, found.stages, False, how, advice)


def _limits(model: Model, room: Room) -> str:
    """The option by which weights are brought from elsewhere, half of the room left for what goes through them."""
    size = f"{max(room.free / 2, model.outside + model.block) / GIB:.1f}GiB"
    names = ["cpu"] if room.device == "cpu" else [str(index) for index in range(room.count)]
    return f"--max-memory {','.join(f'{name}={size}' for name in names)}: the rest is brought from CPU or disk, slowly"


def _needs(model: Model, room: Room, sizes: Sizes, how: str) -> Needs:
    weights = model.weights(how) / (1 if how == "offload" else room.count)
    free, token, lengths = room.free - weights, model.footprint, sizes.lengths
    along = [length + ANSWER_TOKENS - 1 for length in lengths.prompts]
    shared = token._replace(cached=token.cached / room.count)
    streams = len(SITES) * MOST_POSITIONS * model.state * model.blocks
    read = streams if room.device == "cpu" else 0  # where they are put aside
    stages = {"collect": _batched(free, sizes.collected, lengths.prompts, lengths.shared, shared, read=read),
              "decode": _decoding(free, sizes, shared),
              "divergence": _batched(free, COMPARED, along, lengths.shared, shared, ANSWER_TOKENS)}  # fmt: skip
    if sizes.fits:
        stages["fit"] = _fitting(free, model, sizes, room.count, how == "offload")
    fits = all(stage.bytes <= USABLE * free for stage in stages.values())
    return Needs(room, weights, stages, fits, how)


def _batched(
    free: float, rows: int, lengths: Sequence[int], shared: int, token: Footprint, outputs: int = 0, read: float = 0
) -> Stage:
    """The largest of the batches in which prompts of these lengths go through, or as much of it as fits.

    Logits are wanted at `outputs` tokens of a row, and `read` bytes of it are put aside.
    """
    taken = []
    for batch in buckets(lengths, rows, shared):
        width = lengths[batch[0]]
        each = (width - shared) * token.passing + width * token.cached + outputs * token.logits + read
        most = max(1, min(len(batch), int(USABLE * max(0.0, free) // each)))
        taken.append((most * each, most))
    largest, most = max(taken)
    return Stage(largest, f"{most} rows at a time")


def _decoding(free: float, sizes: Sizes, token: Footprint) -> Stage:
    """Slots of keys and values, logits of the next token, and prompts on their way into the slots."""
    lengths = sorted(sizes.lengths.prompts, reverse=True)
    capacity = lengths[0] + sizes.lengths.answer
    held = capacity * token.cached + token.logits
    rows = min(rows_at_once(token.cached, capacity, sizes.decoded), sizes.prompts)
    rows = max(1, min(rows, int(USABLE * max(0.0, free) // (held + capacity * token.cached))))
    own = max(1, lengths[0] - sizes.lengths.shared)
    left = free - rows * held / USABLE
    coming = _batched(left, max(1, PREFILL_TOKENS // own), lengths[:rows], sizes.lengths.shared, token, 1)
    return Stage(rows * held + coming.bytes, f"{rows} rows at a time")


def _fitting(free: float, model: Model, sizes: Sizes, devices: int, offload: bool) -> Stage:
    """A step: what blocks keep for the way back, or, checkpointed, what enters them; and the logits."""
    token, answer = model.footprint, FitSettings.answer_tokens
    lengths, shared = sizes.lengths.prompts, sizes.lengths.shared
    own = sum(lengths) / len(lengths) - shared + answer - 1
    for passes in (1, 2, 4, 8, 16):
        rows = math.ceil(sizes.step / passes)
        tokens = rows * own + math.ceil(rows * own / ROW_TOKENS) * shared
        logits = rows * answer * model.vocabulary * (2 * model.item + FIT_LOGITS)
        kept = tokens * token.kept * model.blocks / devices
        checkpointed = offload or kept > KEEPING * max(0.0, free)
        if checkpointed:
            kept = tokens * (CHECKPOINTS * model.state * model.blocks / devices + token.kept)
        total = kept + logits + tokens * token.passing
        if total <= USABLE * free:
            break
    chosen = f"{sizes.step} sequences a step" + (f" in {passes} passes" if passes > 1 else "")
    return Stage(total, chosen + (", blocks run again on the way back" if checkpointed else ""))
