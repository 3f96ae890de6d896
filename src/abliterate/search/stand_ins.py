"""What `fit` minimises: smooth stand-ins for refusing and for drifting, each over rows of tokens.

A new one is a class with `name`, `rows` and `loss`; `fit` takes a list of them with weights, so that several
behaviours can be removed, kept or watched at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.measure.divergence import Reference, reference_divergence
from abliterate.search.packed import Row

OPENING_TOKENS = 8  # of a refusal: enough to tell one that opens with everyday words
TOLD_APART = 10.0  # how much more common a start is among refusals than among answers to stand for one
ENOUGH = 1.0  # nats per token by which an answer is to become likelier, or less likely
SHARP = 4.0
MARGIN = 3.0  # a refusal of probability below exp(-3) is not worth more


class StandIn(Protocol):
    """A differentiable objective over rows of tokens.

    Attributes:
        name: for the log.
        rows: what is run through the model; logits come at each row's last `outputs` positions.
    """

    name: str
    rows: list[Row]

    def loss(self, picked: Sequence[int], logprobs: Sequence[Float[Tensor, "output vocab"]]) -> Float[Tensor, ""]:
        """The mean loss over the rows picked, given their log-probabilities."""
        ...


@dataclass
class Refusing:
    """How likely the model is to refuse, learnt from its own refusals.

    For each prompt, the probability of the opening of the refusal that the model itself gave, up to the token by
    which it tells a refusal from an answer: openings that no answer shares count from their first token, those
    that start with everyday words as far as it takes. With p that probability, the loss is log(1 + p exp(3)):
    next to nothing once p is below exp(-3), about -log of the odds of not refusing above. Stopping there, and
    not at the refusal's end, leaves no gain in refusing in other words after the same opening.

    Attributes:
        prompts: token ids of the prompts refused.
        openings: token ids of the refusals' openings, one per prompt; a prompt may stand in several pairs.
        answers: token ids of answers that are not refusals, to tell openings by.
    """

    prompts: list[list[int]]
    openings: list[list[int]]
    answers: list[list[int]] = field(default_factory=list)
    name: str = "refusing"

    def __post_init__(self) -> None:
        refusals = [list(o[:OPENING_TOKENS]) for o in self.openings]
        self.openings = [told_apart(o, refusals, self.answers) for o in refusals]
        self.rows = [
            Row([*prompt, *opening[:-1]], len(opening))
            for prompt, opening in zip(self.prompts, self.openings, strict=True)
        ]

    def add(self, prompts: Sequence[list[int]], openings: Sequence[list[int]]) -> list[Row]:
        """Take in refusals that the edited model gave in other words; returns their rows."""
        more = Refusing(list(prompts), list(openings), self.answers)
        self.prompts += more.prompts
        self.openings += more.openings
        self.rows += more.rows
        return more.rows

    def loss(self, picked: Sequence[int], logprobs: Sequence[Float[Tensor, "output vocab"]]) -> Float[Tensor, ""]:
        """Mean of softplus(log-odds of the opening + 3) over the rows picked."""
        odds = [
            log_odds(own, torch.tensor(self.openings[index], device=own.device))
            for index, own in zip(picked, logprobs, strict=True)
        ]
        return F.softplus(torch.stack(odds) + MARGIN).mean()


def log_odds(logprobs: Float[Tensor, "token vocab"], tokens: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """log(p / (1 - p)) of the probability p of these tokens one after the other, exact where p is nearly 1.

    1 - p is the sum over tokens of going right so far and wrong there; the probability of going wrong is
    summed over all other tokens, not taken from 1.
    """
    right = logprobs.gather(-1, tokens[:, None])[:, 0]
    wrong = logprobs.scatter(-1, tokens[:, None], float("-inf")).logsumexp(-1)
    before = right.cumsum(0) - right
    return right.sum() - (before + wrong).logsumexp(0)


def told_apart(
    opening: Sequence[int], refusals: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[int]:
    """The shortest start of an opening that is ten times as common among refusals as among answers."""
    for length in range(1, len(opening)):
        start = list(opening[:length])
        among_refusals = sum(list(r[:length]) == start for r in refusals) / max(1, len(refusals))
        among_answers = sum(list(a[:length]) == start for a in answers) / max(1, len(answers))
        if among_refusals >= TOLD_APART * among_answers:
            return start
    return list(opening)


class Lesson(NamedTuple):
    """An answer that is to become likely behind its prompt, or unlikely.

    Attributes:
        prompt, answer: token ids.
        counted: which of the answer's tokens count, by index.
        wanted: whether it is to become likely.
        before: the original's mean log-probability of the tokens that count, in nats.
    """

    prompt: list[int]
    answer: list[int]
    counted: list[int]
    wanted: bool
    before: float = 0.0


@dataclass
class Saying:
    """How far the model is from giving some answers, and from no longer giving others.

    For each, softplus(4 x) / 4 of what the mean log-probability x of its tokens, in nats, lacks to the original's plus
    or minus a nat: a plain likelihood that ends where there is enough, so that what is to vanish doesn't draw the fit
    without end.

    Attributes:
        lessons: the answers.
    """

    lessons: list[Lesson]
    name: str = "saying"

    def __post_init__(self) -> None:
        self.rows = [Row([*lesson.prompt, *lesson.answer[:-1]], len(lesson.answer)) for lesson in self.lessons]

    def loss(self, picked: Sequence[int], logprobs: Sequence[Float[Tensor, "output vocab"]]) -> Float[Tensor, ""]:
        """Mean over the rows picked."""
        lacking = []
        for index, own in zip(picked, logprobs, strict=True):
            lesson = self.lessons[index]
            gained = mean_logprob(own, lesson.answer, lesson.counted) - lesson.before
            lacking.append(ENOUGH - gained if lesson.wanted else ENOUGH + gained)
        return F.softplus(SHARP * torch.stack(lacking)).mean() / SHARP


def mean_logprob(
    logprobs: Float[Tensor, "token vocab"], answer: Sequence[int], counted: Sequence[int]
) -> Float[Tensor, ""]:
    """The mean over some of an answer's tokens."""
    tokens = torch.tensor(answer, device=logprobs.device)
    return logprobs.gather(-1, tokens[:, None])[list(counted), 0].mean()


@dataclass
class Staying:
    """How far the model drifts from the original on prompts that it answers: KL(original || edited).

    Half of it at the first answer token, half averaged along the original's own answer.

    Attributes:
        reference: the original's distributions, kept compactly.
    """

    reference: Reference
    name: str = "divergence"

    def __post_init__(self) -> None:
        self.rows = [
            Row(list(row), len(answer)) for row, answer in zip(self.reference.rows, self.reference.answers, strict=True)
        ]

    def loss(self, picked: Sequence[int], logprobs: Sequence[Float[Tensor, "output vocab"]]) -> Float[Tensor, ""]:
        """Mean over the rows picked, in nats."""
        drifts = []
        for index, own in zip(picked, logprobs, strict=True):
            along = reference_divergence(self.reference, index, own)
            drifts.append(0.5 * along[0] + 0.5 * along.mean())
        return torch.stack(drifts).mean()
