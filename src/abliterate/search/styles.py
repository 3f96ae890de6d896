"""Fitting an edit that adds a style, by gradients: a vector at the output of each block (`Edit.shifts`).

As in `fit`, a few steps through the frozen model: answers in the style become likelier behind plain prompts
(`stand_ins.Saying`). Then the edited model is asked, and its own answers are learnt from: those in style, up to where
they begin to repeat themselves, and repetitions, which are to become unlikely.

A shift starts at the difference of means along answers (activation addition, Turner et al. 2023, arXiv 2308.10248;
Rimsky et al. 2024, arXiv 2312.06681); trained, it is a steering vector as in Cao et al. 2024 (arXiv 2406.00045), one a
block. Points are judged by whole decoded answers: openings tell nothing of how the rest is written. Removing a style
so was tried and ended in no edit at all: `style_sweep` does that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.errors import AbliterateError, NonFiniteError
from abliterate.common.reporting import SILENT, Reporter
from abliterate.directions.means import Directions, Place
from abliterate.edit.edit import Edit
from abliterate.measure import Judged, mean_score, reference_of
from abliterate.measure.divergence import read_each
from abliterate.measure.judges import Judge
from abliterate.models.handle import Handle
from abliterate.models.writers import SITES
from abliterate.search import objectives
from abliterate.search.fit import draw
from abliterate.search.frontier import FrontierPoint
from abliterate.search.goal import Goal, Term
from abliterate.search.stand_ins import Lesson, Saying, mean_logprob
from abliterate.search.sweep import LAST_LAYERS_LEFT_OUT, Candidate, Choice
from abliterate.search.variable_edit import VariableShift

SITE = "post"
RUN = 4  # tokens: a run of so many that an answer has had already is a repetition
FEWEST = 6  # tokens of an answer that can be learnt from
MORE_DEGENERATE = 0.03  # of answers, beyond the original's share, that a point may have


@dataclass(frozen=True)
class StyleSettings:
    """Sizes of the fit.

    Attributes:
        layers: blocks that may be shifted; by default all but the first sixth and the last fifth.
        start: what is added at first, in differences of means over all blocks.
        steps, steps_between: gradient steps to the first answers, and from each point to the next.
        rounds: how often the edited model's own answers are learnt from.
        factors: of the last fit's shifts, tried besides.
        batch: answers per step.
        answer_tokens: of each answer that are learnt from.
        rate: size of a step, in shares of what is added at first.
        prompts, tokens: answers decoded to judge a point.
    """

    layers: range | None = None
    start: float = 1.0
    steps: int = 12
    steps_between: int = 8
    rounds: int = 2
    factors: tuple[float, ...] = (0.85, 1.15)
    batch: int = 8
    answer_tokens: int = 40
    rate: float = 0.3
    prompts: int = 48
    tokens: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Taught:
    """What a style is learnt from at first: token ids of prompts and of the answers behind them.

    Attributes:
        prompts: as they stand.
        answers: in the style, one per prompt.
        asked: training prompts whose answers by the edited model are learnt from.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    asked: list[str]


def fit_style(
    handle: Handle,
    directions: Directions,
    taught: Taught,
    prompts: Sequence[str],
    judge: Judge,
    settings: StyleSettings | None = None,
    *,
    kept: Float[Tensor, "k d_model"] | None = None,
    reporter: Reporter = SILENT,
) -> Choice:
    """Fit shifts that add a style to answers, and choose a point by decoded answers.

    There is a point after the first fit and after each round of own answers, then a little more and less of the last
    one. Of those that make no more than 3% more answers degenerate than the original, or of all where there are none,
    the one with most whole answers in style is taken, of equals the one of less divergence.

    Args:
        handle: the loaded original; it is not changed.
        directions: of the contrast.
        taught: what is learnt from.
        prompts: validation prompts whose answers are judged.
        judge: decides which answers show the style.
        settings: sizes of the fit.
        kept: orthonormal directions that every shift stays orthogonal to.
        reporter: told about stages and progress.

    Raises:
        AbliterateError: when no block is left, the model answers no validation prompt, or nothing makes an answer show
            what is added.
        NonFiniteError: when the loss isn't finite.
    """
    job = _Job(handle, directions, taught, judge, settings or StyleSettings(), kept, reporter)
    job.look_at_original(prompts)
    job.add()
    return job.choice()


