"""Choosing an edit that removes a style, by whole decoded answers: openings tell nothing of how the rest is written.

The direction out of every writer, and, tried beside it, the shift away from it, h <- h - c/n d_l at the outputs of n
blocks on end, d_l the difference of means at each (`Edit.shifting`). A style is added by a fit (`styles`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from abliterate.common.errors import AbliterateError
from abliterate.common.reporting import SILENT, Reporter, each
from abliterate.directions.means import Directions, Place, at
from abliterate.edit.edit import Edit, Shift
from abliterate.measure import mean_score
from abliterate.measure.divergence import Reference
from abliterate.measure.judges import Judge
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle
from abliterate.models.writers import SITES, find_writers
from abliterate.search import objectives
from abliterate.search.frontier import FrontierPoint, choose, non_dominated
from abliterate.search.objectives import original_reference
from abliterate.search.sweep import LAST_LAYERS_LEFT_OUT, Candidate, Choice

SITE, POSITION = "post", -1
DIVERGENCE_TOKENS = 24
SCREEN_DIVERGENCE_TOKENS = 8
GONE = 0.25  # of the original's mean score, up to which a style counts as gone when screening
RUINED = 0.5  # share of degenerate answers, beyond the original's, at which larger sizes aren't tried


@dataclass(frozen=True)
class SweepSizes:
    """Sizes of the search.

    Attributes:
        layers: blocks tried; by default all but the first and the last fifth.
        most_layers: how many of them, evenly spaced.
        sizes: of shifts, in norms of the difference of means, smallest first; shared by the blocks shifted.
        spread: share of the model's blocks that a shift is spread over, from the layer tried on.
        strengths: of removals from every writer, weakest first.
        screen_prompts, screen_tokens: answers decoded for every candidate.
        finalists: candidates judged on more.
        prompts, tokens: answers decoded for these.
        max_rate, max_divergence: how the point is chosen; see `frontier.choose`.
    """

    layers: range | None = None
    most_layers: int = 8
    sizes: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.4, 3.0, 4.0)
    spread: float = 0.27
    strengths: tuple[float, ...] = (0.6, 1.0)
    screen_prompts: int = 12
    screen_tokens: int = 40
    finalists: int = 4
    prompts: int = 48
    tokens: int = 64
    max_rate: float | None = None
    max_divergence: float | None = None


@dataclass(frozen=True)
class Tried:
    """An edit and what it does to answers.

    Attributes:
        edit: shift or removal.
        candidate: where its direction was found, at which strength, and the rate of answers that show the style.
        degenerate: answers that are.
        score: the judge's mean score; 0 where it gives none.
    """

    edit: Edit
    candidate: Candidate
    shown: Rate
    degenerate: Rate
    score: float

    def __str__(self) -> str:
        return (
            f"{self.candidate.place}, {'size' if self.edit.shifts else 'strength'} {self.candidate.strength:g}: "
            f"{self.shown.count} of {self.shown.total} show it, {self.degenerate.count} degenerate"
        )


def remove_style(
    handle: Handle,
    directions: Directions,
    target: Sequence[str],
    baseline: Sequence[str],
    judge: Judge,
    settings: SweepSizes | None = None,
    *,
    reporter: Reporter = SILENT,
) -> Choice:
    """The edit that makes fewest answers show a style: the direction out of every writer, or a shift away from it.

    1. Screen: at blocks evenly spaced, both on a few target prompts, and the divergence on a few baseline prompts;
       first come those that leave little of the judge's mean score, by divergence.
    2. Decode: the best few on more prompts, and the divergence on baseline prompts; a point of their frontier is
       chosen as in every search.

    Args:
        handle: the loaded original; it is not changed.
        directions: of the contrast.
        target: validation prompts whose answers tend to show it.
        baseline: validation prompts on which divergence counts.
        judge: decides which answers show it.
        settings: sizes of the search.
        reporter: told about stages and progress.

    Raises:
        AbliterateError: when no block is left to try.
    """
    settings = settings or SweepSizes()
    search = _Search(handle, directions, target, judge, settings, reporter)
    few = original_reference(handle, baseline[: settings.screen_prompts], answer_tokens=SCREEN_DIVERGENCE_TOKENS)
    screened = search.screen(few)
    bearable = [t for t in screened if t.degenerate.rate <= search.plain.degenerate.rate + RUINED / 2]
    ranked = sorted(bearable or screened, key=_cheapest_of(GONE * search.plain.score))
    removals, shifts = ([t for t in ranked if bool(t.edit.shifts) is kind] for kind in (False, True))
    half = (settings.finalists + 1) // 2  # some of each: which is cheaper shows only now
    finalists = [*removals[:half], *shifts[: settings.finalists - half]]
    reference = original_reference(handle, baseline[: settings.prompts], answer_tokens=DIVERGENCE_TOKENS)
    decoded = [search.decoded(t, reference) for t in each(reporter, "decoding the best", finalists)]
    points = [
        FrontierPoint(
            t.edit, t.shown, t.candidate.divergence or 0.0, {"score": t.score, "degenerate": t.degenerate.to_json()}
        )
        for t in decoded
    ]
    front = non_dominated(points)
    chosen, why = choose(front, settings.max_rate, settings.max_divergence)
    best = next(t for t in decoded if t.edit is chosen.edit)
    return search.choice(best, why.replace("refused", "show it").replace("refusals", "answers that show it"),
                         [*screened, *decoded], front)  # fmt: skip


class _Search:
    """What doesn't change between candidates, and how one is tried."""

    def __init__(
        self, handle: Handle, directions: Directions, prompts: Sequence[str], judge: Judge, settings: SweepSizes,
        reporter: Reporter,
    ) -> None:  # fmt: skip
        self.handle, self.directions, self.judge, self.settings = handle, directions, judge, settings
        self.prompts, self.reporter = list(prompts), reporter
        self.layers = _layers(directions, settings)
        if not self.layers:
            raise AbliterateError("no layer left to search; widen --layers (the first and the last fifth are left out)")
        self.writers = find_writers(handle, settings.layers)
        nothing = Edit((), torch.zeros(0, handle.d_model), torch.zeros(0, 0))
        self.plain = self._tried(nothing, Candidate(Place(0, SITE, POSITION), 0.0), settings.screen_prompts,
                                 settings.screen_tokens)  # fmt: skip

    def screen(self, reference: Reference) -> list[Tried]:
        """Every candidate on a few prompts."""
        settings, tried = self.settings, []
        width = max(1, int(settings.spread * self.handle.layers))
        for layer in each(self.reporter, "screening layers", self.layers):
            place = Place(layer, SITE, POSITION)
            row = SITES.index(SITE)
            candidate = Candidate(place, float(self.directions.separation[layer, row, POSITION]))
            direction = at(self.directions, place)
            blocks = range(layer, min(layer + width, self.handle.layers))
            for strength in settings.strengths:
                edit = Edit.uniform(self.writers, direction, strength)
                tried.append(self._screened(edit, replace(candidate, strength=strength), reference))
            for size in settings.sizes:
                edit = shifted(self.directions, blocks, -size)
                tried.append(self._screened(edit, replace(candidate, strength=-size), reference))
                if tried[-1].degenerate.rate > self.plain.degenerate.rate + RUINED:
                    break
        return tried

    def decoded(self, tried: Tried, reference: Reference) -> Tried:
        """A candidate on more prompts and longer answers."""
        found = self._tried(tried.edit, tried.candidate, self.settings.prompts, self.settings.tokens, reference)
        note = f"{found.degenerate.count} of {found.degenerate.total} degenerate, mean score {found.score:.2f}"
        kept = replace(found.candidate, stage="decoded", note=note)
        return replace(found, candidate=kept)

    def choice(self, best: Tried, why: str, tried: Sequence[Tried], frontier: Sequence[FrontierPoint]) -> Choice:
        """The result, every candidate at its latest."""
        self.reporter.say(f"chose {best.candidate.place}, {_how(best)}: {why}")
        winner = replace(best.candidate, note=why)
        latest = {(t.candidate.place, bool(t.edit.shifts), t.candidate.strength): t.candidate for t in tried}
        latest[(winner.place, bool(best.edit.shifts), winner.strength)] = winner
        return Choice(best.edit, winner, list(latest.values()), list(frontier))

    def _screened(self, edit: Edit, candidate: Candidate, reference: Reference) -> Tried:
        return self._tried(edit, candidate, self.settings.screen_prompts, self.settings.screen_tokens, reference)

    def _tried(
        self, edit: Edit, candidate: Candidate, count: int, tokens: int, reference: Reference | None = None
    ) -> Tried:
        """A candidate's answers to so many prompts; its divergence, along the original's answers, with a reference."""
        found, drift = objectives.tried(
            self.handle, edit, self.prompts[:count], self.judge, reference, max_new_tokens=tokens, stop_on=()
        )
        candidate = replace(candidate, refusals=found.rate, divergence=drift.answer if drift else None)
        score = mean_score(self.judge, found.answers)
        return Tried(edit, candidate, found.rate, found.degenerate, score)


