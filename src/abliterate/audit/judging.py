"""What an audit asks of an edit: how much is still refused, and how far the model is from the original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.apply.hooks import attached
from abliterate.directions.activations import watched
from abliterate.directions.means import Directions, Place, at
from abliterate.edit.edit import Edit
from abliterate.measure import Judged, judged
from abliterate.measure.divergence import Reference, compare_each, make_reference
from abliterate.measure.judges import Judge
from abliterate.measure.kinds import count_kinds
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle
from abliterate.models.writers import SITES, Writer, find_writers
from abliterate.report.geometry import auc
from abliterate.search.first_token import first_token, first_token_divergence, refusal_log_odds, refusal_weights
from abliterate.search.sweep import LAST_LAYERS_LEFT_OUT

SCREEN_PROMPTS = 12
DECODED_PLACES = 3
RESAMPLES = 1000
SITE, POSITION = "pre", -1


@dataclass
class Jury:
    """A model with the held-out prompts it is judged on.

    Attributes:
        handle: the loaded original; edits are attached live and taken off again.
        judge: decides what a refusal is.
        target, baseline: test prompts; the baseline ones are those that the original answers.
        validation: target and baseline validation prompts that the original refuses and answers.
        answer_tokens: longest answer decoded.
        writers: every writer of the model.
        reference: the original's distributions along its answers to the test baseline prompts.
    """

    handle: Handle
    judge: Judge
    target: list[str]
    baseline: list[str]
    validation: tuple[list[str], list[str]]
    answer_tokens: int
    writers: tuple[Writer, ...] = ()
    reference: Reference | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.writers = find_writers(self.handle)
        answers, refused = judged(self.handle, self.baseline, self.judge, max_new_tokens=self.answer_tokens)
        kept = [i for i, r in enumerate(refused) if not r and answers[i].ids]
        self.baseline = [self.baseline[i] for i in kept]
        self.reference = make_reference(
            self.handle, self.handle.prompt_ids(self.baseline), [answers[i] for i in kept], answer_tokens=24
        )

    def refusals(self, edit: Edit | None, prompts: Sequence[str]) -> Rate:
        """Refused among answers to these prompts, with an edit attached."""
        return self.answers(edit, prompts).rate

    def answers(self, edit: Edit | None, prompts: Sequence[str]) -> Judged:
        """The answers themselves, judged."""
        with attached(self.handle, edit) if edit is not None else nullcontext():
            return judged(self.handle, list(prompts), self.judge, max_new_tokens=self.answer_tokens)

    def verdict(self, edit: Edit, *, seed: int = 0) -> dict[str, Any]:
        """Refusals of test target prompts, and divergence on test baseline prompts, both with 95% intervals."""
        answers = self.answers(edit, self.target)
        assert self.reference is not None
        with attached(self.handle, edit):
            each = compare_each(self.handle, self.reference)
        first, along = ([row[i] for row in each] for i in (0, 1))
        return {
            **refusing(answers),
            "divergence": {
                "first_token": with_interval(first, seed), "answer": with_interval(along, seed), "prompts": len(each),
            },
        }  # fmt: skip


def refusing(answers: Judged) -> dict[str, Any]:
    """How many answers refuse, and how many in which way (`measure.kinds`)."""
    kinds = count_kinds([answer.text for answer in answers.answers], answers.shown)
    return {"refusal": answers.rate.to_json("refused"), "kinds": kinds}


def with_interval(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """A mean with its 95% percentile bootstrap interval over prompts (Efron 1979)."""
    if not values:
        return {"value": 0.0, "ci95": [0.0, 0.0]}
    sample = torch.tensor(list(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(sample), (RESAMPLES, len(sample)), generator=generator)
    means = sample[drawn].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": float(sample.mean()), "ci95": [low, high]}


@dataclass
class Screen:
    """Cheap scores of edits by the first answer token alone, on a few validation prompts."""

    jury: Jury
    prompts: int = SCREEN_PROMPTS
    _weights: Tensor = field(init=False, repr=False)
    _original: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        handle, (target, baseline) = self.jury.handle, self.jury.validation
        self.target = handle.prompt_ids(target[: self.prompts])
        self.baseline = handle.prompt_ids(baseline[: self.prompts])
        self._original = first_token(handle, self.baseline)
        refusing = first_token(handle, self.target)
        self._weights = refusal_weights(refusing, self._original)
        self.odds = float(refusal_log_odds(refusing, self._weights).mean())

    def score(self, edit: Edit) -> tuple[float, float]:
        """Refusal log-odds on target prompts and divergence on baseline prompts, at the first answer token."""
        handle = self.jury.handle
        with attached(handle, edit):
            both = first_token(handle, [*self.target, *self.baseline])
        count = len(self.target)
        odds = float(refusal_log_odds(both[:count], self._weights).mean())
        return odds, first_token_divergence(self._original, both[count:])


def best_place(jury: Jury, screen: Screen, directions: Directions, basis: Sequence[Tensor] = ()) -> Place:
    """The layer whose direction, taken out of every writer beside those in `basis`, leaves least refused.

    Read at the last token of the stream before each block; screened by the first answer token, the best few by answers
    to validation prompts.
    """
    layers = directions.unit.shape[0]
    last = max(2, int(layers * (1 - LAST_LAYERS_LEFT_OUT)))
    places = [Place(layer, SITE, POSITION) for layer in range(1, min(last, layers))]
    places = [p for p in places if bool(at(directions, p).isfinite().all()) and bool(at(directions, p).norm() > 0.5)]

    def edit(place: Place) -> Edit:
        return Edit.uniform(jury.writers, torch.stack([*basis, at(directions, place)]), 1.0)

    scores = {place: screen.score(edit(place)) for place in places}
    best = sorted(places, key=lambda p: scores[p][0] + math.log(max(scores[p][1], 1e-3)))[:DECODED_PLACES]
    left = {place: jury.refusals(edit(place), jury.validation[0]) for place in best}
    return min(best, key=lambda p: (left[p].rate, scores[p][1]))


def stream_at(
    handle: Handle, prompts: Sequence[str], place: Place, *, batch_size: int = 32
) -> Float[Tensor, "prompt d_model"]:
    """Every prompt's stream at one place, float64."""
    found = torch.zeros(len(prompts), handle.d_model, dtype=torch.float64)

    def look(batch: list[int], layer: int, site: str, stream: Tensor) -> None:
        if (layer, site) == (place.layer, place.site):
            found[batch] = stream[:, place.position].double().cpu()

    watched(handle, prompts, look, keep=-place.position, batch_size=batch_size)
    return found


