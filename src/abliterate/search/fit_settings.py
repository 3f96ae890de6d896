"""Sizes and limits of the fit."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTS = (3.0, 1.0, 0.3, 0.1, 0.03)
LIGHTER = (0.75, 0.55, 0.4, 0.25)  # of the lightest fitted edit's strengths: the frontier's gentle end


@dataclass(frozen=True)
class FitSettings:
    """Sizes and limits of the fit.

    Attributes:
        steps: gradient steps to the first point of the frontier.
        steps_between: steps from each point to the next.
        weights: of refusing against drifting, one per point.
        lighter: factors for the strengths of the lightest of these points, for gentler ones still.
        rank: directions per layer.
        layers: blocks whose writers may be edited; by default those from the start's first on.
        target_batch, baseline_batch: sequences per step.
        baseline_prompts: most baseline prompts whose distributions are kept.
        answer_tokens: tokens of the original's answers along which drifting counts.
        max_strength: bound of the strengths; the lower one is 0.
        rate: size of a direction's step in radians, roughly; strengths move by half of it.
        sparsity: pull of the mean strength towards 0.
        decode_tokens: longest answer decoded to judge a point.
        validation_prompts: most prompts a side by which a point is judged.
        max_refusal_rate, max_divergence, free_divergence: how the point is chosen; see `frontier.choose`.
    """

    steps: int = 16
    steps_between: int = 6
    weights: tuple[float, ...] = WEIGHTS
    lighter: tuple[float, ...] = LIGHTER
    rank: int = 1
    layers: range | None = None
    target_batch: int = 8
    baseline_batch: int = 16
    baseline_prompts: int = 512
    answer_tokens: int = 8
    max_strength: float = 1.5
    rate: float = 0.3
    sparsity: float = 0.5
    decode_tokens: int = 48
    validation_prompts: int = 64
    max_refusal_rate: float | None = 0.05
    max_divergence: float | None = None
    free_divergence: float = 0.02
    seed: int = 0
