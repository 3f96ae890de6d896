"""Which modules' outputs make up what is added to the stream: sums found on the tensors of one run.

The stream of most models is one vector a token, and what a block gives is the stream before plus outputs, perhaps
times scalars (Granite's multipliers on outputs, Gemma 4's on all of it). Hyper-connections keep several vectors a
token, mixed by scalars that depend on the token: there every vector after lies, token by token, in the span of those
before and the outputs. Either way, what neither was there before nor is in an output isn't there after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.models.trace import Call, as_norm

MOST_FOR_TRIPLES = 40


class Piece(NamedTuple):
    """A stretch of a block: the stream before and after it, and the call that reads it then (None at the end)."""

    before: Tensor
    after: Tensor
    reader: Call | None


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same values, bit for bit; some blocks pass [1, token, d_model] on flattened."""
    return left.numel() == right.numel() and left.dtype == right.dtype and torch.equal(_like(left, right), right)


def as_rows(tensor: Tensor, tokens: int, width: int) -> Float[Tensor, "token row d_model"] | None:
    """The vectors of d_model that a tensor holds of each token, in float64 on the CPU; None when it holds no such.

    Several stand in a dimension of their own, before the tokens' or after, or side by side in the last.
    """
    if not tensor.numel() or tensor.shape[-1] % width or tensor.numel() % (tokens * width):
        return None
    split = tensor.detach().reshape(*tensor.shape[:-1], -1, width)
    places = [place for place, size in enumerate(tensor.shape[:-1]) if size == tokens]
    if places:
        split = split.movedim(places[0], 0)
    return split.reshape(tokens, -1, width).to("cpu", torch.float64)


def pieces(pre: Tensor, post: Tensor, inside: Sequence[Call], width: int, tokens: int) -> list[Piece]:
    """A block cut where a module reads what the stream has become: the stream before it plus one output.

    Args:
        pre, post: the stream before the block and after it.
        inside: what the block called.
        width: d_model.
        tokens: how many went through the model.
    """
    found: list[Piece] = []
    known = [pre]
    for index, call in enumerate(inside):
        x = call.input
        if x is None or not _fits(x, pre, width) or any(same(x, old) for old in known):
            continue
        earlier = inside[:index]
        if not any(same(c.output, x) for c in earlier) and explain(known[-1], x, earlier, width, tokens, most=1):
            known.append(_like(x, pre))
            found.append(Piece(known[-2], known[-1], call))
    for place in reversed(range(len(known))):
        last = len(explain(known[place], post, inside, width, tokens))
        # what was read there isn't what goes on, where that takes no more outputs without it
        if last and not (place and explain(known[place - 1], post, inside, width, tokens, most=last)):
            return [*found[:place], Piece(known[place], post, None)]
    return [*found, Piece(known[-1], post, None)]


def explain(before: Tensor, after: Tensor, calls: Sequence[Call], width: int, tokens: int, most: int = 3) -> list[Call]:
    """The fewest calls whose outputs make up what `after` holds beyond `before`; none when that can't be told.

    Exactly if possible, bit for bit; else to within rounding, with a scalar for each output; then with one for the
    stream before too; then with scalars of each token's own. Of groups of one size that which leaves least.

    Args:
        before: the stream before, zeros where there was none.
        after: as many values.
        calls: in the order they ended.
        width: d_model.
        tokens: how many went through the model.
        most: calls in a group.
    """
    goal, given = as_rows(after, tokens, width), as_rows(before, tokens, width)
    if goal is None or given is None:
        return []
    distinct = _distinct(calls, width, tokens)
    counts = range(1, 1 + (most if len(distinct) <= MOST_FOR_TRIPLES else min(most, 2)))
    for exact in (list(group) for count in counts for group in combinations(distinct, count)):
        if _adds_up(before, after, [call.output for call in exact]):
            return exact
    if not distinct or not all(bool(tensor.isfinite().all()) for tensor in (after, *(c.output for c in distinct))):
        return []
    outputs = torch.stack([as_rows(c.output, tokens, width)[:, 0] for c in distinct], dim=-1)  # type: ignore[index]
    eps, size = torch.finfo(after.dtype).eps, goal.norm()
    for beyond in _ways(given, goal, outputs):
        for count in counts:
            found = beyond.least(list(combinations(range(len(distinct)), count)), eps, size)
            if found:
                return [distinct[i] for i in found]
    return []


