"""What a run would take on this machine: time per stage and memory, from a probe of one batch.

The cost model, in full:

- A forward pass over prompts takes `prefill.fixed + prefill.each * tokens` seconds, tokens being rows times the
  longest row, less the prefix that all prompts share; a step of decoding takes `step.fixed + step.each * rows`;
  writing down and judging takes `per_token` for each token. The five numbers are fitted to the forward passes
  of one batch that is decoded under the run's own settings.
- That batch also says how long answers are: to target prompts, which mostly refuse and stop early, and to
  baseline prompts. Answers still going on at the probe's last token are taken to reach the limit. The edited
  model is taken to answer target prompts as the original answers baseline prompts.
- Decoding any number of prompts is then played through, slot by slot, with those lengths.
- Collecting, first-token scores (plain and with an edit attached) and divergences are timed on a few prompts
  and grow with the number of prompts. Loading is what it took. Baking grows with the writers' size, saving
  with the model's.
- Memory is the probe's peak, plus the keys and values, logits and kept distributions that the run has more of.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch

from abliterate.common.errors import AbliterateError
from abliterate.common.reporting import Reporter, Silent
from abliterate.directions.activations import collect
from abliterate.directions.means import difference_of_means
from abliterate.edit.edit import Edit
from abliterate.measure.decode import BATCH, CHECK_EVERY, REFILL, Answer, decode
from abliterate.measure.divergence import KEPT, compare, make_reference
from abliterate.measure.judges import Judge, make_judge
from abliterate.measure.slots import rows_at_once, token_bytes
from abliterate.models.handle import Handle, common_prefix
from abliterate.models.writers import check_proof, find_writers
from abliterate.prompts.sets import Sides
from abliterate.run.opening import open_model, open_prompts, set_prefill
from abliterate.run.saving import bakes_in_place
from abliterate.run.showing import FILTER_TOKENS
from abliterate.search.first_token import first_token
from abliterate.search.objectives import DECODE_TOKENS
from abliterate.search.sweep import LAST_LAYERS_LEFT_OUT, SweepSettings
from abliterate.settings.run import RunSettings, layer_range

PROBE_TOKENS = 48
PROBE_PROMPTS = 32  # a side
SHORTER = 0.6  # cost of a reference along the fit's 8 answer tokens, by that along the measurement's 24
SPLITS = ("train", "validation", "test")
GIB = 2**30


class Line(NamedTuple):
    """Seconds as fixed + each * size."""

    fixed: float
    each: float

    def at(self, size: float) -> float:
        return self.fixed + self.each * size


class Pass(NamedTuple):
    """One forward pass of the probe: rows, tokens a row, seconds."""

    rows: int
    width: int
    seconds: float


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

    def decoding(self, lengths: Sequence[float], prompts: int, limit: int, batch_size: int) -> float:
        """Seconds to decode answers of these lengths (repeated as needed) to so many prompts, slot by slot."""
        batch_size = rows_at_once(self.kv_bytes, self.prompt_tokens + limit, batch_size)
        left = [int(max(1, min(length, limit))) for length in _repeated(lengths, prompts)]
        waiting, seconds = list(left), 0.0
        running: list[int] = []
        while waiting or running:
            free = batch_size - len(running)
            if waiting and free >= min(max(1, int(batch_size * REFILL)), len(waiting)):
                coming, waiting = waiting[:free], waiting[free:]
                seconds += self.prefill.at(len(coming) * self.prompt_tokens)
                running += [length - 1 for length in coming if length > 1]  # its pass gives the first token
            else:
                seconds += self.step.at(len(running))
                running = [length - 1 for length in running if length > 1]
        return seconds + self.per_token * sum(left)


@dataclass(frozen=True)
class Counts:
    """Prompts a side after the filter, per split."""

    target: dict[str, int]
    baseline: dict[str, int]


SearchCost = Callable[[Costs, Counts, RunSettings], float]


def sweep_cost(costs: Costs, counts: Counts, settings: RunSettings) -> float:
    """Seconds of `search.candidates.sweep`: all places screened, the best scored, a few decoded."""
    sizes = SweepSettings()
    layers = layer_range(settings.search.layers) if settings.search.layers else range(costs.layers)
    searched = [layer for layer in layers if layer < max(1, int(costs.layers * (1 - LAST_LAYERS_LEFT_OUT)))]
    # at most places the best position isn't the last, and both are tried
    places = 2 * len(searched) * (2 if costs.has_mid else 1) - 1
    validation = [counts.target["validation"], counts.baseline["validation"]]
    screened = sum(min(sizes.screen_prompts, count) for count in validation)
    scored = sum(min(sizes.score_prompts, count) for count in validation)
    induced = min(sizes.score_prompts, validation[1])
    decoded = costs.decoding(costs.settling, min(sizes.score_prompts, validation[0]), sizes.decode_tokens, BATCH)
    weakened = 2  # strengths tried below 1 before one refuses: none to five
    return (
        costs.first_token * sum(validation)
        + costs.first_token_edited * (places * screened + sizes.scored * (scored + induced) + weakened * scored)
        + decoded * (sizes.decoded + weakened)
    )


def article_cost(costs: Costs, counts: Counts, settings: RunSettings) -> float:
    """Seconds of `search.article.article`: a few answers decoded plainly and with every candidate."""
    prompts = min(settings.search.test_prompts, counts.target["validation"])
    return costs.decoding(costs.answering, prompts, 64, BATCH) * (settings.search.candidates + 1)


def fit_cost(costs: Costs, counts: Counts, settings: RunSettings) -> float:
    """Seconds of `search.fit.fit`: references, gradient steps to every point, and each point judged."""
    from abliterate.search.fit import REFUSAL_TOKENS, STARTS
    from abliterate.search.fit_settings import FitSettings

    sizes = FitSettings(steps=settings.search.steps)
    points = len(sizes.weights)
    sequences = sizes.target_batch + sizes.baseline_batch
    # after the first point come steps on the refusals that are left, if any are, then those to every further point
    steps = sizes.steps + (points - 0.5) * sizes.steps_between
    kept = min(sizes.baseline_prompts, counts.baseline["train"])
    judging = costs.decoding(
        costs.settling, min(sizes.validation_prompts, counts.target["validation"]), sizes.decode_tokens, BATCH
    )
    refused = costs.decoding(  # gentler edits leave ever more refusals, whose verdicts are quick
        costs.refusing, min(sizes.validation_prompts, counts.target["validation"]), sizes.decode_tokens, BATCH
    )
    looking = costs.decoding(
        costs.settling, min(sizes.validation_prompts, counts.target["train"]), REFUSAL_TOKENS, BATCH
    )
    return (
        costs.reference * (kept * SHORTER + counts.baseline["validation"])
        + costs.collect * (counts.target["train"] + kept)  # what enters the first edited block, kept for every row
        + costs.gradient * sequences * (steps + (STARTS + 1) / 3)  # choosing the start needs no way back
        + looking
        + points * (judging + costs.divergence * counts.baseline["validation"])
        + len(sizes.lighter) * ((judging + refused) / 2 + costs.divergence * counts.baseline["validation"])
    )


def tpe_cost(costs: Costs, counts: Counts, settings: RunSettings) -> float:
    """Seconds of `search.tpe.tpe`: every trial decodes answers and compares first tokens."""
    decoded = costs.decoding(costs.settling, counts.target["validation"], DECODE_TOKENS, BATCH)
    return settings.search.trials * (decoded + costs.first_token_edited * counts.baseline["validation"])


SEARCH_COSTS: dict[str, SearchCost] = {
    "fit": fit_cost,
    "sweep": sweep_cost,
    "article": article_cost,
    "tpe": tpe_cost,
}
"""What a search takes, per method."""


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        stages: seconds per stage, in the order of a run; the names are those of results.json's `timings_s`.
        memory_bytes: peak of memory.
        disk_bytes: of the output.
        costs: what the prediction follows from.
        probe_s: what the probe itself took, loading included.
    """

    stages: dict[str, float]
    memory_bytes: int
    disk_bytes: int
    costs: Costs
    probe_s: float
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.stages.values())

    def to_json(self) -> dict[str, Any]:
        costs = {
            key: value._asdict() if isinstance(value, Line) else value
            for key, value in vars(self.costs).items()
            if key not in ("refusing", "answering", "settling")  # infinity is no JSON
        }
        return {
            "stages_s": self.stages,
            "total_s": self.total,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "probe_s": self.probe_s,
            "costs": costs,
            "notes": self.notes,
        }

    def rows(self) -> list[tuple[str, str]]:
        """The plan as a table's rows."""
        return [
            *((stage, duration(seconds)) for stage, seconds in self.stages.items()),
            ("in all", duration(self.total)),
            ("memory, at most", f"{self.memory_bytes / GIB:.1f} GiB"),
            ("disk", f"{self.disk_bytes / GIB:.2f} GiB"),
        ]


