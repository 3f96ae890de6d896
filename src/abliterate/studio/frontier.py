"""The points of a run's frontier, as values and as a small drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from abliterate.common.errors import AbliterateError
from abliterate.measure.document import load_document
from abliterate.measure.numbers import Share

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 640, 260, 62, 44, 16


@dataclass(frozen=True)
class Point:
    """An edit of the frontier, as validation found it.

    Attributes:
        label: for people.
        refused, total: of the validation split's target prompts.
        divergence: in nats, at the first answer token.
        recipe: its file.
        chosen: whether the run took it.
    """

    label: str
    refused: int
    total: int
    divergence: float
    recipe: Path
    chosen: bool

    @property
    def rate(self) -> float:
        return self.refused / self.total


def frontier_points(out: Path) -> list[Point]:
    """The points of a run's results.json; of a run without a frontier, its one edit as the test split found it.

    Raises:
        AbliterateError: when results.json says nothing of the kind.
    """
    try:
        run = load_document(out / "results.json")
        points = [(f"{n}", p.refusal, p.divergence, p.recipe, p.chosen) for n, p in enumerate(run.frontier, 1)]
        if not points and run.edited and run.edited.divergence:
            divergence = run.edited.divergence.first_token
            points = [("the run's edit", run.edited.refusal, divergence, "recipe.safetensors", True)]
    except AbliterateError:
        points = []
    if not points or not all(recipe for *_, recipe, _ in points):
        raise AbliterateError(f"{out.name}/results.json holds no frontier that can be shown")
    return [_point(*point, out) for point in points]


def _point(name: str, refusal: Share, divergence: float, recipe: str | None, chosen: bool | None, out: Path) -> Point:
    refused, total = refusal.counted, max(1, refusal.total)
    label = f"{name}: {refused} of {total} refused, divergence {divergence:.3g} nats" + (" (chosen)" if chosen else "")
    return Point(label, refused, total, divergence, out / str(recipe), bool(chosen))


def drawing(points: Sequence[Point], picked: int | None) -> str:
    """Refusal rate over divergence as an SVG in the page's colours, the picked point filled."""
    widest = max((point.divergence for point in points), default=0.0) * 1.1 or 1.0
    highest = max(0.1, *(point.rate for point in points)) * 1.1

    def x(divergence: float) -> float:
        return LEFT + (WIDTH - LEFT - EDGE) * max(0.0, divergence) / widest

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - EDGE) * rate / highest

    marks = "".join(
        f'<circle cx="{x(p.divergence):.1f}" cy="{y(p.rate):.1f}" r="{9 if i == picked else 6}" '
        f'class="{"picked" if i == picked else "point"}"><title>{escape(p.label)}</title></circle>'
        for i, p in enumerate(points)
    )
    line = " ".join(f"{x(p.divergence):.1f},{y(p.rate):.1f}" for p in sorted(points, key=lambda p: p.divergence))
    across = "".join(
        f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>'
        for value in round_values(widest)
    )
    up = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - EDGE}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="grid"/>'
        f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{100 * value:g}%</text>'
        for value in round_values(highest)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="frontier" '
        f'aria-label="refusals over divergence, {len(points)} points">{up}{across}'
        f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">divergence, nats</text>'
        f'<text x="14" y="{HEIGHT / 2 - 16}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2 - 16})">refused'
        f'</text><polyline points="{line}" class="curve"/>{marks}</svg>'
    )


def round_values(most: float, intervals: int = 5) -> list[float]:
    """0 and the multiples of 1, 2 or 5 times a power of ten up to `most`, at most so many of them."""
    power = 10.0 ** math.floor(math.log10(most / intervals))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * intervals >= most)
    return [float(f"{step * n:.12g}") for n in range(int(most / step + 1e-9) + 1)]