def separations(
    handle: Handle, directions: Directions, target: Sequence[str], baseline: Sequence[str]
) -> list[dict[str, float | None]]:
    """Per layer, how well its own direction tells held-out prompts apart: the area under the ROC curve."""
    units = [at(directions, Place(layer, SITE, POSITION)).double() for layer in range(handle.layers)]
    along = [torch.zeros(handle.layers, len(prompts), dtype=torch.float64) for prompts in (target, baseline)]
    for prompts, found in zip((target, baseline), along, strict=True):

        def look(batch: list[int], layer: int, site: str, stream: Tensor, found: Tensor = found) -> None:
            if site == SITE:
                found[layer, batch] = stream[:, POSITION].double().cpu() @ units[layer]

        watched(handle, prompts, look)
    separation = directions.separation[:, SITES.index(SITE), POSITION].tolist()
    return [
        {"auc": area_under_curve(*rows), "separation": apart if math.isfinite(apart) else None}
        for *rows, apart in zip(*along, separation, strict=False)
    ]


def area_under_curve(above: Float[Tensor, " n"], below: Float[Tensor, " m"]) -> float | None:
    """How often a value of the first set is above one of the second, ties counted half; None when one isn't finite."""
    if not (above.isfinite().all() and below.isfinite().all()) or not len(above) or not len(below):
        return None
    return auc(above, below)
