"""Choosing one direction by a sweep that measures, and what every search takes and gives."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.apply.hooks import attached
from abliterate.common.errors import AbliterateError
from abliterate.common.reporting import SILENT, Reporter, each
from abliterate.directions.means import Directions, Place, at
from abliterate.edit.edit import Edit
from abliterate.measure.judges import Judge, LexicalJudge
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle
from abliterate.models.outputs import adding, changed
from abliterate.models.replicas import alone
from abliterate.models.writers import SITES, find_writers, layout
from abliterate.search import objectives
from abliterate.search.first_token import first_token, first_token_divergence, refusal_log_odds, refusal_weights
from abliterate.search.frontier import FrontierPoint

# The paper's limits (Arditi et al. 2024, appendix C).
DIVERGENCE_LIMIT = 0.1
INDUCE_LIMIT = 0.0
LAST_LAYERS_LEFT_OUT = 0.2

SCREEN_LIMIT = 1.0  # divergence, nats: answers beyond it are another model's

STRENGTHS = (0.9, 0.8, 0.7, 0.6, 0.5)

Show = Callable[[str, list[str]], None]


@dataclass(frozen=True)
class Candidate:
    """A direction and what it does.

    Attributes:
        place: where it was found.
        second: where a second direction was found that is removed with it.
        strength: how much of it is removed, 1 all.
        separation: squared distance of the means over the summed variances.
        bypass: mean refusal log-odds at the first token of target prompts, with the direction removed.
        induce: the same of baseline prompts, with the direction added at its layer.
        divergence: first-token KL(original || edited) on baseline prompts, direction removed.
        refusals: of decoded answers to target prompts, where they were decoded.
        stage: how far it came: "screened", "scored" or "decoded"; "fitted" for what a fit started from here.
        note: why it fell out or won.
    """

    place: Place
    separation: float
    second: Place | None = None
    strength: float = 1.0
    bypass: float | None = None
    induce: float | None = None
    divergence: float | None = None
    refusals: Rate | None = None
    stage: str = "screened"
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        del found["refusals"]
        refusal = self.refusals.to_json("refused") if self.refusals else None
        return {**found.pop("place"), **found, "refusal": refusal}


Choose = Callable[[list[Candidate], list[list[str]]], int]


@dataclass
class Choice:
    """What a search gives: the edit, the candidate behind it, all it looked at, and its frontier if it has one."""

    edit: Edit
    winner: Candidate
    candidates: list[Candidate] = field(default_factory=list)
    frontier: list[FrontierPoint] = field(default_factory=list)


@dataclass(frozen=True)
class SweepSettings:
    """Sizes of the sweep's stages."""

    screen_prompts: int = 12
    score_prompts: int = 64
    scored: int = 8
    decoded: int = 5
    decode_tokens: int = 48
    layers: range | None = None
    max_refusal_rate: float = 0.05


def sweep(
    handle: Handle,
    directions: Directions,
    target: Sequence[str],
    baseline: Sequence[str],
    judge: Judge | None = None,
    settings: SweepSettings | None = None,
    *,
    reporter: Reporter = SILENT,
) -> Choice:
    """Score candidate directions by what removing them does, cheaply first, and decode answers for the best.

    1. Screen: at every layer but the last fifth and every site, the last and the best separated position; refusal
       log-odds at the first token of a few target prompts with the direction removed, and divergence on a
       few baseline prompts.
    2. Score: the best few on more prompts, with the paper's three numbers: bypass, induce, divergence.
    3. Decode: answers for the best trade-offs of these; the lowest divergence among those that refuse little wins.
    4. When none refuses little: the best with each other finalist, as a plane of two directions.
    5. Weaken: if the winner refuses none, the least strength at which it still refuses none. (With a few dozen
       validation prompts, "no more than before" is no evidence where some are refused.)

    Args:
        handle: the loaded original.
        directions: candidates, from the training split.
        target: validation prompts that the original refuses.
        baseline: validation prompts that it answers.
        judge: decides what a refusal is; the lexical one by default.
        settings: sizes of the stages.
        reporter: told about stages and progress.

    Raises:
        AbliterateError: when no layer is left to search.
    """
    settings, judge = settings or SweepSettings(), judge or LexicalJudge()
    scorer = _Scorer(handle, directions, target, baseline, judge, settings)
    places = _places(directions, settings.layers)
    if not places:
        raise AbliterateError(
            "no layer left to search; widen --layers (the last fifth of the layers is never searched)"
        )
    screened = [
        scorer.score(place, settings.screen_prompts, induce=False, stage="screened")
        for place in each(reporter, "screening directions", places)
    ]
    bearable = [c for c in screened if _divergence(c) <= SCREEN_LIMIT]
    best = _trade_offs(bearable or screened, settings.scored)
    scored = [
        scorer.score(candidate.place, settings.score_prompts, induce=True, stage="scored")
        for candidate in each(reporter, "scoring directions", best)
    ]
    if all(_broken_limits(c) for c in scored):
        reporter.say(
            "no candidate is within the paper's limits (divergence <= 0.1, induce > 0); the best trade-offs go on"
        )
    finalists = _trade_offs(scored, settings.decoded)
    decoded = [scorer.decoded(c) for c in each(reporter, "decoding the best", finalists)]
    winner, why = _choose(decoded, settings.max_refusal_rate)
    if winner.refusals is not None and winner.refusals.rate > settings.max_refusal_rate and len(decoded) > 1:
        reporter.say(f"one direction leaves {_of(winner)} refusals; trying planes of two")
        planes = [scorer.plane(winner, c, settings.score_prompts) for c in decoded if c.place != winner.place]
        decoded += [scorer.decoded(c) for c in planes]
        winner, why = _choose(decoded, settings.max_refusal_rate)
    reporter.say(f"chose {winner.place}{f' with {winner.second}' if winner.second else ''}: {why}")
    weaker = _weakened(scorer, winner, settings.score_prompts, reporter)
    decoded += weaker
    if weaker:
        winner = weaker[-1]
        why += f"; at strength {winner.strength:g} it refuses {_of(winner)}, divergence {winner.divergence:.3f}"
        reporter.say(
            f"strength {winner.strength:g} is enough: {_of(winner)} refused, divergence {winner.divergence:.3f}"
        )
    winner = replace(winner, note=why)
    latest = {(c.place, c.second, c.strength): c for c in (*screened, *scored, *decoded, winner)}
    return Choice(scorer.edit(winner), winner, [_with_note(c) for c in latest.values()])