def duration(seconds: float) -> str:
    """Seconds as a person reads them.

    Example:
        >>> duration(0.4), duration(75), duration(5400)
        ('0.4 s', '1 min 15 s', '1 h 30 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plan_run(
    model: str,
    settings: RunSettings | None = None,
    *,
    has_activations: bool = False,
    reporter: Reporter | None = None,
) -> Plan:
    """Predict what `pipeline.run` would take, by loading the model and probing one batch; nothing is written.

    Args:
        model: Hub id, folder or GGUF file.
        settings: those of the run.
        has_activations: the run would read its activations from a file.
        reporter: told about stages.

    Raises:
        AbliterateError: any that loading gives; or the method has no cost model.
    """
    settings, reporter, start = settings or RunSettings(), reporter or Silent(), time.monotonic()
    if settings.search.method not in SEARCH_COSTS:
        raise AbliterateError(f"--plan knows no cost of --method {settings.search.method}")
    judge = make_judge(settings.measure.judge)
    sides = open_prompts(settings.prompts, settings.seed)
    reporter.say(f"loading {model}")
    loading = time.monotonic()
    handle = open_model(model, settings.load)
    load = time.monotonic() - loading
    reporter.say("probing one batch")
    costs = probe(handle, sides, judge, settings, load)
    return predicted(costs, _sizes(sides), settings, has_activations, time.monotonic() - start, bakes_in_place(handle))


def _sizes(sides: Sides) -> Counts:
    return Counts(
        *({name: len(getattr(side, name).texts) for name in SPLITS} for side in (sides.target, sides.baseline))
    )


def predicted(
    costs: Costs, prompts: Counts, settings: RunSettings, has_activations: bool, probe_s: float, in_place: bool = True
) -> Plan:
    """The plan that follows from the costs and the numbers of prompts; arithmetic only.

    Args:
        costs: from `probe`.
        prompts: prompts of each split, before the filter.
        settings: those of the run.
        has_activations: nothing is filtered for training or collected.
        probe_s: what the probe took.
        in_place: the loaded weights are edited; else a second copy is loaded, edited and saved.
    """
    limit, batch = settings.measure.max_new_tokens, settings.measure.batch_size
    kept = _filtered(costs, prompts, settings.collect.filter)
    stages = {"load": costs.load, "prove": costs.prove, "filter": 0.0, "collect": 0.0}
    fits = settings.search.method == "fit"  # it needs the model's own words, filtered by them or not
    if settings.collect.filter or fits:
        for split in ("validation",) if has_activations and not fits else ("train", "validation"):
            stages["filter"] += costs.decoding(costs.refusing, prompts.target[split], FILTER_TOKENS, BATCH)
            stages["filter"] += costs.decoding(costs.settling, prompts.baseline[split], FILTER_TOKENS, BATCH)
    if not has_activations:
        stages["collect"] = costs.collect * (kept.target["train"] + kept.baseline["train"])
    stages["search"] = SEARCH_COSTS[settings.search.method](costs, kept, settings)
    # the report reads the validation prompts' activations before and after the edit
    stages["report data"] = 2 * costs.collect * (kept.target["validation"] + kept.baseline["validation"])
    compared = kept.baseline["test"]
    count, others = prompts.target["test"], prompts.baseline["test"]

    def measuring(target: Sequence[float], comparing: float) -> float:
        both = _mixed(_repeated(target, count), _repeated(costs.answering, others))
        return costs.decoding(both, len(both), limit, batch) + comparing * compared

    stages["measure original"] = measuring(costs.refusing, costs.reference)
    stages["edit"] = costs.bake if in_place else 0.0
    stages["measure edited"] = measuring(costs.settling, costs.divergence)
    stages["save"] = costs.save + (0.0 if in_place else costs.load + costs.bake)
    written = costs.weight_bytes + costs.tied_bytes
    return Plan(
        {stage: round(seconds, 3) for stage, seconds in stages.items()},
        _memory(costs, kept, settings, in_place),
        written,
        costs,
        round(probe_s, 3),
    )


def _repeated(lengths: Sequence[float], count: int) -> list[float]:
    return list(islice(cycle(lengths), count))


def _mixed(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Both lists in one, evenly: prompts are run by their length, whichever side they are of."""
    places = [((i + 0.5) / len(items), length) for items in (one, other) for i, length in enumerate(items)]
    return [length for _, length in sorted(places, key=lambda place: place[0])]