def shifted(directions: Directions, blocks: Sequence[int], size: float) -> Edit:
    """Add `size` differences of means in all, an equal share at the output of each block, each along its own.

    Args:
        directions: from `difference_of_means`.
        blocks: their indices.
        size: in norms of the difference of means; negative takes away.
    """
    row = SITES.index(SITE)
    shifts = []
    for layer in blocks:
        length = float(directions.length[layer, row, POSITION])
        shifts.append(Shift(layer, at(directions, Place(layer, SITE, POSITION)), size / len(blocks) * length))
    d_model = directions.unit.shape[-1]
    return Edit((), torch.zeros(0, d_model), torch.zeros(0, 0), tuple(shifts))


def _layers(directions: Directions, settings: SweepSizes) -> list[int]:
    """The layers to try, at most so many, evenly spaced."""
    count = directions.unit.shape[0]
    finite = directions.unit[:, SITES.index(SITE), POSITION].isfinite().all(-1)
    last = max(2, int(count * (1 - LAST_LAYERS_LEFT_OUT)))
    allowed = settings.layers or range(1, last)
    inside = [i for i in range(1, min(last, count)) if bool(finite[i]) and i in allowed]
    most = settings.most_layers
    if len(inside) <= most:
        return inside
    return [inside[round(k * (len(inside) - 1) / (most - 1))] for k in range(most)]


def _cheapest_of(score: float) -> Callable[[Tried], tuple[bool, float]]:
    """Sorts those with at most this mean score first, by divergence; then the others, by score."""

    def key(tried: Tried) -> tuple[bool, float]:
        much = tried.score > score
        return much, tried.score if much else tried.candidate.divergence or 0.0

    return key


def _how(tried: Tried) -> str:
    strength = tried.candidate.strength
    if not tried.edit.shifts:
        return f"out of every writer at {strength:g}"
    first, last = tried.edit.shifts[0].layer, tried.edit.shifts[-1].layer
    where = f"block {first}" if first == last else f"blocks {first} to {last}"
    return f"{where} shifted by {strength:g} of the difference"