def _weakened(scorer: _Scorer, winner: Candidate, prompts: int, reporter: Reporter) -> list[Candidate]:
    """The winner at ever smaller strengths, as long as none is refused and the divergence falls."""
    kept: list[Candidate] = []
    if _refused(winner):
        return kept
    tick = reporter.progress("weakening", len(STRENGTHS))
    for strength in STRENGTHS:
        weaker = scorer.rescored(replace(winner, strength=strength, note=""), prompts)
        weaker = scorer.decoded(weaker)
        tick(1)
        if _refused(weaker) or _divergence(weaker) >= _divergence(kept[-1] if kept else winner):
            break
        kept.append(weaker)
    return kept


def _refused(candidate: Candidate) -> int:
    return candidate.refusals.count if candidate.refusals else 0


class _Scorer:
    """The numbers that don't change between candidates, and how one candidate gets its scores."""

    def __init__(
        self, handle: Handle, directions: Directions, target: Sequence[str], baseline: Sequence[str], judge: Judge,
        settings: SweepSettings,
    ) -> None:  # fmt: skip
        self.handle, self.directions, self.judge, self.settings = handle, directions, judge, settings
        self.texts = target[: settings.score_prompts]
        self.target, self.baseline = handle.prompt_ids(target), handle.prompt_ids(baseline)
        self.writers = find_writers(handle, settings.layers)
        self.original = first_token(handle, self.baseline)
        self.weights = refusal_weights(first_token(handle, self.target), self.original)

    def edit(self, candidate: Candidate) -> Edit:
        places = [candidate.place] if candidate.second is None else [candidate.place, candidate.second]
        return Edit.uniform(self.writers, torch.stack([at(self.directions, p) for p in places]), candidate.strength)

    def plane(self, first: Candidate, second: Candidate, prompts: int) -> Candidate:
        """The two candidates' directions removed together, scored."""
        return self.rescored(replace(first, second=second.place, refusals=None, induce=None), prompts)

    def score(self, place: Place, prompts: int, *, induce: bool, stage: str) -> Candidate:
        separation = self.directions.separation[place.layer, SITES.index(place.site), place.position]
        candidate = self.rescored(Candidate(place, float(separation), stage=stage), prompts)
        if not induce:
            return candidate
        with _added(self.handle, place, self._difference(place)):
            induced = first_token(self.handle, self.baseline[:prompts])
        return replace(candidate, induce=self._log_odds(induced))

    def rescored(self, candidate: Candidate, prompts: int) -> Candidate:
        """The candidate with bypass and divergence measured on the first `prompts` of each side."""
        target, baseline = self.target[:prompts], self.baseline[:prompts]
        with attached(self.handle, self.edit(candidate)):
            both = first_token(self.handle, [*target, *baseline])  # together: one run of the prefix they share
        return replace(
            candidate,
            bypass=self._log_odds(both[: len(target)]),
            divergence=first_token_divergence(self.original[: len(baseline)], both[len(target) :]),
        )

    def decoded(self, candidate: Candidate) -> Candidate:
        """The candidate with its refusals counted among decoded answers."""
        tokens = self.settings.decode_tokens
        found, _ = objectives.tried(self.handle, self.edit(candidate), self.texts, self.judge, max_new_tokens=tokens)
        return replace(candidate, refusals=found.rate, stage="decoded")

    def _log_odds(self, logprobs: Float[Tensor, "prompt vocab"]) -> float:
        return float(refusal_log_odds(logprobs, self.weights).mean())

    def _difference(self, place: Place) -> Float[Tensor, " d_model"]:
        row = SITES.index(place.site)
        length = float(self.directions.length[place.layer, row, place.position])
        return at(self.directions, place) * length