def _filtered(costs: Costs, prompts: Counts, filtering: bool) -> Counts:
    """What the filter leaves of each split; the test split isn't filtered but for the divergence."""
    refused = costs.refused if filtering else 1.0
    answered = costs.answered if filtering else 1.0
    target = {split: round(refused * count) for split, count in prompts.target.items()}
    baseline = {split: round(answered * count) for split, count in prompts.baseline.items()}
    return Counts(
        {**target, "test": prompts.target["test"]},
        {**baseline, "test": round(costs.answered * prompts.baseline["test"])},
    )


def _memory(costs: Costs, kept: Counts, settings: RunSettings, in_place: bool) -> int:
    """Peak bytes: the probe's, and what a run has more of."""
    limit = settings.measure.max_new_tokens
    length = costs.prompt_tokens + limit
    rows = rows_at_once(
        costs.kv_bytes, length, min(settings.measure.batch_size, kept.target["test"] + kept.baseline["test"])
    )
    # every slot is as long as the longest prompt and answer; prompts have a cache of their own until they are in it
    ran = costs.probe_rows * (costs.longest + min(PROBE_TOKENS, limit))
    prefilled = max(0, rows - costs.probe_rows) * min(costs.longest, length)
    slots = costs.kv_bytes * (max(0, rows * (costs.longest + limit) - ran) + prefilled)
    # first-token distributions in float32: the original's of both sides, an edit's of both, and their difference
    scored = min(SweepSettings().score_prompts, kept.target["validation"])
    logits = 3 * 2 * scored * costs.vocabulary * 4
    reference = kept.baseline["test"] * 24 * (KEPT * 8)
    copies = costs.tied_bytes if in_place else costs.weight_bytes + costs.tied_bytes
    return int(costs.peak_bytes + slots + max(logits, reference + copies))


