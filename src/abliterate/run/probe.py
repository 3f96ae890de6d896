"""What things take on this machine with this model: one batch of the run's prompts, decoded, read and compared."""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any, NamedTuple, TypeVar

import torch

from abliterate.apply.hooks import attached
from abliterate.apply.proof import check_proof
from abliterate.directions.activations import Activations, collect, sites_with_stream
from abliterate.directions.means import difference_of_means
from abliterate.edit.edit import Edit
from abliterate.measure import judged, reference_of
from abliterate.measure.decode import BATCH, CHECK_EVERY, REFILL, Answer, decode
from abliterate.measure.divergence import compare
from abliterate.measure.judges import Judge
from abliterate.measure.slots import rows_at_once, token_bytes
from abliterate.models.handle import Handle, common_prefix
from abliterate.models.outputs import changed
from abliterate.models.placement import devices_of, value
from abliterate.models.writers import find_writers
from abliterate.prompts.sets import Sides
from abliterate.run.needs import bytes_of
from abliterate.run.opening import set_prefill
from abliterate.search.first_token import first_token
from abliterate.settings.run import RunSettings, layer_range

PROBE_TOKENS = 48
PROBE_PROMPTS = 32  # a side
T = TypeVar("T")


class Line(NamedTuple):
    """Seconds as fixed + each * size."""

    fixed: float
    each: float

    def at(self, size: float) -> float:
        return self.fixed + self.each * size


@dataclass(frozen=True)
class Costs:
    """What things take on this machine with this model.

    Attributes:
        prefill: seconds of a forward pass by its tokens.
        step: seconds of a decoding step by its rows.
        per_token: seconds of all but forward passes, per decoded token.
        collect, first_token, first_token_edited, divergence: seconds per prompt.
        gradient: seconds per sequence of a step of gradients, forward and back.
        load, prove: seconds.
        bake, save: seconds.
        refusing: tokens of answers to target prompts; those not ended within the probe are infinite.
        answering: of answers to baseline prompts, decoded to the limit unless they refuse.
        settling: the same, decoded until the verdict is settled either way.
        refused: share of target prompts refused.
        answered: share of baseline prompts answered.
        prompt_tokens: tokens per prompt beyond the shared prefix.
        kv_bytes: bytes of keys and values per token of a row.
        weight_bytes, vocabulary: of the model.
        tied_bytes: bytes that untying the head adds; 0 when it isn't tied.
        peak_bytes: the probe's peak of memory.
        probe_rows: rows of keys and values in the probe.
        layers, has_mid: of the model; whether blocks have a site between attention and MLP.
        reference: seconds per prompt to keep the original's distributions, which `divergence` then compares with.
        longest: tokens of the longest prompt, the shared prefix among them.
    """

    prefill: Line
    step: Line
    per_token: float
    collect: float
    first_token: float
    first_token_edited: float
    divergence: float
    gradient: float
    load: float
    prove: float
    bake: float
    save: float
    refusing: tuple[float, ...]
    answering: tuple[float, ...]
    settling: tuple[float, ...]
    refused: float
    answered: float
    prompt_tokens: float
    kv_bytes: float
    weight_bytes: int
    vocabulary: int
    tied_bytes: int
    peak_bytes: int
    probe_rows: int
    layers: int
    has_mid: bool = True
    reference: float = 0.0
    longest: int = 0

    def decoding(self, lengths: Sequence[float], prompts: int, limit: int, batch_size: int = BATCH) -> float:
        """Seconds to decode answers of these lengths (repeated as needed) to so many prompts, slot by slot."""
        batch_size = rows_at_once(self.kv_bytes, self.prompt_tokens + limit, batch_size)
        waiting = [int(max(1, min(length, limit))) for length in islice(cycle(lengths), prompts)]
        seconds, running = self.per_token * sum(waiting), list[int]()
        while waiting or running:
            free = batch_size - len(running)
            if waiting and free >= min(max(1, int(batch_size * REFILL)), len(waiting)):
                coming, waiting = waiting[:free], waiting[free:]
                seconds += self.prefill.at(len(coming) * self.prompt_tokens)
                running += [length - 1 for length in coming if length > 1]  # its pass gives the first token
            else:
                seconds += self.step.at(len(running))
                running = [length - 1 for length in running if length > 1]
        return seconds


