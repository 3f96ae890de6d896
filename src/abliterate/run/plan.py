"""What a run would take on this machine: memory from the model's config alone, time from a probe of one batch.

What each stage needs of memory, and how it would be run, is `run.needs`; no weights are loaded for it. The time is
told where the weights are here and fit. Its cost model, in full:

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
- The peak of memory is the probe's, plus the keys and values, logits and kept distributions that the run has more of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

from abliterate.common.errors import AbliterateError
from abliterate.common.reporting import Reporter, Silent
from abliterate.measure.divergence import ANSWER_TOKENS, KEPT
from abliterate.measure.judges import make_judge
from abliterate.measure.slots import rows_at_once
from abliterate.models.devices import devices_here
from abliterate.models.folders import check_here, is_described
from abliterate.models.handle import Handle, common_prefix
from abliterate.models.loading import without_weights
from abliterate.models.memory import footprint, free_bytes
from abliterate.prompts.sets import Sides
from abliterate.run.needs import Lengths, Model, Needs, Room, Sizes, bytes_of, needs
from abliterate.run.opening import open_model, open_prompts
from abliterate.run.probe import PROBE_TOKENS, Costs, Line, probe
from abliterate.run.showing import FILTER_TOKENS
from abliterate.search.objectives import DECODE_TOKENS
from abliterate.search.sweep import LAST_LAYERS_LEFT_OUT, SweepSettings
from abliterate.settings.run import RunSettings, layer_range

SHORTER = 0.6  # cost of a reference along the fit's 8 answer tokens, by that along the measurement's 24
SPLITS = ("train", "validation", "test")
GIB = 2**30


@dataclass(frozen=True)
class Counts:
    """Prompts a side after the filter, per split."""

    target: dict[str, int]
    baseline: dict[str, int]


SearchCost = Callable[[Costs, Counts, RunSettings], float]


def sweep_cost(costs: Costs, counts: Counts, settings: RunSettings) -> float:
    """Seconds of `search.sweep.sweep`: all places screened, the best scored, a few decoded."""
    sizes = SweepSettings()
    layers = layer_range(settings.search.layers) if settings.search.layers else range(costs.layers)
    searched = [layer for layer in layers if layer < max(1, int(costs.layers * (1 - LAST_LAYERS_LEFT_OUT)))]
    # at most places the best position isn't the last, and both are tried
    places = 2 * len(searched) * (2 if costs.has_mid else 1) - 1
    validation = [counts.target["validation"], counts.baseline["validation"]]
    screened = sum(min(sizes.screen_prompts, count) for count in validation)
    target, induced = (min(sizes.score_prompts, count) for count in validation)
    scored = sizes.scored * (target + 2 * induced)
    weakened = 2  # strengths tried below 1 before one refuses: none to five
    return (
        costs.first_token * sum(validation)
        + costs.first_token_edited * (places * screened + scored + weakened * (target + induced))
        + costs.decoding(costs.settling, target, sizes.decode_tokens) * (sizes.decoded + weakened)
    )


def article_cost(costs: Costs, counts: Counts, settings: RunSettings) -> float:
    """Seconds of `search.article.article`: a few answers decoded plainly and with every candidate."""
    prompts = min(settings.search.test_prompts, counts.target["validation"])
    return costs.decoding(costs.answering, prompts, 64) * (settings.search.candidates + 1)


def fit_cost(costs: Costs, counts: Counts, settings: RunSettings) -> float:
    """Seconds of `search.fit.fit`: references, gradient steps to every point, and each point judged."""
    from abliterate.search.fit import REFUSAL_TOKENS
    from abliterate.search.fit_settings import FitSettings
    from abliterate.search.starts import STARTS

    sizes = FitSettings(steps=settings.search.steps)
    points, validation = len(sizes.weights), min(sizes.validation_prompts, counts.target["validation"])
    # after the first point come steps on the refusals that are left, if any are, then those to every further point
    steps = sizes.steps + (points - 0.5) * sizes.steps_between
    kept = min(sizes.baseline_prompts, counts.baseline["train"])
    judging = costs.decoding(costs.settling, validation, sizes.decode_tokens)
    refused = costs.decoding(costs.refusing, validation, sizes.decode_tokens)  # gentler edits leave ever more
    looking = min(sizes.validation_prompts, counts.target["train"])
    return (
        costs.reference * (kept * SHORTER + counts.baseline["validation"])
        + costs.collect * (counts.target["train"] + kept)  # what enters the first edited block, kept for every row
        # choosing the start needs no way back
        + costs.gradient * (sizes.target_batch + sizes.baseline_batch) * (steps + (STARTS + 2) / 3)
        + costs.decoding(costs.settling, looking, REFUSAL_TOKENS)
        + points * judging
        + len(sizes.lighter) * (judging + refused) / 2
        + (points + len(sizes.lighter)) * costs.divergence * counts.baseline["validation"]
    )


def tpe_cost(costs: Costs, counts: Counts, settings: RunSettings) -> float:
    """Seconds of `search.tpe.tpe`: every trial decodes answers and compares first tokens."""
    decoded = costs.decoding(costs.settling, counts.target["validation"], DECODE_TOKENS)
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
        costs: what the prediction follows from; None where nothing was probed: stages are empty then.
        probe_s: what the probe itself took, loading included.
        needs: of memory, stage by stage.
    """

    stages: dict[str, float]
    memory_bytes: int
    disk_bytes: int
    costs: Costs | None
    probe_s: float
    notes: list[str] = field(default_factory=list)
    needs: Needs | None = None

    @property
    def total(self) -> float:
        return sum(self.stages.values())

    def to_json(self) -> dict[str, Any]:
        costs = {
            key: value._asdict() if isinstance(value, Line) else value
            for key, value in (vars(self.costs) if self.costs else {}).items()
            if key not in ("refusing", "answering", "settling")  # infinity is no JSON
        }
        return {
            "stages_s": self.stages,
            "total_s": self.total,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "probe_s": self.probe_s,
            "costs": costs,
            "memory": self.needs and self.needs.to_json(),
            "notes": self.notes,
        }

    def rows(self) -> list[tuple[str, str]]:
        """Time and what it takes in all, as a table's rows."""
        return [
            *((stage, duration(seconds)) for stage, seconds in self.stages.items()),
            *([("in all", duration(self.total))] if self.stages else []),
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
    minutes, whole = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {whole} s" if minutes else f"{whole} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plan_run(
    model: str,
    settings: RunSettings | None = None,
    *,
    has_activations: bool = False,
    reporter: Reporter | None = None,
) -> Plan:
    """Predict what `pipeline.run` would take; nothing is written.

    Memory is computed without weights; where those are here and fit, the model is loaded and one batch probed for time.

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
    if not is_described(model):
        check_here(model)
    sides = open_prompts(settings.prompts, settings.seed)
    reporter.say("computing memory from the config")
    bare = None if settings.load.trust_remote_code else _bare(model, settings)  # whose code may want values
    found = needed(bare, sides, settings) if bare else None
    here = bare and bare.folder and any(bare.folder.glob("*.safetensors"))
    if bare and found and not (found.fits and here):
        why = "its weights aren't here" if found.fits else "it doesn't fit"
        notes = [f"no time is told: {why}"]
        return Plan({}, found.peak, bytes_of(bare.model), None, round(time.monotonic() - start, 3), notes, found)
    reporter.say(f"loading {model}")
    loading = time.monotonic()
    handle = open_model(model, settings.load)
    load = time.monotonic() - loading
    reporter.say("probing one batch")
    costs = probe(handle, sides, judge, settings, load)
    notes = ["reasoning left open (--think) makes answers longer than this knows"] if settings.beside.think else []
    counts = Counts(*({name: len(getattr(side, name)) for name in SPLITS} for side in (sides.target, sides.baseline)))
    plan = predicted(costs, counts, settings, has_activations, time.monotonic() - start)
    return replace(plan, notes=[*plan.notes, *notes], needs=found)


def _bare(model: str, settings: RunSettings) -> Handle:
    load = settings.load
    named = {"dtype", "revision", "trust_remote_code", "chat_template", "system_prompt", "prefill"}
    return without_weights(model, device=load.device or load.device_map, **load.model_dump(include=named))


def needed(handle: Handle, sides: Sides, settings: RunSettings, room: Room | None = None) -> Needs:
    """What a run takes of the devices of this machine that the settings name.

    Args:
        handle: of the model, without weights or with.
        sides: the run's prompts.
        settings: the run's.
        room: other devices.
    """
    ids = handle.prompt_ids([text for side in (sides.target, sides.baseline) for text in side.train.texts])
    lengths = Lengths(list(map(len, ids)), common_prefix(ids), settings.measure.max_new_tokens)
    prompts = len(sides.target.test) + len(sides.baseline.test)
    sizes = Sizes(lengths, settings.collect.batch_size, settings.measure.batch_size, prompts,
                  settings.search.method == "fit")  # fmt: skip
    how = settings.load.quantise or ("offload" if settings.load.max_memory else "full precision")
    return needs(Model.of(handle, footprint(handle)), room or _room(settings), sizes, how)


def _room(settings: RunSettings) -> Room:
    """The devices that a model would be put on: one that is named, else the accelerators there are, else the CPU."""
    load, here = settings.load, devices_here()
    wanted = load.device or load.device_map
    if wanted and (named := [d for d in here if d == wanted or d.startswith(f"{wanted}:")]):
        return Room(named[0], free_bytes(named[0]))
    cards = [device for device in here if device != "cpu"] or here
    return Room(cards[0], min(map(free_bytes, cards)), len(cards))


def predicted(costs: Costs, prompts: Counts, settings: RunSettings, has_activations: bool, probe_s: float) -> Plan:
    """The plan that follows from the costs and the numbers of prompts; arithmetic only.

    Args:
        costs: from `probe`.
        prompts: prompts of each split, before the filter.
        settings: those of the run.
        has_activations: nothing is filtered for training or collected.
        probe_s: what the probe took.
    """
    kept = _filtered(costs, prompts, settings.collect.filter)
    count, others = prompts.target["test"], prompts.baseline["test"]

    def filtering(split: str) -> float:
        return costs.decoding(costs.refusing, prompts.target[split], FILTER_TOKENS) + costs.decoding(
            costs.settling, prompts.baseline[split], FILTER_TOKENS
        )

    def measuring(target: Sequence[float], comparing: float) -> float:
        # both sides in one, evenly: prompts are run by their length, whichever side they are of
        sides = ((count, target), (others, costs.answering))
        places = [((i + 0.5) / n, length) for n, of in sides for i, length in enumerate(islice(cycle(of), n))]
        lengths = [length for _, length in sorted(places, key=lambda place: place[0])]
        limit, batch = settings.measure.max_new_tokens, settings.measure.batch_size
        given = costs.decoding(lengths, len(lengths), limit, batch) + comparing * kept.baseline["test"]
        return given + _besides(costs, settings, target)

    fits = settings.search.method == "fit"  # it needs the model's own words, filtered by them or not
    splits = ("validation",) if has_activations and not fits else ("train", "validation")
    stages = {
        "load": costs.load,
        "prove": costs.prove,
        "filter": sum(map(filtering, splits)) if settings.collect.filter or fits else 0.0,
        "collect": 0.0 if has_activations else costs.collect * (kept.target["train"] + kept.baseline["train"]),
        "search": SEARCH_COSTS[settings.search.method](costs, kept, settings),
        # the report reads the validation prompts' activations before and after the edit
        "report data": 2 * costs.collect * (kept.target["validation"] + kept.baseline["validation"]),
        "measure original": measuring(costs.refusing, costs.reference),
        "edit": 0.0,  # attached live
        "measure edited": measuring(costs.settling, costs.divergence),
        "save": costs.save + costs.bake,
    }
    return Plan(
        {stage: round(seconds, 3) for stage, seconds in stages.items()},
        _memory(costs, kept, settings),
        costs.weight_bytes + costs.tied_bytes,
        costs,
        round(probe_s, 3),
    )


def _besides(costs: Costs, settings: RunSettings, target: Sequence[float]) -> float:
    """Seconds of further sets and obligations, of a model whose answers to target prompts have these lengths."""
    most, limit, batch = settings.prompts.test_prompts, settings.measure.max_new_tokens, settings.measure.batch_size
    further, own = min(settings.beside.also_prompts, most), settings.beside.also_target is not None
    sets = [*([target] * (1 + own)), costs.settling]
    seconds = sum(costs.decoding(lengths, further, limit, batch) for lengths in sets if further)
    seconds += costs.decoding(target, min(settings.beside.second_turn, most), limit, batch)
    return seconds + costs.decoding(costs.answering, min(settings.beside.obligations, most), limit, batch)


def _filtered(costs: Costs, prompts: Counts, filtering: bool) -> Counts:
    """What the filter leaves of each split; the test split isn't filtered but for the divergence."""
    refused, answered = (costs.refused, costs.answered) if filtering else (1.0, 1.0)
    target = {split: round(refused * count) for split, count in prompts.target.items()}
    baseline = {split: round(answered * count) for split, count in prompts.baseline.items()}
    compared = round(costs.answered * prompts.baseline["test"])
    return Counts({**target, "test": prompts.target["test"]}, {**baseline, "test": compared})


def _memory(costs: Costs, kept: Counts, settings: RunSettings) -> int:
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
    reference = kept.baseline["test"] * ANSWER_TOKENS * (KEPT * 8)
    return int(costs.peak_bytes + slots + max(logits, reference))