@contextlib.contextmanager
def _added(handle: Handle, place: Place, vector: Float[Tensor, " d_model"]) -> Iterator[None]:
    """Add a vector to the stream at a site, at every token, for as long as the context lasts."""
    plus = adding(vector)
    reader = layout(handle).mid_readers[place.layer] if place.site == "mid" else None
    before = place.layer - (place.site == "pre")
    after = handle.blocks[before] if before >= 0 else handle.embedding
    # at `mid`, what reads the stream there sees the vector, and the block hands it on
    with alone(handle), changed([(after, plus)], [(reader, plus)] if reader is not None else []):
        yield


def _places(directions: Directions, layers: range | None) -> list[Place]:
    """At every (layer, site) allowed, the last position and the one that separates best.

    `post` is left out: it is the next layer's `pre`.
    """
    count = directions.unit.shape[0]
    last = max(1, int(count * (1 - LAST_LAYERS_LEFT_OUT)))
    places = []
    for layer in range(last):
        if layers is not None and layer not in layers:
            continue
        for site in ("pre", "mid"):
            separation = directions.separation[layer, SITES.index(site)]
            if (layer, site) == (0, "pre") or not bool(separation.max() > 0):
                continue  # the embedding of the last tokens is the same for every prompt; NaN: no such site
            best = int(separation.argmax()) - separation.shape[0]
            places += [Place(layer, site, position) for position in sorted({best, -1})]
    return places


def _trade_offs(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The best `count`: those that no other beats in both bypass and divergence first, then the next such layer.

    Within a layer of trade-offs, the lowest sum of log-odds and divergence's logarithm comes first: twice the
    divergence is as bad as refusals being e^log(2) times as likely.
    """
    left: list[Candidate] = list(candidates)
    best: list[Candidate] = []
    while left and len(best) < count:
        front = [c for c in left if not any(_beats(other, c) for other in left)]
        best += sorted(front, key=_cost)[: count - len(best)]
        left = [c for c in left if c not in front]
    return best


def _beats(one: Candidate, other: Candidate) -> bool:
    return _bypass(one) <= _bypass(other) and _divergence(one) < _divergence(other)


def _cost(candidate: Candidate) -> float:
    return _bypass(candidate) + math.log(max(_divergence(candidate), 1e-3))


def _bypass(candidate: Candidate) -> float:
    return candidate.bypass if candidate.bypass is not None else math.inf


def _divergence(candidate: Candidate) -> float:
    return candidate.divergence if candidate.divergence is not None else math.inf


def _with_note(candidate: Candidate) -> Candidate:
    if candidate.note or candidate.stage == "screened":
        return candidate
    return replace(candidate, note="; ".join(_broken_limits(candidate)))


def _broken_limits(candidate: Candidate) -> list[str]:
    """The paper's limits that a scored candidate breaks."""
    broken = []
    if candidate.divergence is not None and candidate.divergence > DIVERGENCE_LIMIT:
        broken.append(f"divergence {candidate.divergence:.3f} > {DIVERGENCE_LIMIT}")
    if candidate.induce is not None and candidate.induce < INDUCE_LIMIT:
        broken.append(f"induce {candidate.induce:.2f} < {INDUCE_LIMIT}")
    return broken


def _choose(decoded: Sequence[Candidate], max_refusal_rate: float) -> tuple[Candidate, str]:
    """The lowest divergence among the candidates that refuse at most `max_refusal_rate`, else the fewest refusals."""
    good = [c for c in decoded if _rate(c) <= max_refusal_rate]
    if good:
        winner = min(good, key=lambda c: c.divergence or 0.0)
        return winner, (
            f"refuses {_of(winner)} and has the lowest divergence ({winner.divergence:.3f}) of the {len(good)} "
            f"that refuse at most {max_refusal_rate:.0%}"
        )
    winner = min(decoded, key=lambda c: (_rate(c), c.divergence or 0.0))
    return winner, f"fewest refusals ({_of(winner)}); none reached {max_refusal_rate:.0%}"


def _rate(candidate: Candidate) -> float:
    return candidate.refusals.rate if candidate.refusals else 1.0


def _of(candidate: Candidate) -> str:
    return f"{candidate.refusals.count} of {candidate.refusals.total}" if candidate.refusals else "?"
