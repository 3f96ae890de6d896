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
from dataclasses import dataclass
from operator import itemgetter

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.errors import AbliterateError, NonFiniteError
from abliterate.common.reporting import SILENT, Reporter, untold
from abliterate.directions.means import Directions, Place
from abliterate.edit.edit import Edit
from abliterate.measure import reference_of
from abliterate.measure.decode import Answer
from abliterate.measure.judges import Judge
from abliterate.measure.verdicts import Panel
from abliterate.measure.wordings import Wordings, learn_wordings
from abliterate.models.handle import Handle
from abliterate.search import objectives
from abliterate.search.examples import Examples
from abliterate.search.fit_settings import FitSettings
from abliterate.search.fit_state import FitState
from abliterate.search.frontier import FrontierPoint, non_dominated
from abliterate.search.goal import Goal, Term
from abliterate.search.points import PointJudge, panel_of
from abliterate.search.stand_ins import Refusing, StandIn, Staying
from abliterate.search.starts import Start, starts, wider
from abliterate.search.variable_edit import VariableEdit

UNIT = 0.05  # nats of divergence that count as much as one unit of the stand-in for refusing
STARTING_STRENGTH = 0.9  # of a start in few blocks
STRENGTH_EVERYWHERE = 0.6
START_PROMPTS = 8
REFUSAL_TOKENS = 32
TOO_MANY_REFUSALS = 0.5  # past it, points with still less weight on refusing are of no use
NOTHING_LEFT = 0.5  # of what the original refuses: past it, a gentler edit still says nothing that matters
HEAVIER = 2  # how often more weight is tried where the first point still refuses
SAVE_EVERY = 5  # steps
NEW_START = 0.3  # share of training prompts still refused beyond which the start was wrong


