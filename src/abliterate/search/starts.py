"""Where a fit starts: a direction, and the few blocks it is taken out of.

What separates the two sides at a block was written by the blocks just below it. So the natural start takes the
direction out there alone: it costs little divergence, and nearly all strengths are none already, where a start in all
writers spends most of its steps on taking strengths back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from abliterate.directions.means import Directions

STARTS = 8  # directions tried
WIDTH = 8  # a start's blocks are this share of the depth


class Start(NamedTuple):
    """Directions to start from and the blocks that begin with a strength.

    Attributes:
        name: for the log.
        directions: [layer, d_model] unit, one for each block of the model.
        blocks: whose writers it is taken out of; a fit from there may edit these and those above.
    """

    name: str
    directions: Float[Tensor, "layer d_model"]
    blocks: range


def starts(directions: Directions, blocks: range) -> Iterator[Start]:
    """Each of the directions that separate best, in an eighth of the depth below the block where it does.

    Args:
        directions: of the training split.
        blocks: whose writers may be edited.
    """
    layers, width = directions.unit.shape[0], window(directions.unit.shape[0])
    separation = directions.separation[:, 0, -1].nan_to_num(-1.0)
    inside = [layer for layer in range(blocks.start + 1, blocks.stop) if separation[layer] > 0]
    for layer in sorted(sorted(inside, key=lambda layer: -float(separation[layer]))[:STARTS]):
        near = range(max(blocks.start, layer - width), layer)
        unit = directions.unit[layer, 0, -1].repeat(layers, 1)
        yield Start(f"the direction at block {layer}, in blocks {near[0]} to {near[-1]}", unit, near)


def wider(best: Start | None, directions: Directions, blocks: range) -> Iterator[Start]:
    """The best start in all blocks from its first on, and each block's own direction in all of `blocks`."""
    if best is not None:
        everywhere = range(best.blocks.start, blocks.stop)
        yield Start(best.name.replace(f"to {best.blocks[-1]}", f"to {everywhere[-1]}"), best.directions, everywhere)
    yield Start("each block's own direction", directions.unit[:, 2, -1], blocks)


def window(layers: int) -> int:
    """Blocks in an eighth of the depth, at least one."""
    return math.ceil(layers / WIDTH)
