"""What is taken out of a weight so that the stream behind it loses what the edit says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from abliterate.apply.removal import removed
from abliterate.edit.algebra import factors
from abliterate.edit.edit import Part, orthonormal

D, INNER = 24, 10


def stream(weight, gain, centred):
    """What a norm with this gain lets through of the weight's columns, up to a number per column."""
    seen = weight.double()
    if centred:
        seen = seen - seen.mean(0)
    return gain.double()[:, None] * seen


def parted(k, strengths):
    return Part(orthonormal(torch.randn(k, D)), torch.tensor(strengths))


def test_with_nothing_behind_the_weight_they_are_the_directions_times_their_strengths():
    part = parted(2, [1.0, -0.3])
    left, right = factors(part)
    np.testing.assert_allclose(right, part.directions, rtol=1.3e-6, atol=1e-5)
    np.testing.assert_allclose(left, part.directions * [[1.0], [-0.3]], rtol=1.3e-6, atol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("strengths", [[1.0], [0.4], [1.0, 1.0, 1.0], [1.0, 0.3], [0.9, -0.5, 1.4]])
def test_behind_a_norm_every_component_of_the_stream_is_what_its_strength_says(strengths, centred):
    part, gain, weight = parted(len(strengths), strengths), torch.randn(D), torch.randn(D, INNER)
    edited = removed(weight, factors(part, gain, centred), 0)
    before, after = (torch.from_numpy(part.directions).double() @ stream(w, gain, centred) for w in (weight, edited))
    torch.testing.assert_close(after, (1 - part.strengths.double())[:, None] * before, atol=2e-5, rtol=1e-5)


def test_the_change_is_smaller_than_the_one_that_undoes_the_gain():
    part, weight = parted(2, [1.0, 0.5]), torch.randn(D, INNER)
    gain = 1 + 0.5 * torch.randn(D)
    gain[3] = 1e-4  # some gains of real models are
    ours = weight - removed(weight, factors(part, gain), 0)
    r, a = torch.from_numpy(part.directions), part.strengths
    undone = (r.T * a) @ (r @ (gain[:, None] * weight)) / gain[:, None]
    torch.testing.assert_close(r @ (gain[:, None] * ours), r @ (gain[:, None] * undone), atol=1e-4, rtol=1e-4)
    assert ours.norm() < weight.norm()
    assert undone.norm() > 10 * weight.norm()


def test_equal_strengths_take_out_the_span_orthogonally():
    part, gain = parted(3, [0.7, 0.7, 0.7]), torch.randn(D)
    left, right = factors(part, gain)
    basis = orthonormal(part.directions * gain.numpy()).astype(np.float64)
    np.testing.assert_allclose(left.T @ right, 0.7 * basis.T @ basis, atol=1e-5, rtol=1e-5)


def test_a_direction_that_the_norm_lets_nothing_along_takes_nothing_out():
    along_zero, other = torch.eye(D)[0], torch.eye(D)[1]
    gain = torch.ones(D)
    gain[0] = 0
    weight = torch.randn(D, INNER)
    edited = removed(weight, factors(Part(torch.stack([along_zero, other]), torch.ones(2)), gain), 0)
    torch.testing.assert_close(edited[1], torch.zeros(INNER))
    torch.testing.assert_close(edited[2:], weight[2:])
    mean = Part(torch.full((1, D), D**-0.5), torch.ones(1))
    torch.testing.assert_close(removed(weight, factors(mean, torch.ones(D), centred=True), 0), weight)


def test_the_axis_of_fused_experts():
    part, stacked = parted(2, [1.0, 0.5]), torch.randn(3, INNER, D)
    edited = removed(stacked, factors(part), 2)
    for one, was in zip(edited, stacked, strict=True):
        torch.testing.assert_close(one.T, removed(was.T, factors(part), 0), atol=1e-6, rtol=1e-5)