@dataclass
class Fitted:
    """What the fit gives: the chosen edit, why, all points (the strongest first), and where it started."""

    edit: Edit
    chosen: FrontierPoint
    why: str
    frontier: list[FrontierPoint]
    start: Place


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

    1. Start: the direction of one layer, in the few blocks below it (or elsewhere: `starts`), that lowers the objective
       most.
    2. Fit at the first weight; then decode answers to the training targets and add the refusals and evasions that are
       left, in the edited model's words, to what is lowered.
    3. Fit on at each smaller weight; judge each point on the validation prompts. A sentence that has become common
       there is an evasion and joins what is lowered.
    4. Choose by estimates from all points; the one chosen must be relevant to its prompts too, or the choice is made
       again without what wasn't.

    Args:
        handle: the loaded original; it is not changed.
        directions: where to start from, of the training split.
        train: what is fitted; prompts and the original's answers.
        validation: what points are judged on.
        judge: decides what a refusal is; one that isn't a panel is made one, which learns from `train`.
        settings: sizes and limits.
        also: further (weight, stand-in) pairs: behaviours to remove, keep or watch besides.
        kept: orthonormal directions that every direction stays orthogonal to.
        state: where the fit is written down as it goes, and goes on from.
        reporter: told about stages and progress.

    Raises:
        AbliterateError: when there is nothing to fit on, or no writer to edit.
        NonFiniteError: when the loss isn't finite.
    """
    settings, state = settings or FitSettings(), state or FitState()
    for side, prompts, does in (("target", train.target, "refused"), ("baseline", train.baseline, "answered")):
        if not prompts:
            raise AbliterateError(
                f"none of the {side} prompts is {does}, so the fit has nothing to learn from; give others, "
                "or try --method sweep"
            )
    job = _Job(handle, directions, train, validation, panel_of(judge, train, reporter), settings, also, state, kept)
    if state.step:
        reporter.say(f"going on from step {state.step}; {len(state.points)} points of the frontier are there")
    else:
        reporter.say(f"starting from {job.start(reporter)}; blocks {job.blocks[0]} to {job.blocks[-1]} may be edited")
    while (weight := next_weight(state.points, settings, job.points.share)) is not None:
        job.descend(weight, state.next_stop or settings.steps, reporter)
        if not state.points and not state.looked:
            state.next_stop = state.step + job.look_for_other_refusals(reporter)
            state.save()
            job.descend(weight, state.next_stop, reporter)
        point = job.points.judge(job.variables.edit(), weight=weight, step=state.step)
        state.points.append(point)
        job.take_in_evasions(reporter)
        state.next_stop = state.step + settings.steps_between
        state.save()
        reporter.say(f"weight {weight:g}: {point}")
    while (scaled := next_scaled(state.points, settings, job.points.share)) is not None:
        light, factor = scaled
        point = job.points.judge(light.edit * factor, weight=light.weight, step=light.step, scaled=factor)
        state.points.append(point)
        state.save()
        reporter.say(f"{factor:g} times the strengths of weight {light.weight:g}: {point}")
    chosen, why = job.points.choose(reporter)
    reporter.say(f"chose {why}")
    front = sorted(state.points, key=lambda p: -p.drift)
    return Fitted(chosen.edit, chosen, why, front, job.best_place())


def next_weight(points: Sequence[FrontierPoint], settings: FitSettings, share: float = 1.0) -> float | None:
    """The weight of the next point: heavier while too much is not answered, then ever lighter; None at the end.

    Args:
        points: those judged so far.
        settings: the weights, and what is enough.
        share: of the target prompts that the original refuses.
    """
    if any(p.scaled is not None for p in points):
        return None
    tried = [p.weight for p in points if p.weight is not None]
    if not tried:
        return settings.weights[0]
    enough = settings.max_refusal_rate if settings.max_refusal_rate is not None else 0.0
    if all(p.not_answered.rate > enough for p in points) and len(points) <= HEAVIER:
        return tried[-1] * 3
    if points[-1].not_answered.rate > max(TOO_MANY_REFUSALS * share, min(p.not_answered.rate for p in points)):
        return None
    return next((w for w in settings.weights if w < min(tried)), None)


def next_scaled(
    points: Sequence[FrontierPoint], settings: FitSettings, share: float = 1.0
) -> tuple[FrontierPoint, float] | None:
    """The lightest fitted point and the next factor for its strengths; None when half of the refusals are back.

    Less weight leads the fit no further than to where refusals begin to come back; gentler edits lie on the way from
    there to none at all, and to go there takes no gradient.
    """
    fitted = [p for p in points if p.scaled is None]
    scaled = [p for p in points if p.scaled is not None]
    if len(scaled) == len(settings.lighter) or points[-1].not_answered.rate >= NOTHING_LEFT * share:
        return None
    return non_dominated(fitted)[-1], settings.lighter[len(scaled)]


class _Job:
    """The variables, the rows and the optimiser of one fit."""

    def __init__(
        self, handle: Handle, directions: Directions, train: Examples, validation: Examples, panel: Panel,
        settings: FitSettings, also: Sequence[tuple[float, StandIn]], state: FitState,
        kept: Float[Tensor, "k d_model"] | None = None,
    ) -> None:  # fmt: skip
        self.handle, self.directions, self.settings, self.state = handle, directions, settings, state
        self.panel, self.train, self.also = panel, train, list(also)
        self.points = PointJudge(handle, train, validation, panel, settings, state.points)
        panel.evasions = Wordings(tuple(state.evasions))
        self.refusing = Refusing(
            handle.prompt_ids([*train.target, *train.over_refused]),
            [a.whole for a in (*train.refusals, *train.over_refusals)],
            [a.whole for a in train.answers],
        )
        self.known = len(self.refusing.rows)  # rows after these are refusals in other words
        count = settings.baseline_prompts
        staying = reference_of(handle, train.baseline[:count], train.answers[:count], tokens=settings.answer_tokens)
        assert staying is not None
        self.staying = Staying(staying)
        self.kept, self.allowed = kept, settings.layers or range(handle.layers)
        for prompts, openings in state.others:
            self.refusing.add(prompts, openings)
        if state.step:
            self._open(range(state.first, self.allowed.stop))

    def _open(self, blocks: range) -> None:
        """Make these blocks' writers variables, at what the state says of them."""
        self.blocks, settings, state = blocks, self.settings, self.state
        self.goal = Goal(
            self.handle, [self.refusing, self.staying, *(stand_in for _, stand_in in self.also)], self.known, blocks,
            settings.rank, self.kept, settings.seed, [len(prompts) for prompts, _ in state.others],
        )  # fmt: skip
        assert isinstance(self.goal.variables, VariableEdit)
        self.variables = self.goal.variables
        vectors, strengths = self.variables.vectors, self.variables.strengths
        self.optimiser = torch.optim.Adam(
            [
                {"params": [vectors], "lr": settings.rate / self.handle.d_model**0.5},
                {"params": [strengths], "lr": settings.rate / 2},
            ],
            betas=(0.9, 0.95),
        )
        state.bind(vectors, strengths, self.optimiser)

    def start(self, reporter: Reporter) -> str:
        """Put the variables at the best of some starts, by the objective on a few prompts; says which.

        From then on the fit may edit the blocks from the start's first one on.
        """
        self.state.clear()
        near = list(starts(self.directions, self.allowed))
        blocks = range(min((s.blocks.start for s in near), default=self.allowed.start), self.allowed.stop)
        self._open(blocks)
        found = self._tried(near, reporter)
        best = min(found, default=None, key=itemgetter(0))
        found += self._tried(list(wider(best and best[1], self.directions, blocks)), reporter)
        if not found:
            raise self._not_finite()
        _, chosen = min(found, key=itemgetter(0))
        self._open(range(chosen.blocks.start, self.allowed.stop))
        self.state.first = self.blocks.start
        self._put(chosen, STARTING_STRENGTH if chosen.blocks.stop < self.blocks.stop else STRENGTH_EVERYWHERE)
        return chosen.name

    def _not_finite(self) -> NonFiniteError:
        return NonFiniteError(f"model {self.handle.source}: the loss is NaN or infinite; try --dtype float32")

    def _tried(self, tried: Sequence[Start], reporter: Reporter) -> list[tuple[float, Start]]:
        """Each start with its loss, where that is finite."""
        values = []
        for start in tried:
            self._put(start, 1.0)
            values.append((self.variables.vectors.detach().clone(), self.variables.strengths.detach().clone()))
        terms = self._terms(self.settings.weights[0], START_PROMPTS, START_PROMPTS, 0)
        tick = reporter.progress("choosing where to start", len(tried))
        losses = self.goal.losses(terms, self.settings.sparsity, values, tick)
        return [(loss, start) for loss, start in zip(losses, tried, strict=True) if math.isfinite(loss)]

    def _put(self, start: Start, strength: float) -> None:
        self.variables.put(start.directions[self.blocks.start : self.blocks.stop], strength, start.blocks)

    def best_place(self) -> Place:
        """Where the edited blocks' sides part best."""
        separation = self.directions.separation[:, 0, -1].nan_to_num(-1.0)
        return Place(max(self.blocks, key=lambda layer: float(separation[layer])), "pre", -1)

    def descend(self, weight: float, until: int, reporter: Reporter) -> None:
        """Gradient steps at one weight until the step number `until`."""
        settings, state = self.settings, self.state
        tick = reporter.progress(f"fitting at weight {weight:g}", until - state.step) if until > state.step else untold
        while state.step < until:
            for group, base in zip(self.optimiser.param_groups, self._rates(), strict=True):
                group["lr"] = base
            terms = self._terms(weight, settings.target_batch, settings.baseline_batch, state.step)
            if not math.isfinite(self.goal.descend(terms, settings.sparsity)):
                raise self._not_finite()
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

    def _terms(self, weight: float, targets: int, baselines: int, step: int) -> list[Term]:
        """The objective on one batch."""
        return [
            Term(0, weight, self._refusing_batch(targets, step)),
            Term(1, 1 / UNIT, self._batch(1, baselines, step)),
            *(Term(which, own, self._batch(which, targets, step)) for which, (own, _) in enumerate(self.also, start=2)),
        ]

    def _refusing_batch(self, size: int, step: int) -> list[int]:
        """Half of the batch are refusals in other words, where there are any."""
        other = len(self.refusing.rows) - self.known
        share = min(other, size // 2)
        known = self._batch(0, size - share, step)
        return known + [self.known + i for i in draw(other, share, step, self.settings.seed, 7)]

    def _batch(self, which: int, size: int, step: int) -> list[int]:
        count = self.known if which == 0 else len(self.goal.stand_ins[which].rows)
        return draw(count, min(size, count), step, self.settings.seed, which)

    def look_for_other_refusals(self, reporter: Reporter) -> int:
        """Decode answers to training targets; refusals that are left, in other words, are lowered too from now on.

        Returns:
            How many more steps that asks for: none, a few, or, after a new start, as many as at first.
        """
        prompts = self.train.target[: self.settings.validation_prompts]
        (answers, missing), _ = objectives.tried(
            self.handle, self.variables.edit(), prompts, self.panel.strict, max_new_tokens=REFUSAL_TOKENS
        )
        left = [(p, a) for p, a, none in zip(prompts, answers, missing, strict=True) if none and a.whole]
        self.state.looked = True
        if not left:
            return 0
        reporter.say(
            f"{len(left)} of {len(prompts)} training prompts are still not answered; these answers are lowered too"
        )
        self._take_in_more(self.handle.prompt_ids([p for p, _ in left]), [a for _, a in left])
        if len(left) <= NEW_START * len(prompts):
            return self.settings.steps_between
        reporter.say(f"that is many; starting anew from {self.start(reporter)}")
        return self.settings.steps

    def take_in_evasions(self, reporter: Reporter) -> None:
        """Sentences that became common in the last point's answers, in place of refusals, are lowered from now on.

        They were seen behind validation prompts, and are lowered behind training prompts.
        """
        answers = [a for a, none in zip(*self.points.answers[len(self.state.points) - 1], strict=True) if none]
        texts, baseline = [a.text for a in answers], [a.text for a in self.train.answers]
        fresh = [k for k in learn_wordings(texts, baseline).keys if k not in self.panel.known]
        if not fresh or not self.panel.forms:
            return
        self.state.evasions += fresh
        self.panel.evasions = Wordings(tuple(self.state.evasions))
        evasive = [a for a in answers if a.whole and Wordings(tuple(fresh)).stand_in(a.text)]
        reporter.say(f"{len(fresh)} sentences have become common in place of answers; they are lowered too")
        self._take_in_more(self.handle.prompt_ids(self.train.target[: len(evasive)]), evasive)

    def _take_in_more(self, prompts: list[list[int]], answers: Sequence[Answer]) -> None:
        openings = [a.whole[:REFUSAL_TOKENS] for a in answers][: len(prompts)]
        self.state.others.append((prompts, openings))
        self.goal = self.goal.with_more(prompts, openings)


def draw(count: int, size: int, step: int, seed: int, which: int) -> list[int]:
    """`size` of `count` indices for a step: shuffled epochs one after the other, a function of the step alone."""
    picked = []
    for place in range(step * size, (step + 1) * size):
        epoch, index = divmod(place, count)
        generator = torch.Generator().manual_seed(1_000_003 * seed + 101 * epoch + which)
        picked.append(int(torch.randperm(count, generator=generator)[index]))
    return picked
