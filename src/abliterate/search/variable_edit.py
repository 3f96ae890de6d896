"""An edit whose directions and strengths, or shifts, are variables that gradients reach: what a fit fits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.errors import AbliterateError
from abliterate.edit.edit import Edit, Shift
from abliterate.models.handle import Handle
from abliterate.models.outputs import Change, adding, changed
from abliterate.models.writers import Writer, find_writers, layout

PRUNED = 0.02  # a strength below it is none


class VariableEdit:
    """Directions per block, shared by the block's writers, and a strength per writer and direction.

    Args:
        handle: the loaded original; it is not changed.
        blocks: whose writers are edited.
        rank: directions per block.
        kept: orthonormal directions that every direction stays orthogonal to.
        seed: of what the further directions start from.

    Attributes:
        vectors: [block, rank, d_model] float32; directions before they are made orthonormal.
        strengths: [writer, rank] float32.

    Raises:
        AbliterateError: when there is no writer to edit.
    """

    def __init__(
        self, handle: Handle, blocks: range, rank: int, kept: Float[Tensor, "k d_model"] | None, seed: int
    ) -> None:
        self.handle, self.rank, self.kept, self.seed = handle, rank, kept, seed
        self.writers = editable(find_writers(handle, list(blocks)))
        if not self.writers:
            raise AbliterateError(f"no writer in blocks {blocks[0]} to {blocks[-1]} can be fitted")
        self.group = [w.layer - blocks[0] for w in self.writers if w.layer is not None]
        self.vectors = torch.zeros(len(blocks), rank, handle.d_model, requires_grad=True)
        self.strengths = torch.zeros(len(self.writers), rank, requires_grad=True)

    @torch.no_grad()
    def put(self, first: Float[Tensor, "block d_model"], strength: float, blocks: range | None = None) -> None:
        """Variables at these first directions, of no strength outside `blocks`; further ones at random, hardly used."""
        generator = torch.Generator().manual_seed(self.seed)
        self.vectors.copy_(torch.randn(self.vectors.shape, generator=generator) / self.vectors.shape[-1] ** 0.5)
        self.vectors[:, 0] = first.clone()
        self.strengths.fill_(strength / 6)
        self.strengths[:, 0] = strength
        if blocks is not None:
            self.strengths[[w.layer not in blocks for w in self.writers]] = 0.0

    @torch.no_grad()
    def put_values(self, vectors: Tensor, strengths: Tensor) -> tuple[Tensor, Tensor]:
        """Variables at these values; returns the variables."""
        return self.vectors.copy_(vectors), self.strengths.copy_(strengths)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """The edit as hooks whose directions and strengths carry gradients."""
        modules = {name: module for module, name in self.handle.module_names.items()}
        unit, changes = self.unit(), []
        for writer, group, strengths in zip(self.writers, self.group, self.strengths, strict=True):
            left, right = live_factors(unit[group], strengths, writer.gain, writer.centred)
            changes.append((modules[writer.module], _taking_out(left, right)))
        with changed(changes):
            yield

    def unit(self) -> Float[Tensor, "block rank d_model"]:
        """The directions, orthonormal within a block."""
        vectors = self.vectors
        if self.kept is not None:  # a parametrisation: gradients don't see what is kept
            vectors = vectors - (vectors @ self.kept.T) @ self.kept
        if self.rank == 1:
            return vectors / vectors.norm(dim=-1, keepdim=True)
        q, r = torch.linalg.qr(vectors.transpose(1, 2))
        return (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).transpose(1, 2)

    @torch.no_grad()
    def keep_in_bounds(self, max_strength: float) -> None:
        """After a gradient step: directions of unit length again, strengths from 0 to the largest allowed."""
        self.vectors.copy_(self.unit())
        self.strengths.clamp_(0.0, max_strength)

    @torch.no_grad()
    def edit(self) -> Edit:
        """The edit as it is now, writers that do nothing left out."""
        unit, rank = self.unit().double(), self.rank
        kept = [i for i, row in enumerate(self.strengths) if bool((row > PRUNED).any())]
        strengths = torch.zeros(len(kept), self.vectors.shape[0] * rank)
        for place, i in enumerate(kept):
            at = self.group[i] * rank
            row = self.strengths[i]
            strengths[place, at : at + rank] = torch.where(row > PRUNED, row, 0.0)
        used = strengths.any(0)
        directions = (unit / unit.norm(dim=-1, keepdim=True)).flatten(0, 1).float()
        return Edit(tuple(self.writers[i].name for i in kept), directions[used], strengths[:, used])


class VariableShift:
    """A vector added at the output of each of some blocks, in `VariableEdit`'s place: what a style is fitted in.

    Args:
        handle: the loaded original; it is not changed.
        blocks: at whose outputs vectors are added.
        units: [block] the norm that a vector of length 1 and strength 1 adds.
        kept: orthonormal directions that every vector stays orthogonal to.

    Attributes:
        vectors: [block, 1, d_model] float32, not normalised.
        strengths: [block, 1] float32.
    """

    def __init__(
        self, handle: Handle, blocks: range, units: Float[Tensor, " block"], kept: Float[Tensor, "k d_model"] | None
    ) -> None:
        self.handle, self.blocks, self.units, self.kept = handle, blocks, units.float(), kept
        layout(handle)  # looked for now: with vectors added it isn't found
        self.vectors = torch.zeros(len(blocks), 1, handle.d_model, requires_grad=True)
        self.strengths = torch.ones(len(blocks), 1, requires_grad=True)

    @torch.no_grad()
    def put_values(self, vectors: Tensor, strengths: Tensor) -> tuple[Tensor, Tensor]:
        """Variables at these values; returns the variables."""
        return self.vectors.copy_(vectors), self.strengths.copy_(strengths)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """The shifts as hooks whose vectors carry gradients."""
        added = zip(self.blocks, self.added(), strict=True)
        with changed([(self.handle.blocks[block], adding(vector)) for block, vector in added]):
            yield

    def added(self) -> Float[Tensor, "block d_model"]:
        """What is added at each block's output."""
        vectors = self.vectors
        if self.kept is not None:
            vectors = vectors - (vectors @ self.kept.T) @ self.kept
        return (self.strengths * self.units[:, None]) * vectors[:, 0]

    @torch.no_grad()
    def keep_in_bounds(self, max_strength: float) -> None:
        """After a gradient step: strengths from 0 to the largest allowed."""
        self.strengths.clamp_(0.0, max_strength)

    @torch.no_grad()
    def edit(self) -> Edit:
        """The shifts as they are now."""
        wide = self.added().double()
        sizes = wide.norm(dim=-1)
        shifts = [Shift(b, v / n, float(n)) for b, v, n in zip(self.blocks, wide, sizes, strict=True) if n > 0]
        d_model = self.handle.d_model
        return Edit((), torch.zeros(0, d_model), torch.zeros(0, 0), shifts)


def editable(writers: Sequence[Writer]) -> list[Writer]:
    """Writers that a hook on their module's output can edit: weights, not a norm's bias; and what blocks give."""
    hooked = [w for w in writers if w.module and (len(w.shape) > 1 or w.at == "output")]
    return [w for w in hooked if w.side in ("attention", "mlp")]


def live_factors(
    directions: Float[Tensor, "rank d_model"],
    strengths: Float[Tensor, " rank"],
    gain: Float[Tensor, " d_model"] | None,
    centred: bool,
) -> tuple[Float[Tensor, "rank d_model"], Float[Tensor, "rank d_model"]]:
    """`apply.factors` with gradients: (left, right) of out - left^T (right out)."""
    if gain is None and not centred:
        return strengths[:, None] * directions, directions
    rows = directions if gain is None else directions * gain.clone()
    if centred:
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return strengths[:, None] * torch.linalg.solve(rows @ rows.T, rows), rows


def _taking_out(left: Tensor, right: Tensor) -> Change:
    """`outputs.taking_out` in the order of sums that fits have always had: their recipes stay the same, bit for bit."""

    def take_out(out: Tensor) -> Tensor:
        return out - (out @ right.to(out).T) @ left.to(out)

    return take_out