# --- The probe ----------------------------------------------------------------------------------------


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
    set_prefill(handle, target, None)
    decode(handle, handle.prompt_ids([*target[:2], *baseline[:2]]), max_new_tokens=4)  # what is done but once
    prove, _ = _timed(handle, lambda: check_proof(handle))
    limit = min(PROBE_TOKENS, settings.measure.max_new_tokens)
    with _watched(handle) as passes:
        took, answers = _timed(handle, lambda: _answers(handle, target, baseline, judge, limit))
    refusals, replies = answers[: len(target)], answers[len(target) :]
    refused = judge.judge([*target, *baseline], [a.text for a in answers])
    ids = handle.prompt_ids([*target, *baseline])
    shared = common_prefix(ids)
    own = [len(row) - shared for row in ids]
    few = baseline[: max(1, count // 2)]
    direction = torch.randn(handle.d_model, generator=torch.Generator().manual_seed(0))
    edit = Edit.uniform(find_writers(handle), direction, 0.0 + 1e-3)
    plain, _ = _timed(handle, lambda: first_token(handle, ids))
    with edit.attached(handle):
        edited, _ = _timed(handle, lambda: first_token(handle, ids))
    collecting, activations = _timed(
        handle, lambda: collect(handle, target, baseline, positions=settings.collect.positions,
                                batch_size=settings.collect.batch_size)
    )  # fmt: skip
    making = 0.0
    answered = [(row, a) for row, a in zip(handle.prompt_ids(few), replies, strict=False) if a.ids]
    comparing = 0.0
    if answered:
        rows, their = [row for row, _ in answered], [a for _, a in answered]
        making, reference = _timed(handle, lambda: make_reference(handle, rows, their))
        comparing, _ = _timed(handle, lambda: compare(handle, reference))
        making, comparing = making / len(answered), comparing / len(answered)
    gradient = 0.0
    if settings.search.method == "fit":
        gradient = _gradient(handle, ids, _first_edited(handle, activations, settings))
    size = sum(p.numel() * p.element_size() for p in handle.model.parameters())
    tied = handle.embedding.weight.numel() * handle.embedding.weight.element_size() if handle.tied else 0  # type: ignore
    steps = [p for p in passes if p.width == 1]
    prefills = [p for p in passes if p.width > 1]
    tokens = sum(len(a.ids) + a.finished for a in answers)
    spent = sum(p.seconds for p in passes)
    return Costs(
        prefill=fitted([p.rows * p.width for p in prefills], [p.seconds for p in prefills]),
        step=fitted([p.rows for p in steps], [p.seconds for p in steps]),
        per_token=max(0.0, took - spent) / max(1, tokens),
        collect=collecting / len(ids),
        first_token=plain / len(ids),
        first_token_edited=edited / len(ids),
        divergence=comparing,
        reference=making,
        longest=max(map(len, ids)),
        gradient=gradient,
        load=load,
        prove=prove,
        bake=_baking(handle, edit),
        save=_writing(size + tied),
        refusing=_lengths(refusals),
        answering=_lengths(replies),
        settling=tuple(_settling(handle, judge, p, a) for p, a in zip(baseline, replies, strict=True)),
        refused=sum(refused[: len(target)]) / len(target),
        answered=1 - sum(refused[len(target) :]) / len(baseline),
        prompt_tokens=sum(own) / len(own),
        kv_bytes=token_bytes(handle),
        weight_bytes=int(size),
        vocabulary=handle.vocabulary,
        tied_bytes=int(tied),
        peak_bytes=peak_bytes(handle),
        probe_rows=len(ids),
        layers=handle.layers,
        has_mid=any(reader is not None for reader in _mid_readers(handle)),
    )


def _mid_readers(handle: Handle) -> Sequence[Any]:
    from abliterate.models.writers import layout

    return layout(handle).mid_readers


def _answers(handle: Handle, target: Sequence[str], baseline: Sequence[str], judge: Judge, limit: int) -> list[Answer]:
    """One batch as measuring judges it: target answers stop at any settled verdict, baseline answers at a refusal."""
    prompts = [*target, *baseline]

    def settled(index: int, text: str) -> bool:
        return judge.settled(prompts[index], text) in ((True, False) if index < len(target) else (True,))

    return decode(
        handle, handle.prompt_ids(prompts), max_new_tokens=limit, batch_size=len(prompts), settled=settled
    )  # fmt: skip


def _settling(handle: Handle, judge: Judge, prompt: str, answer: Answer) -> float:
    """Tokens after which the verdict on an answer is settled or it ends; infinite where neither is seen."""
    for length in range(CHECK_EVERY, len(answer.ids) + 1, CHECK_EVERY):
        text = handle.tokenizer.decode(answer.ids[:length], skip_special_tokens=True)
        if judge.settled(prompt, text) is not None:
            return length
    return _lengths([answer])[0]


def _lengths(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Tokens run for each answer, its end among them; infinite where the probe's limit cut it."""
    return tuple(len(a.ids) + a.finished if a.finished or a.stopped else math.inf for a in answers)


def fitted(sizes: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line of least squares with neither number negative; through the origin where all sizes are one.

    Example:
        >>> fitted([1, 2, 3], [3.0, 5.0, 7.0])
        Line(fixed=1.0, each=2.0)
    """
    if not sizes:
        return Line(0.0, 0.0)
    n = len(sizes)
    mean_x, mean_y = sum(sizes) / n, sum(seconds) / n
    spread = sum((x - mean_x) ** 2 for x in sizes)
    slope = (
        sum((x - mean_x) * (y - mean_y) for x, y in zip(sizes, seconds, strict=True)) / spread if spread else math.inf
    )
    if slope < 0:
        return Line(mean_y, 0.0)
    if mean_y - slope * mean_x < 0:
        return Line(0.0, sum(x * y for x, y in zip(sizes, seconds, strict=True)) / sum(x * x for x in sizes))
    return Line(mean_y - slope * mean_x, slope)


@contextlib.contextmanager
def _watched(handle: Handle) -> Iterator[list[Pass]]:
    """Note every forward pass that gives logits, for as long as the context lasts."""
    passes: list[Pass] = []
    plain = handle.last_logits

    def noted(keep: int = 1, **inputs: Any) -> Any:
        rows, width = inputs["input_ids"].shape
        seconds, output = _timed(handle, lambda: plain(keep, **inputs))
        passes.append(Pass(rows, width, seconds))
        return output

    handle.__dict__["last_logits"] = noted
    try:
        yield passes
    finally:
        del handle.__dict__["last_logits"]


def _timed(handle: Handle, work: Callable[[], Any]) -> tuple[float, Any]:
    on_gpu = handle.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _first_edited(handle: Handle, activations: Any, settings: RunSettings) -> int:
    """The first block that a fit would edit, as far as the probe's few prompts tell."""
    from abliterate.search.fit import blocks_to_edit

    if settings.search.layers:
        return layer_range(settings.search.layers)[0]
    return blocks_to_edit(difference_of_means(activations), handle.layers)[0]


def _gradient(
    handle: Handle, ids: Sequence[Sequence[int]], first_block: int = 0, sequences: int = 24, answer_tokens: int = 8
) -> float:
    """Seconds per sequence of a fit's step: packed as the fit packs them, the way back to the first edited block."""
    from abliterate.search.packed import Packer, Row

    rows = [Row([*row, *row[:answer_tokens]], min(answer_tokens, len(row))) for row in islice(cycle(ids), sequences)]
    scale = torch.ones((), requires_grad=True, dtype=handle.dtype, device=handle.device)

    def scaled(_module: Any, _args: Any, out: Any) -> Any:
        return (out[0] * scale, *out[1:]) if isinstance(out, tuple) else out * scale

    def step() -> None:
        with torch.enable_grad():
            torch.cat(packer.logprobs(range(len(rows))))[..., 0].mean().backward()

    frozen = [p for p in handle.model.parameters() if p.requires_grad]
    hook = handle.blocks[first_block].register_forward_hook(scaled)
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        packer = Packer(handle, rows, first_block)
        step()  # what is done but once
        return _timed(handle, step)[0] / sequences
    finally:
        hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)


@torch.inference_mode()
def _baking(handle: Handle, edit: Edit) -> float:
    """Seconds to edit all writers, from editing a copy of one of each shape."""
    from abliterate.apply.weights import removed

    if handle.quantised:
        return 0.0
    parameters = dict(handle.model.named_parameters())
    known: dict[tuple[int, ...], float] = {}
    total = 0.0
    for writer in find_writers(handle):
        if writer.shape not in known:
            work = functools.partial(removed, parameters[writer.name], edit.parts[writer.name], writer.axis)
            known[writer.shape], _ = _timed(handle, work)
        total += known[writer.shape]
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
    """The most memory held so far: on the GPU where the model is on one, else of this process."""
    if handle.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows: what the weights take, for want of better
        return sum(p.numel() * p.element_size() for p in handle.model.parameters())
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