class _Job:
    """The variables, the lessons and the optimiser of one fit, and the points it gave."""

    def __init__(
        self, handle: Handle, directions: Directions, taught: Taught, judge: Judge, settings: StyleSettings,
        kept: Float[Tensor, "k d_model"] | None, reporter: Reporter,
    ) -> None:  # fmt: skip
        self.handle, self.directions, self.judge, self.settings = handle, directions, judge, settings
        self.taught, self.reporter, self.step = taught, reporter, 0
        self.blocks = blocks_of(directions, settings.layers)
        row, unit = SITES.index(SITE), directions.unit
        self.place = Place(max(self.blocks, key=lambda b: float(directions.separation[b, row, -1])), SITE, -1)
        at = slice(self.blocks.start, self.blocks.stop)
        units = (directions.length[at, row, -1] * settings.start / len(self.blocks)).float()
        self.variables = VariableShift(handle, self.blocks, units, kept)
        self.variables.put_values(unit[at, row, -1:], torch.ones(len(self.blocks), 1))
        rates = (settings.rate / handle.d_model**0.5, settings.rate / 2)
        groups = zip((self.variables.vectors, self.variables.strengths), rates, strict=True)
        self.optimiser = torch.optim.Adam([{"params": [v], "lr": lr} for v, lr in groups], betas=(0.9, 0.95))
        self.rates, self.lessons = rates, list[Lesson]()
        self.points: list[tuple[FrontierPoint, Judged]] = []
        self.take_in([x for pair in zip(taught.prompts, taught.answers, strict=True) for x in self._wanted(*pair)])

    def _wanted(self, prompt: list[int], answer: list[int]) -> list[Lesson]:
        """An answer that is to become likely, up to where it begins to repeat itself; none where that is too soon."""
        own = answer[: self.settings.answer_tokens]
        own = own[: (repeats(own) or [len(own)])[0]]
        return [Lesson(prompt, own, list(range(len(own))), True)] if len(own) >= FEWEST else []

    def take_in(self, lessons: list[Lesson]) -> None:
        """Learn from these too, measured by what the original makes of them."""
        rows = [[*lesson.prompt, *lesson.answer[:-1]] for lesson in lessons]
        answers, counted = [x.answer for x in lessons], [x.counted for x in lessons]
        before = read_each(self.handle, rows, answers, _mean_logprob, counted)
        self.lessons += [x._replace(before=b) for x, b in zip(lessons, before, strict=True)]

    def look_at_original(self, prompts: Sequence[str]) -> None:
        """What points are compared with: the original on the same prompts."""
        self.prompts = list(prompts)[: self.settings.prompts]
        nothing = Edit((), torch.zeros(0, self.handle.d_model), torch.zeros(0, 0))
        before = self._answers(nothing, self.prompts, self.settings.tokens)
        found = reference_of(self.handle, self.prompts, before.answers)
        if found is None:
            raise AbliterateError(f"{self.handle.source} answers none of the validation prompts")
        self.reference, self.most_degenerate = found, before.degenerate.rate + MORE_DEGENERATE

    def add(self) -> None:
        self.descend(self.settings.steps)
        self.judged()
        for _ in range(self.settings.rounds):
            self.learn_from_own_answers()
            self.descend(self.settings.steps_between)
            self.judged()
        for factor in self.settings.factors:
            self.judged(factor)

    def learn_from_own_answers(self) -> None:
        """Ask training prompts; answers in style become likelier, and repetitions less likely."""
        asked, tokens, lessons = self.taught.asked, self.settings.answer_tokens, list[Lesson]()
        found = self._answers(self.variables.edit(), asked, tokens)
        for prompt, answer, shown in zip(self.handle.prompt_ids(asked), found.answers, found.shown, strict=True):
            own = answer.whole[:tokens]
            again = repeats(own)
            lessons += self._wanted(prompt, own) if shown else []
            lessons += [Lesson(prompt, own, again, False)] if len(again) >= RUN else []
        wanted = sum(x.wanted for x in lessons)
        self.reporter.say(
            f"{found.rate.count} of {found.rate.total} answers to training prompts show it; {wanted} become likelier, "
            f"the repetitions in {len(lessons) - wanted} less likely"
        )
        self.take_in(lessons)

    def descend(self, steps: int) -> None:
        """Gradient steps on the lessons there are."""
        settings, saying, kept = self.settings, Saying(self.lessons), self.variables.kept
        count, units = len(self.lessons), self.variables.units
        goal = Goal(self.handle, [saying], count, self.blocks, 1, kept, settings.seed, units=units)
        goal.__dict__["variables"] = self.variables
        total = settings.steps + settings.steps_between * (settings.rounds + 1)
        tick = self.reporter.progress("fitting", steps)
        for _ in range(steps):
            for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
                group["lr"] = rate * (1 - 0.7 * self.step / total)
            terms = [Term(0, 1.0, draw(count, min(settings.batch, count), self.step, settings.seed, 0))]
            if not math.isfinite(goal.descend(terms, 0.0)):
                raise NonFiniteError(f"model {self.handle.source}: the loss is NaN or infinite; try --dtype float32")
            self.optimiser.step()
            self.variables.keep_in_bounds(math.inf)
            self.step += 1
            tick(1)

    def judged(self, scaled: float | None = None) -> None:
        """The next point: what the edit as it is now, or so many times of it, does to validation prompts."""
        edit = self.variables.edit() * (scaled or 1.0)
        settings = self.settings
        answers, drift = objectives.tried(
            self.handle, edit, self.prompts, self.judge, self.reference, max_new_tokens=settings.tokens, stop_on=()
        )
        assert drift is not None
        note = {"score": mean_score(self.judge, answers.answers), "degenerate": answers.degenerate.to_json()}
        point = FrontierPoint(edit, answers.rate, drift.answer, note, step=self.step, scaled=scaled)
        self.points.append((point, answers))
        which = f"{scaled:g} times the shifts" if scaled else f"step {self.step}"
        self.reporter.say(
            f"{which}: {answers.rate.count} of {answers.rate.total} show it, {answers.degenerate.count} degenerate, at "
            f"divergence {drift.answer:.3f}"
        )

    def choice(self) -> Choice:
        """The point to take, with every one as a candidate."""
        sound = [p for p in self.points if p[1].degenerate.rate <= self.most_degenerate] or self.points
        chosen, answers = max(sound, key=lambda p: (p[1].coherent.count, -p[0].divergence))
        if not answers.coherent.count:
            raise AbliterateError(
                f"no shift fitted makes a coherent answer of {self.handle.source} show the behaviour; give other "
                "prompts or system prompts, or --layers"
            )
        why = (
            f"{answers.coherent.count} of {answers.coherent.total} answers show it and are coherent, the most of "
            f"{len(sound)} points; {answers.degenerate.count} degenerate"
        )
        self.reporter.say(f"chose {why}")
        candidates = [self._candidate(point, why if point is chosen else "") for point, _ in self.points]
        winner = next(c for c, (point, _) in zip(candidates, self.points, strict=True) if point is chosen)
        return Choice(chosen.edit, winner, candidates)

    def _candidate(self, point: FrontierPoint, why: str) -> Candidate:
        separation = float(self.directions.separation[self.place.layer, SITES.index(SITE), -1])
        note = why or f"step {point.step}, {point.note['degenerate']['count']} degenerate"
        return Candidate(
            self.place, separation, strength=point.scaled or 1.0, divergence=point.divergence, refusals=point.refused,
            stage="fitted", note=note,
        )  # fmt: skip

    def _answers(self, edit: Edit, prompts: Sequence[str], tokens: int) -> Judged:
        return objectives.tried(self.handle, edit, prompts, self.judge, max_new_tokens=tokens, stop_on=())[0]


def repeats(tokens: Sequence[int]) -> list[int]:
    """Where a run of four tokens ends that was there before: what a loop is made of.

    Example:
        >>> repeats([1, 2, 3, 4, 5, 1, 2, 3, 4])
        [8]
    """
    runs = [tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1)]
    seen, found = set[tuple[int, ...]](), []
    for end, run in enumerate(runs, start=RUN - 1):
        found += [end] if run in seen else []
        seen.add(run)
    return found


def blocks_of(directions: Directions, layers: range | None) -> range:
    """Blocks that may be shifted, in a row: not the first sixth, where a prompt isn't read yet, nor the last fifth.

    Raises:
        AbliterateError: when none is left.
    """
    count = directions.unit.shape[0]
    allowed = layers or range(count // 6, count)
    first, last = max(1, allowed.start), min(allowed.stop, max(2, int(count * (1 - LAST_LAYERS_LEFT_OUT))))
    if first >= last:
        raise AbliterateError("no layer left to fit; widen --layers (the first and the last fifth are left out)")
    return range(first, last)


def _mean_logprob(logprobs: Tensor, answer: Sequence[int], counted: Sequence[int]) -> float:
    return float(mean_logprob(logprobs, answer, counted))