def why_not(before: Tensor, after: Tensor, calls: Sequence[Call], width: int, tokens: int) -> str:
    """Why outputs don't explain what the stream became: what else was done to it, as far as that can be measured."""
    goal, given = as_rows(after, tokens, width), as_rows(before, tokens, width)
    if goal is None or given is None:
        return "it isn't made of vectors of d_model"
    if goal.shape[1] > 1:
        return f"it is {goal.shape[1]} streams a token, and they aren't mixed by scalars alone"
    norm = next((c.module for c in calls if same(c.output, after) and as_norm(c, width) is not None), None)
    if norm is not None:
        return f"a norm ({type(norm).__name__}) runs on the stream itself, and its gain brings back what is taken out"
    outputs = [as_rows(c.output, tokens, width) for c in _distinct(calls, width, tokens)[:MOST_FOR_TRIPLES]]
    features = [rows.permute(2, 0, 1) for rows in (given, goal, *outputs) if rows is not None]
    if len(features) > 2:
        each = _Way(torch.cat(features[2:], -1), features[1], features[0] if bool(given.any()) else None)
        if any(each.least(list(combinations(range(len(outputs)), count)), 1e-7, goal.norm()) for count in (1, 2)):
            return "every feature of it is scaled by a factor of its own"
    return "what it becomes is no sum of what it was and modules' outputs"


def _distinct(calls: Sequence[Call], width: int, tokens: int) -> list[Call]:
    """The calls that gave a vector of d_model for each token; of those that gave the same, the innermost."""
    distinct: list[Call] = []
    for call in calls:  # in the order they ended
        if call.input is not None and same(call.input, call.output):
            continue  # dropout hands on what others wrote
        fits = call.output.shape[-1] == width and call.output.numel() == tokens * width
        if fits and not any(same(call.output, other.output) for other in distinct):
            distinct.append(call)
    return distinct


class _Way(NamedTuple):
    """A way to add up: least squares of all tokens together or of each by itself.

    Attributes:
        outputs, goal: [problem, value, output] and [problem, value, row].
        before: [problem, value, k], the stream before, where any scalars may stand before it.
    """

    outputs: Tensor
    goal: Tensor
    before: Tensor | None

    def least(self, groups: Sequence[tuple[int, ...]], eps: float, size: Tensor) -> tuple[int, ...]:
        """The group that leaves at most rounding of a stream of this size, and little of the goal; or none."""
        rounding, share = 4 * eps * size, 0.02 if eps < 1e-6 else 0.1
        outputs, goal = self.outputs, self.goal
        if self.before is not None:
            basis, sizes, _ = torch.linalg.svd(self.before, full_matrices=False)
            basis = basis * (sizes > 1e-9 * sizes.amax(-1, keepdim=True))[:, None]  # rows may be equal
            outputs, goal = (values - basis @ (basis.mT @ values) for values in (outputs, goal))
            if goal.norm() <= rounding:
                return ()
        left = _left(outputs, goal, groups)
        best = groups[int(left.argmin())] if groups else ()
        if not best or left.min() > torch.minimum(rounding, share * goal.norm()):
            return ()
        # an output that is the stream itself needs nothing that was before: it says nothing of what writes
        alone = None if self.before is None else _left(self.outputs, self.goal, [best])
        return best if alone is None or alone > rounding else ()


def _ways(before: Tensor, after: Tensor, outputs: Tensor) -> Iterator[_Way]:
    """From the strictest: the stream before as it is, times one scalar, and times scalars of each token's own."""
    some = bool(before.any())
    if after.shape[1] == 1:
        together = outputs.flatten(0, 1)[None], (after - before).reshape(1, -1, 1)
        yield _Way(*together, None)
        if some:
            yield _Way(together[0], after.reshape(1, -1, 1), before.reshape(1, -1, 1))
    yield _Way(outputs, after.mT, before.mT if some else None)


def _left(outputs: Tensor, goal: Tensor, groups: Sequence[tuple[int, ...]]) -> Float[Tensor, " group"]:
    """The norm of what is left of a goal beyond the span of each group of outputs."""
    if not groups:
        return goal.new_zeros(0)
    picked = torch.tensor(groups)
    squares, shared = (outputs.mT @ outputs)[:, picked[:, :, None], picked[:, None]], (outputs.mT @ goal)[:, picked]
    explained = (shared * (torch.linalg.pinv(squares, rtol=1e-12, hermitian=True) @ shared)).sum((0, 2, 3))
    return (goal.square().sum() - explained).clamp_min(0).sqrt()


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.reshape(other.shape).to(other.device)


def _fits(tensor: Tensor, other: Tensor, width: int) -> bool:
    return tensor.numel() == other.numel() and tensor.shape[-1] % width == 0


def _adds_up(before: Tensor, after: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Whether `after` is, bit for bit, `before` plus the outputs."""
    if any(output.numel() != after.numel() for output in outputs):
        return False
    total = before.to(after.device)
    for output in outputs:
        total = total + _like(output, total)
    return torch.equal(total, after)
