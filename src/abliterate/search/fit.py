"""Fitting an edit by gradients: a strength per writer and a direction per layer, learnt through the frozen model.

The edit is attached live, as hooks whose directions and strengths are variables. Each step runs a few target
and baseline sequences and lowers

    w * refusing + drifting / UNIT + sparsity * mean strength

(`stand_ins`). The weight w starts high and falls, each point started from the last (continuation), so that one
run gives the whole frontier; each point is judged by answers decoded on the validation split. What was tried
and didn't help: docs/fit.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.errors import AbliterateError, NonFiniteError
from abliterate.common.reporting import SILENT, Reporter, each, untold
from abliterate.directions.means import Directions, Place
from abliterate.edit.edit import Edit
from abliterate.measure.decode import Answer
from abliterate.measure.divergence import Reference, make_reference
from abliterate.measure.judges import Judge, LexicalJudge
from abliterate.models.handle import Handle
from abliterate.search import objectives
from abliterate.search.examples import Examples
from abliterate.search.fit_settings import FitSettings
from abliterate.search.fit_state import FitState
from abliterate.search.frontier import FrontierPoint, Moment, choose, non_dominated
from abliterate.search.packed import Packer
from abliterate.search.stand_ins import Refusing, StandIn, Staying
from abliterate.search.variable_edit import VariableEdit

UNIT = 0.05  # nats of divergence that count as much as one unit of the stand-in for refusing
STARTING_STRENGTH = 0.6
START_PROMPTS = 12
REFUSAL_TOKENS = 32
TOO_MANY_REFUSALS = 0.5  # past it, points with still less weight on refusing are of no use
NOTHING_LEFT = 0.95  # refused past which an edit lighter still says nothing new
HEAVIER = 2  # how often more weight is tried where the first point still refuses
STARTS = 8
SAVE_EVERY = 5  # steps
NEW_START = 0.3  # share of training prompts still refused beyond which the start was wrong
VALIDATION_TOKENS = 24


@dataclass
class Fitted:
    """What the fit gives: the chosen edit, why, the frontier (fewest refusals first), and where it started."""

    edit: Edit
    chosen: FrontierPoint
    why: str
    frontier: list[FrontierPoint]
    start: Place
    points: list[FrontierPoint] = field(default_factory=list)


def fit(
    handle: Handle,
    directions: Directions,
    train: Examples,
    validation: Examples,
    judge: Judge | None = None,
    settings: FitSettings | None = None,
    *,
    also: Sequence[tuple[float, StandIn]] = (),
    kept: Float[Tensor, "k d_model"] | None = None,
    state: FitState | None = None,
    reporter: Reporter = SILENT,
) -> Fitted:
    """Fit strengths and directions by gradients, along the whole frontier.

    1. Start: the direction of one layer (or each layer's own) that lowers the objective most, in every writer.
    2. Fit at the first weight; then decode answers to the training targets and add the refusals that are left,
       in the edited model's words, to what is lowered.
    3. Fit on at each smaller weight; judge each point on the validation prompts.

    Args:
        handle: the loaded original; it is not changed.
        directions: where to start from, of the training split.
        train: what is fitted; prompts and the original's answers.
        validation: what points are judged on.
        judge: decides what a refusal is.
        settings: sizes and limits.
        also: further (weight, stand-in) pairs: behaviours to remove, keep or watch besides.
        kept: orthonormal directions that every direction stays orthogonal to.
        state: where the fit is written down as it goes, and goes on from.
        reporter: told about stages and progress.

    Raises:
        AbliterateError: when there is nothing to fit on, or no writer to edit.
        NonFiniteError: when the loss isn't finite.
    """
    settings, judge, state = settings or FitSettings(), judge or LexicalJudge(), state or FitState()
    for side, prompts, does in (("target", train.target, "refused"), ("baseline", train.baseline, "answered")):
        if not prompts:
            raise AbliterateError(
                f"none of the {side} prompts is {does}, so the fit has nothing to learn from; give others, "
                "or try --method sweep"
            )
    job = _Job(handle, directions, train, validation, judge, settings, also, state, kept)
    if state.step:
        reporter.say(f"going on from step {state.step}; {len(state.points)} points of the frontier are there")
    else:
        reporter.say(f"starting from {job.start(reporter)}; blocks {job.blocks[0]} to {job.blocks[-1]} may be edited")
    while (weight := next_weight(state.points, settings)) is not None:
        job.descend(weight, state.next_stop or settings.steps, reporter)
        if not state.points and not state.looked:
            state.next_stop = state.step + job.look_for_other_refusals(reporter)
            state.save()
            job.descend(weight, state.next_stop, reporter)
        point = job.judge_point(job.variables.edit(), weight=weight, step=state.step)
        state.points.append(point)
        state.next_stop = state.step + settings.steps_between
        state.save()
        reporter.say(f"weight {weight:g}: {point}")
    while (scaled := next_scaled(state.points, settings)) is not None:
        light, factor = scaled
        point = job.judge_point(light.edit * factor, weight=light.weight, step=light.step, scaled=factor)
        state.points.append(point)
        state.save()
        reporter.say(f"{factor:g} times the strengths of weight {light.weight:g}: {point}")
    front = non_dominated(state.points)
    chosen, why = choose(front, settings.max_refusal_rate, settings.max_divergence)
    reporter.say(f"chose {why}")
    return Fitted(chosen.edit, chosen, why, front, job.best_place(), list(state.points))


def next_weight(points: Sequence[FrontierPoint], settings: FitSettings) -> float | None:
    """The weight of the next point: heavier while too much is refused, then ever lighter; None at the end."""
    if any(p.scaled is not None for p in points):
        return None
    tried = [p.weight for p in points if p.weight is not None]
    if not tried:
        return settings.weights[0]
    enough = settings.max_refusal_rate if settings.max_refusal_rate is not None else 0.0
    if all(p.refused.rate > enough for p in points) and len(points) <= HEAVIER:
        return tried[-1] * 3
    if points[-1].refused.rate > max(TOO_MANY_REFUSALS, min(p.refused.rate for p in points)):
        return None
    return next((w for w in settings.weights if w < min(tried)), None)


def next_scaled(points: Sequence[FrontierPoint], settings: FitSettings) -> tuple[FrontierPoint, float] | None:
    """The lightest fitted point and the next factor for its strengths; None when hardly anything is removed any more.

    Less weight leads the fit no further than to where refusals begin to come back; gentler edits lie on the way from
    there to none at all, and to go there takes no gradient.
    """
    fitted = [p for p in points if p.scaled is None]
    scaled = [p for p in points if p.scaled is not None]
    if len(scaled) == len(settings.lighter) or points[-1].refused.rate >= NOTHING_LEFT:
        return None
    return non_dominated(fitted)[-1], settings.lighter[len(scaled)]


class _Job:
    """The variables, the rows and the optimiser of one fit."""

    def __init__(
        self, handle: Handle, directions: Directions, train: Examples, validation: Examples, judge: Judge,
        settings: FitSettings, also: Sequence[tuple[float, StandIn]], state: FitState,
        kept: Float[Tensor, "k d_model"] | None = None,
    ) -> None:  # fmt: skip
        self.handle, self.directions, self.settings, self.state = handle, directions, settings, state
        self.judge, self.train, self.validation, self.also = judge, train, validation, list(also)
        self.blocks = settings.layers or blocks_to_edit(directions, handle.layers)
        self.variables = VariableEdit(handle, self.blocks, settings.rank, kept, settings.seed)
        self.refusing = Refusing(
            handle.prompt_ids([*train.target, *train.over_refused]),
            [a.whole for a in (*train.refusals, *train.over_refusals)],
            [a.whole for a in train.answers],
        )
        self.known = len(self.refusing.rows)  # rows after these are refusals in other words
        count = settings.baseline_prompts
        self.staying = Staying(
            _reference(handle, train.baseline[:count], train.answers[:count], settings.answer_tokens)
        )
        self.held_out = _reference(handle, validation.baseline, validation.answers, VALIDATION_TOKENS)
        stand_ins: list[StandIn] = [self.refusing, self.staying, *(s for _, s in self.also)]
        self.packer = Packer(handle, [row for s in stand_ins for row in s.rows], self.blocks[0])
        sizes = [len(s.rows) for s in stand_ins]
        self.rows = [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]
        if state.prompts:
            self._take_in(state.prompts, state.openings)
        vectors, strengths = self.variables.vectors, self.variables.strengths
        self.optimiser = torch.optim.Adam(
            [
                {"params": [vectors], "lr": settings.rate / handle.d_model**0.5},
                {"params": [strengths], "lr": settings.rate / 2},
            ],
            betas=(0.9, 0.95),
        )
        state.bind(vectors, strengths, self.optimiser)

    def start(self, reporter: Reporter) -> str:
        """Put the variables at the best of a few starts, by the objective on a few prompts; says which."""
        starts = self._starts()
        best, best_loss = "", math.inf
        for name in each(reporter, "choosing where to start", list(starts)):
            self.variables.put(starts[name], 1.0)
            with torch.no_grad():
                loss = float(self._loss(self.settings.weights[0], START_PROMPTS, START_PROMPTS, 0))
            if loss < best_loss:
                best, best_loss = name, loss
        if not best:
            raise NonFiniteError(f"model {self.handle.source}: the loss is NaN or infinite; try --dtype float32")
        self.variables.put(starts[best], STARTING_STRENGTH)
        return best

    def best_place(self) -> Place:
        """Where the edited blocks' sides part best."""
        separation = self.directions.separation[:, 0, -1].nan_to_num(-1.0)
        return Place(max(self.blocks, key=lambda layer: float(separation[layer])), "pre", -1)

    def _starts(self) -> dict[str, Float[Tensor, "block d_model"]]:
        """One layer's direction in every block, for the layers that separate best; and each block's own."""
        separation = self.directions.separation[:, 0, -1].nan_to_num(-1.0)
        inside = [layer for layer in self.blocks if separation[layer] > 0]
        layers = sorted(sorted(inside, key=lambda layer: -float(separation[layer]))[:STARTS])
        starts = {
            f"the direction at block {layer}, pre": self.directions.unit[layer, 0, -1].repeat(len(self.blocks), 1)
            for layer in layers
        }
        own = self.directions.unit[self.blocks[0] : self.blocks[-1] + 1, 2, -1]
        return {**starts, "each block's own direction": own}

    def descend(self, weight: float, until: int, reporter: Reporter) -> None:
        """Gradient steps at one weight until the step number `until`."""
        settings, state = self.settings, self.state
        tick = reporter.progress(f"fitting at weight {weight:g}", until - state.step) if until > state.step else untold
        while state.step < until:
            for group, base in zip(self.optimiser.param_groups, self._rates(), strict=True):
                group["lr"] = base
            self.optimiser.zero_grad()
            loss = self._loss(weight, settings.target_batch, settings.baseline_batch, state.step)
            if not bool(loss.isfinite()):
                raise NonFiniteError(f"model {self.handle.source}: the loss is NaN or infinite; try --dtype float32")
            loss.backward()
            self.optimiser.step()
            self.variables.keep_in_bounds(settings.max_strength)
            state.step += 1
            if state.step % SAVE_EVERY == 0 or state.step == until:
                state.save()
            tick(1)

    def _rates(self) -> tuple[float, float]:
        """Learning rates: falling to a third over the first point, and to a tenth over the others."""
        settings, step = self.settings, self.state.step
        first = min(1.0, step / settings.steps)
        rest = max(0, step - settings.steps) / max(1, settings.steps_between * len(settings.weights))
        factor = (1 - 0.67 * first) * max(0.3, 1 - 0.7 * rest)
        return factor * settings.rate / self.handle.d_model**0.5, factor * settings.rate / 2

    def _loss(self, weight: float, targets: int, baselines: int, step: int) -> Float[Tensor, ""]:
        refusing = self._refusing_batch(targets, step)
        batches: list[tuple[float, StandIn, list[int], list[int]]] = [(weight, self.refusing, self.rows[0], refusing)]
        batches.append((1 / UNIT, self.staying, self.rows[1], self._batch(1, baselines, step)))
        for place, (own_weight, stand_in) in enumerate(self.also, start=2):
            batches.append((own_weight, stand_in, self.rows[place], self._batch(place, targets, step)))
        with self.variables.live():
            logprobs = self.packer.logprobs([rows[i] for _, _, rows, picked in batches for i in picked])
        total = self.settings.sparsity * self.variables.strengths.mean()
        for factor, stand_in, _, picked in batches:
            own, logprobs = logprobs[: len(picked)], logprobs[len(picked) :]
            total = total + factor * stand_in.loss(picked, own).to(total.device)
        return total

    def _refusing_batch(self, size: int, step: int) -> list[int]:
        """Half of the batch are refusals in other words, where there are any."""
        other = len(self.refusing.rows) - self.known
        share = min(other, size // 2)
        known = self._batch(0, size - share, step)
        return known + [self.known + i for i in _draw(other, share, step, self.settings.seed, 7)]

    def _batch(self, which: int, size: int, step: int) -> list[int]:
        count = self.known if which == 0 else len(self.rows[which])
        return _draw(count, min(size, count), step, self.settings.seed, which)

    def look_for_other_refusals(self, reporter: Reporter) -> int:
        """Decode answers to training targets; refusals that are left, in other words, are lowered too from now on.

        Returns:
            How many more steps that asks for: none, a few, or, after a new start, as many as at first.
        """
        prompts = self.train.target[: self.settings.validation_prompts]
        (answers, refused), _ = objectives.tried(
            self.handle,
            self.variables.edit(),
            prompts,
            self.judge,
            max_new_tokens=REFUSAL_TOKENS,
            stop_on=(False, True),
        )
        left = [(p, a) for p, a, r in zip(prompts, answers, refused, strict=True) if r and a.whole]
        self.state.looked = True
        if not left:
            return 0
        reporter.say(
            f"{len(left)} of {len(prompts)} training prompts are still refused; these refusals are lowered too"
        )
        ids, openings = self.handle.prompt_ids([p for p, _ in left]), [a.whole for _, a in left]
        self._take_in(ids, openings)
        self.state.prompts, self.state.openings = ids, [o[:REFUSAL_TOKENS] for o in openings]
        if len(left) <= NEW_START * len(prompts):
            return self.settings.steps_between
        reporter.say(f"that is many; starting anew from {self.start(reporter)}")
        self.optimiser.state.clear()
        return self.settings.steps

    def _take_in(self, prompts: Sequence[list[int]], openings: Sequence[list[int]]) -> None:
        self.rows[0] += self.packer.add(self.refusing.add(prompts, openings))

    def judge_point(self, edit: Edit, **found: Any) -> FrontierPoint:
        """An edit judged on validation prompts by decoded answers and divergence; `found` says how it was come to."""
        settings = self.settings
        prompts = self.validation.target[: settings.validation_prompts]
        answers, drift = objectives.tried(
            self.handle, edit, prompts, self.judge, self.held_out, max_new_tokens=settings.decode_tokens
        )
        assert drift is not None
        return FrontierPoint(
            edit, answers.rate, drift.first_token, divergence_along=drift.answer,
            found=Moment.now(), **found,
        )  # fmt: skip


def blocks_to_edit(directions: Directions, layers: int) -> range:
    """From an eighth of the depth below the first block where the sides part half as well as anywhere, to the last."""
    separation = directions.separation[:, 0, -1].nan_to_num(-1.0)
    parted = (separation >= 0.5 * separation.max()).nonzero().flatten()
    return range(max(0, int(parted[0]) - max(1, layers // 8)), layers)


def _draw(count: int, size: int, step: int, seed: int, which: int) -> list[int]:
    """`size` of `count` indices for a step: shuffled epochs one after the other, a function of the step alone."""
    picked = []
    for place in range(step * size, (step + 1) * size):
        epoch, index = divmod(place, count)
        generator = torch.Generator().manual_seed(1_000_003 * seed + 101 * epoch + which)
        picked.append(int(torch.randperm(count, generator=generator)[index]))
    return picked


def _reference(handle: Handle, prompts: Sequence[str], answers: Sequence[Answer], tokens: int) -> Reference:
    kept = [i for i, a in enumerate(answers) if a.whole]
    ids = handle.prompt_ids([prompts[i] for i in kept])
    return make_reference(handle, ids, [answers[i] for i in kept], answer_tokens=tokens)
