"""What a fit lowers: a weighted sum of stand-ins over rows, and its gradient in the variables of the edit.

With workers each step's rows go out in fixed shards, with the variables (some thousand numbers); losses and gradients
come back and are summed in the shards' order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.reporting import Tick, untold
from abliterate.models.handle import Handle
from abliterate.models.memory import halved, out_of_memory
from abliterate.search.packed import Packer
from abliterate.search.stand_ins import Refusing, StandIn
from abliterate.search.variable_edit import VariableEdit, VariableShift

PARTS = 4  # of a step's rows


class Term(NamedTuple):
    """A stand-in of the sum: which it is, its weight, and the rows that its mean is over."""

    which: int
    weight: float
    picked: list[int]


Variables = tuple[Float[Tensor, "block rank d_model"], Float[Tensor, "writer rank"]]


@dataclass
class Goal:
    """The stand-ins, their rows as the model runs them, and the variables.

    Attributes:
        handle: the loaded original; left out where the goal is sent to workers, as is what is made of it.
        stand_ins: the first is what takes in rows as the fit goes, refusing.
        known: how many rows of the first were there at the beginning.
        blocks, rank, kept, seed: of the variables; see `VariableEdit`.
        groups: how many rows the first took in each time.
        passes: that a step is cut into; more where memory doesn't hold it whole.
        units: [block] where vectors are added at blocks' outputs, the unit of each (`VariableShift`).
    """

    handle: Handle
    stand_ins: Sequence[StandIn]
    known: int
    blocks: range
    rank: int
    kept: Float[Tensor, "k d_model"] | None
    seed: int
    groups: list[int] = field(default_factory=list)
    passes: int = 1
    units: Float[Tensor, " block"] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "handle"}

    @cached_property
    def variables(self) -> VariableEdit | VariableShift:
        if self.units is not None:
            return VariableShift(self.handle, self.blocks, self.units, self.kept)
        return VariableEdit(self.handle, self.blocks, self.rank, self.kept, self.seed)

    @cached_property
    def packed(self) -> tuple[Packer, list[list[int]]]:
        """The rows of all stand-ins, and where those of each are among them."""
        refusing = self.stand_ins[0]
        sides = [refusing.rows[: self.known], *(other.rows for other in self.stand_ins[1:])]
        packer = Packer(self.handle, [row for side in sides for row in side], self.blocks[0])
        places = [list(range(*ends)) for ends in pairwise(accumulate(map(len, sides), initial=0))]
        for start, end in pairwise(accumulate(self.groups, initial=self.known)):
            places[0] += packer.add(refusing.rows[start:end])
        return packer, places

    def with_more(self, prompts: Sequence[list[int]], openings: Sequence[list[int]]) -> Goal:
        """The goal with refusals in other words among its rows; a new one, as workers keep the one they have."""
        refusing = self.stand_ins[0]
        assert isinstance(refusing, Refusing)
        rows = refusing.add(prompts, openings)
        more = replace(self, groups=[*self.groups, len(rows)])
        more.__dict__["variables"] = self.variables
        if "packed" in self.__dict__:
            packer, places = more.__dict__["packed"] = self.packed
            places[0] += packer.add(rows)
        return more

    def descend(self, terms: Sequence[Term], sparsity: float) -> float:
        """The sum and `sparsity` times the mean strength; where gradients are wanted, they are the variables' then."""
        vectors, strengths = self.variables.vectors, self.variables.strengths
        if self.handle.workers is None:
            return self._passed(terms, sparsity)
        vectors.grad = strengths.grad = None
        now, total = (vectors.detach(), strengths.detach()), sparsity * strengths.mean()
        total.backward()
        loss = total.item()
        calls = [(now, _parts(terms, place, PARTS)) for place in range(PARTS)]
        for own, *gradients in self._mapped(_gradient, calls, untold):
            loss += own
            for variable, gradient in zip((vectors, strengths), gradients, strict=True):
                variable.grad = gradient if variable.grad is None else variable.grad + gradient
        return loss

    def _passed(self, terms: Sequence[Term], sparsity: float) -> float:
        """The same by this model; what memory doesn't hold is cut into more passes."""
        while True:
            self.variables.vectors.grad = self.variables.strengths.grad = None
            try:
                return sum(self._pass(terms, sparsity, part) for part in range(self.passes))
            except (RuntimeError, MemoryError) as error:
                packer, _ = self.packed
                if packer.checkpointing or not out_of_memory(error):
                    halved(self.handle, max(len(term.picked) for term in terms) // self.passes, error)
                    self.passes *= 2
                packer.checkpointing = True  # tried first: its result is the same, bit for bit

    def _pass(self, terms: Sequence[Term], sparsity: float, part: int) -> float:
        with self.variables.live():  # backward may run blocks again: hooks stay until it is done
            loss = self._loss(_parts(terms, part, self.passes), sparsity / self.passes)
            if torch.is_grad_enabled() and bool(loss.isfinite()):
                loss.backward()
        return loss.item()

    def _loss(self, terms: Sequence[Term], sparsity: float) -> Float[Tensor, ""]:
        packer, places = self.packed
        wanted = [places[which][i] for which, _, picked in terms for i in picked]
        logprobs = packer.logprobs(wanted) if wanted else []
        total = sparsity * self.variables.strengths.mean()
        for which, weight, picked in terms:
            own, logprobs = logprobs[: len(picked)], logprobs[len(picked) :]
            total = total + weight * self.stand_ins[which].loss(picked, own).to(total.device)
        return total

    def losses(self, terms: Sequence[Term], sparsity: float, tried: Sequence[Variables], tick: Tick) -> list[float]:
        """The loss at each of some values of the variables, which are at the last afterwards."""
        calls = [(values, terms, sparsity) for values in tried]
        if self.handle.workers is not None:
            return self._mapped(_value, calls, tick)
        found = []
        for call in calls:
            found.append(_value(self.handle, self, call))
            tick(1)
        return found

    def _mapped(self, function: Any, calls: Sequence[Any], tick: Tick) -> list[Any]:
        return self.handle.workers.map(self.handle, function, self, calls, lambda _: tick(1))


def _parts(terms: Sequence[Term], place: int, parts: int) -> list[Term]:
    """One of some parts of each term's rows, which count for their share of the mean."""
    own = [(term, term.picked[place::parts]) for term in terms]
    return [Term(term.which, term.weight * (len(rows) / len(term.picked)), rows) for term, rows in own if rows]


def _gradient(handle: Handle, goal: Goal, call: tuple[Variables, list[Term]]) -> tuple[float, Tensor, Tensor]:
    goal.handle, (values, terms) = handle, call
    vectors, strengths = goal.variables.put_values(*values)
    loss = goal.descend(terms, 0.0)
    found = [torch.zeros_like(v) if v.grad is None else v.grad for v in (vectors, strengths)]
    return loss, found[0], found[1]


@torch.no_grad()
def _value(handle: Handle, goal: Goal, call: tuple[Variables, Sequence[Term], float]) -> float:
    goal.handle, (values, terms, sparsity) = handle, call
    goal.variables.put_values(*values)
    return goal.descend(terms, sparsity)
