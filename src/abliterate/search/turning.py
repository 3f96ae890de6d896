"""How likely a model's own refusals are with a vector added to the stream, and gradient steps towards more of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.reporting import Tick
from abliterate.measure.decode import Answer
from abliterate.models.handle import Handle
from abliterate.models.outputs import adding, changed
from abliterate.search.examples import Examples
from abliterate.search.packed import Packer, Row

REFUSAL_TOKENS = 14  # of a refusal that are scored: its opening and most of its sentence
WHOLE_TOKENS = 40  # of a refusal behind which a vector is turned: to its end, for an answer has to end too
STEP = 0.15  # of a turned vector, as `search.fit` steps: in radians, roughly


class RefusalScorer:
    """How likely the model's own refusals are behind baseline prompts, with a vector added at a block's output."""

    def __init__(self, handle: Handle, train: Examples, prompts: int, layers: Sequence[int], seed: int) -> None:
        self.handle = handle
        self.generator = torch.Generator().manual_seed(seed)
        self.wanted: list[Tensor] = []
        rows = self._rows(train.baseline[:prompts], [a.whole[:REFUSAL_TOKENS] for a in train.refusals])
        self.packer = Packer(handle, rows, first_block=min(layers))
        self.scored = list(range(len(rows)))
        self.turning: list[int] = []

    def take_in(self, prompts: Sequence[str], refusals: Sequence[Answer]) -> None:
        """Whole refusals behind these prompts, for the turning."""
        self.turning = self.packer.add(self._rows(prompts, [a.whole[:WHOLE_TOKENS] for a in refusals]))

    def _rows(self, prompts: Sequence[str], refusals: Sequence[list[int]]) -> list[Row]:
        """Each prompt with a refusal drawn for it."""
        said, rows = [refusal for refusal in refusals if refusal], []
        for prompt in self.handle.prompt_ids(prompts):
            refusal = said[int(torch.randint(len(said), (1,), generator=self.generator))]
            rows.append(Row([*prompt, *refusal[:-1]], len(refusal)))
            self.wanted.append(torch.tensor(refusal))
        return rows

    def loss(self, picked: Sequence[int]) -> Float[Tensor, ""]:
        """Mean over rows of the nats per token."""
        logprobs = self.packer.logprobs(picked)
        each = [
            -own.gather(-1, self.wanted[i].to(own.device)[:, None]).mean()
            for i, own in zip(picked, logprobs, strict=True)
        ]
        return torch.stack(each).mean()

    @torch.no_grad()
    def score(self, layer: int, vector: Float[Tensor, " d_model"]) -> float:
        with self.adding(layer, vector):
            return float(self.loss(self.scored))

    def adding(self, layer: int, vector: Tensor) -> AbstractContextManager[None]:
        """A vector added at a block's output; gradients reach it."""
        return changed([(self.handle.blocks[layer], adding(vector))])


class Descent:
    """A vector on its way down the loss, a few rows a step."""

    def __init__(self, scorer: RefusalScorer, layer: int, start: Float[Tensor, " d_model"]) -> None:
        self.scorer, self.layer, self.start, self.done = scorer, layer, start, 0
        self.vector = torch.nn.Parameter(start.detach().clone())
        rate = STEP * float(start.norm()) / len(start) ** 0.5
        self.optimiser = torch.optim.Adam([self.vector], lr=rate)

    def go(self, steps: int, tick: Tick) -> float:
        """Take some steps; returns the loss there."""
        rows, size = self.scorer.turning, min(8, len(self.scorer.turning))
        for _ in range(steps):
            picked = [rows[(self.done * size + k) % len(rows)] for k in range(size)]
            self.optimiser.zero_grad()
            with torch.enable_grad(), self.scorer.adding(self.layer, self.vector):
                self.scorer.loss(picked).backward()
            self.optimiser.step()
            self.done += 1
            tick(1)
        return self.scorer.score(self.layer, self.vector.detach())