def probe(handle: Handle, sides: Sides, judge: Judge, settings: RunSettings, load: float) -> Costs:
    """Run one batch of both sides' prompts under the run's settings and see what things take.

    Args:
        handle: the loaded model.
        sides: the run's prompts; the first of the training split are used.
        judge: the run's.
        settings: the run's.
        load: seconds that loading took.
    """
    count = max(1, min(PROBE_PROMPTS, settings.measure.batch_size // 2))
    target, baseline = (list(side.train.texts[:count]) for side in (sides.target, sides.baseline))
    prompts, count = [*target, *baseline], len(target)
    set_prefill(handle, target)
    decode(handle, handle.prompt_ids([*target[:2], *baseline[:2]]), max_new_tokens=4)  # what is done but once
    prove, _ = timed(handle, lambda: check_proof(handle))
    limit = min(PROBE_TOKENS, settings.measure.max_new_tokens)
    with watched(handle) as passes:  # as measuring decodes: baseline answers go on unless they refuse
        took, (answers, refused) = timed(handle, lambda: judged(
            handle, prompts, judge, max_new_tokens=limit, batch_size=len(prompts),
            stop_on=lambda index: (True, False) if index < count else (True,),
        ))  # fmt: skip
    replies, few = answers[count:], max(1, count // 2)
    ids = handle.prompt_ids(prompts)
    direction = torch.randn(handle.d_model, generator=torch.Generator().manual_seed(0))
    edit = Edit.uniform(find_writers(handle), direction, 1e-3)
    plain, _ = timed(handle, lambda: first_token(handle, ids))
    with attached(handle, edit):
        edited, _ = timed(handle, lambda: first_token(handle, ids))
    positions, batch_size = settings.collect.positions, settings.collect.batch_size
    collecting, activations = timed(
        handle, lambda: collect(handle, target, baseline, positions=positions, batch_size=batch_size)
    )
    making, reference = timed(
        handle, lambda: reference_of(handle, baseline[:few], replies[:few], refused[count : count + few])
    )
    comparing, _ = timed(handle, lambda: compare(handle, reference) if reference else None)
    known = len(reference.rows) if reference else math.inf
    fits = settings.search.method == "fit"
    shape = _shape(handle)
    tokens = sum(len(a.ids) + a.finished for a in answers)
    steps, prefills = ([p for p in passes if (p.width == 1) == one] for one in (True, False))
    return Costs(
        prefill=fitted([p.rows * p.width for p in prefills], [p.seconds for p in prefills]),
        step=fitted([p.rows for p in steps], [p.seconds for p in steps]),
        per_token=max(0.0, took - sum(p.seconds for p in passes)) / max(1, tokens),
        collect=collecting / len(ids),
        first_token=plain / len(ids),
        first_token_edited=edited / len(ids),
        divergence=comparing / known,
        reference=making / known,
        longest=max(map(len, ids)),
        gradient=gradient(handle, ids, _first_edited(handle, activations, settings)) if fits else 0.0,
        load=load,
        prove=prove,
        bake=_baking(handle, edit),
        save=_writing(shape["weight_bytes"] + shape["tied_bytes"]),
        refusing=tuple(map(_length, answers[:count])),
        answering=tuple(map(_length, replies)),
        settling=tuple(_settling(handle, judge, p, a) for p, a in zip(baseline, replies, strict=True)),
        refused=sum(refused[:count]) / count,
        answered=1 - sum(refused[count:]) / len(baseline),
        prompt_tokens=sum(map(len, ids)) / len(ids) - common_prefix(ids),
        peak_bytes=peak_bytes(handle),
        probe_rows=len(ids),
        **shape,
    )


def _shape(handle: Handle) -> dict[str, Any]:
    """What the costs say of the model's shape."""
    embedding: Any = handle.embedding.weight
    return {
        "kv_bytes": token_bytes(handle),
        "weight_bytes": bytes_of(handle.model),
        "vocabulary": handle.vocabulary,
        "tied_bytes": embedding.numel() * embedding.element_size() if handle.tied else 0,
        "layers": handle.layers,
        "has_mid": "mid" in sites_with_stream(handle),
    }


def _length(answer: Answer) -> float:
    """Tokens run for an answer, its end among them; infinite where the probe's limit cut it."""
    return len(answer.ids) + answer.finished if answer.finished or answer.stopped else math.inf


def _settling(handle: Handle, judge: Judge, prompt: str, answer: Answer) -> float:
    """Tokens after which the verdict on an answer is settled or it ends; infinite where neither is seen."""
    for length in range(CHECK_EVERY, len(answer.ids) + 1, CHECK_EVERY):
        text = handle.tokenizer.decode(answer.ids[:length], skip_special_tokens=True)
        if judge.settled(prompt, text) is not None:
            return length
    return _length(answer)


def fitted(sizes: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line of least squares with neither number negative; through the origin where all sizes are one.

    Example:
        >>> fitted([1, 2, 3], [3.0, 5.0, 7.0])
        Line(fixed=1.0, each=2.0)
    """
    if not sizes:
        return Line(0.0, 0.0)
    x, y = torch.tensor([sizes, seconds], dtype=torch.float64)
    spread = float((x - x.mean()).square().sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else math.inf
    if slope < 0:
        return Line(float(y.mean()), 0.0)
    fixed = float(y.mean() - slope * x.mean())
    return Line(fixed, slope) if fixed >= 0 else Line(0.0, float(x @ y / (x @ x)))


class Pass(NamedTuple):
    """One forward pass of the probe: rows, tokens a row, seconds."""

    rows: int
    width: int
    seconds: float


@contextlib.contextmanager
def watched(handle: Handle) -> Iterator[list[Pass]]:
    """Note every forward pass that gives logits, for as long as the context lasts."""
    passes: list[Pass] = []
    plain = handle.last_logits

    def noted(keep: int = 1, **inputs: Any) -> Any:
        rows, width = inputs["input_ids"].shape
        seconds, output = timed(handle, lambda: plain(keep, **inputs))
        passes.append(Pass(rows, width, seconds))
        return output

    handle.__dict__["last_logits"] = noted
    try:
        yield passes
    finally:
        del handle.__dict__["last_logits"]


def timed(handle: Handle, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that some work took, the GPUs' share among them, and what it gave."""
    cards = _cards(handle)
    for card in cards:
        torch.cuda.synchronize(card)
    start = time.perf_counter()
    result = work()
    for card in cards:
        torch.cuda.synchronize(card)
    return time.perf_counter() - start, result


def _cards(handle: Handle) -> list[torch.device]:
    """The GPUs that a model is on."""
    return [device for device in devices_of(handle.model) if device.type == "cuda"]


def _first_edited(handle: Handle, activations: Activations, settings: RunSettings) -> int:
    """The first block that a fit would edit, as far as the probe's few prompts tell."""
    from abliterate.search.starts import starts

    if settings.search.layers:
        return layer_range(settings.search.layers)[0]
    near = starts(difference_of_means(activations), range(handle.layers))
    return min((start.blocks.start for start in near), default=0)


def gradient(
    handle: Handle, ids: Sequence[Sequence[int]], first_block: int = 0, sequences: int = 24, answer_tokens: int = 8
) -> float:
    """Seconds per sequence of a fit's step: packed as the fit packs them, the way back to the first edited block."""
    from abliterate.search.packed import Packer, Row

    rows = [Row([*row, *row[:answer_tokens]], min(answer_tokens, len(row))) for row in islice(cycle(ids), sequences)]
    scale = torch.ones((), requires_grad=True, dtype=handle.dtype)

    @torch.enable_grad()
    def step() -> None:
        torch.cat(packer.logprobs(range(len(rows))))[..., 0].mean().backward()

    trained = [p for p in handle.model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with changed([(handle.blocks[first_block], lambda out: out * scale.to(out.device))]):
            packer = Packer(handle, rows, first_block)
            step()  # what is done but once
            return timed(handle, step)[0] / sequences
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.inference_mode()
def _baking(handle: Handle, edit: Edit) -> float:
    """Seconds to edit all writers, from editing a copy of one of each shape."""
    from abliterate.apply.removal import removed

    if handle.quantised or handle.at_stream:
        return 0.0
    known, total = dict[tuple[int, ...], float](), 0.0
    for w in find_writers(handle):
        if w.shape not in known:
            weight = value(handle.model, w.name)
            known[w.shape], _ = timed(handle, partial(removed, weight, edit.parts[w.name], w.axis))
        total += known[w.shape]
    return total


def _writing(size: int, sample: int = 32 * 2**20) -> float:
    """Seconds to write so many bytes, from writing some to the folder for temporary files."""
    block = bytes(min(size, sample))
    start = time.perf_counter()
    with tempfile.TemporaryFile() as file:
        file.write(block)
        file.flush()
    return (time.perf_counter() - start) * size / max(1, len(block))


def peak_bytes(handle: Handle) -> int:
    """The most memory held so far: on the GPUs where the model is on some, else of this process."""
    if cards := _cards(handle):
        return sum(torch.cuda.max_memory_allocated(card) for card in cards)
    try:
        import resource
    except ImportError:  # Windows: what the weights take, for want of better
        return bytes_of(handle.model)
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
