"""The algebra of edits, exactly."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterate.apply.removal import removed
from abliterate.edit.edit import Edit, Part, Shift, normalised, orthonormal

D = 12


def unit(seed: int) -> torch.Tensor:
    return torch.from_numpy(normalised(torch.randn(D, generator=torch.Generator().manual_seed(seed))))


def operator(edit: Edit, writer: str) -> torch.Tensor:
    """What an edit takes out at a writer: sum_i a_i r_i r_i^T, in float64."""
    part = edit.parts.get(writer)
    if part is None:
        return torch.zeros(D, D, dtype=torch.float64)
    r = torch.from_numpy(part.directions).double()
    return r.T @ torch.diag(torch.from_numpy(part.strengths).double()) @ r


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5, 2.0])
def test_removing_is_one_minus_a_r_rt_times_w(axis, strength):
    r, w = unit(0), torch.randn(D, D, dtype=torch.float64)
    left = torch.eye(D, dtype=torch.float64) - strength * torch.outer(r.double(), r.double())
    expected = left @ w if axis == 0 else (left @ w.T).T
    got = removed(w, Part(r[None], torch.tensor([strength])), axis)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def test_two_orthonormal_directions_take_out_a_plane():
    rows = orthonormal([unit(0), unit(1)])
    edit = Edit(("w",), rows, torch.tensor([[1.0, 0.25]]))
    w = torch.randn(D, 7, dtype=torch.float64)
    a, b = torch.from_numpy(rows).double()
    expected = w - torch.outer(a, a @ w) - 0.25 * torch.outer(b, b @ w)
    torch.testing.assert_close(removed(w, edit.parts["w"], 0), expected, atol=2e-6, rtol=0)


def test_removing_works_along_any_axis_of_stacked_experts():
    r, stack = unit(0), torch.randn(3, D, 5)
    out = removed(stack, Part(r[None], torch.ones(1)), 1)
    assert out.shape == stack.shape
    torch.testing.assert_close(torch.einsum("d,edk->ek", r, out), torch.zeros(3, 5), atol=1e-5, rtol=0)


def test_removing_keeps_the_dtype():
    assert removed(torch.randn(D, 4).bfloat16(), Part(unit(0)[None], torch.ones(1)), 0).dtype == torch.bfloat16


def test_uniform_normalises_and_takes_writers_or_names():
    class Named:
        name = "v"

    edit = Edit.uniform(["w", Named()], 7 * unit(0), 0.5)
    assert edit.writers == ("w", "v")
    torch.testing.assert_close(torch.from_numpy(edit.directions[0]), unit(0))
    assert edit.strengths.tolist() == [[0.5], [0.5]]


def test_each_writer_has_its_own_strength():
    edit = Edit.from_names({"a": 1.0, "b": 0.0, "c": -0.5}, unit(0))
    assert set(edit.parts) == {"a", "c"}  # b is left alone
    torch.testing.assert_close(operator(edit, "c"), -0.5 * operator(edit, "a"))


@pytest.mark.parametrize("factor", [0.5, -1, 0, 3])
def test_scaling_scales_the_operator(factor):
    edit = Edit.uniform(["w"], unit(0), 0.8)
    for scaled in (factor * edit, edit * factor):
        torch.testing.assert_close(operator(scaled, "w"), factor * operator(edit, "w"))
    torch.testing.assert_close(operator(-edit, "w"), -operator(edit, "w"))


def test_adding_on_the_same_direction_adds_strengths():
    total = Edit.uniform(["a", "b"], unit(0), 0.25) + Edit.uniform(["b", "c"], unit(0), 0.5)
    assert total.writers == ("a", "b", "c")
    assert len(total.directions) == 1  # the direction is kept once
    assert total.strengths.flatten().tolist() == [0.25, 0.75, 0.5]


@given(st.integers(0, 10**6), st.floats(-1, 2, width=32), st.floats(-1, 2, width=32))
def test_adding_on_other_directions_adds_operators(seed, left, right):
    a, b = Edit.uniform(["w"], unit(seed), left), Edit.uniform(["w", "v"], unit(seed + 1), right)
    total = a + b
    for writer in ("w", "v"):
        torch.testing.assert_close(
            operator(total, writer), operator(a, writer) + operator(b, writer), atol=3e-6, rtol=0
        )


def test_adding_planes_that_overlap():
    plane, line = orthonormal([unit(0), unit(1)]), orthonormal([unit(1)])
    a = Edit(("w",), plane, torch.tensor([[1.0, 0.5]]))
    b = Edit(("w",), line, torch.tensor([[2.0]]))
    torch.testing.assert_close(operator(a + b, "w"), operator(a, "w") + operator(b, "w"), atol=3e-6, rtol=0)
    assert len((a + b).parts["w"].strengths) == 2  # two dimensions, not three


def test_an_edit_less_itself_does_nothing():
    edit = Edit.uniform(["w"], unit(0))
    assert (edit + -edit).parts == {}
    back = (0 * edit + 0 * edit) + edit  # an empty edit keeps the model's width
    torch.testing.assert_close(operator(back, "w"), operator(edit, "w"))


def moved(edit: Edit, layer: int) -> torch.Tensor:
    """What an edit adds at a layer's output, in float64."""
    return sum(
        (torch.from_numpy(s.vector).double() for s in edit.shifts if s.layer == layer),
        torch.zeros(D, dtype=torch.float64),
    )


SEEDS = st.integers(0, 5)
FACTORS = st.floats(-2, 2, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)


@st.composite
def edits(draw) -> Edit:
    """Edits of some of three writers, each along one of few directions or the plane of two; and some shifts."""
    total = Edit((), torch.zeros(0, D), torch.zeros(0, 0))
    for writer in draw(st.lists(st.sampled_from("abc"), unique=True)):
        seeds = draw(st.lists(SEEDS, min_size=1, max_size=2, unique=True))
        span = unit(seeds[0]) if len(seeds) == 1 else torch.stack([unit(s) for s in seeds])
        total = total + Edit.from_names({writer: draw(FACTORS)}, span)
    for layer in draw(st.lists(st.integers(0, 1), max_size=3)):
        total = total + Edit.shifting(layer, unit(draw(SEEDS)), draw(FACTORS))
    return total


def does_the_same(left: Edit, right: Edit) -> None:
    for writer in "abc":
        torch.testing.assert_close(operator(left, writer), operator(right, writer), atol=3e-5, rtol=1e-5)
    for layer in (0, 1):
        torch.testing.assert_close(moved(left, layer), moved(right, layer), atol=3e-5, rtol=1e-5)


@given(edits(), edits(), edits())
def test_adding_is_commutative_and_associative(a, b, c):
    does_the_same(a + b, b + a)
    does_the_same((a + b) + c, a + (b + c))


@given(edits(), edits(), FACTORS, FACTORS)
def test_scaling_is_linear(a, b, x, y):
    does_the_same(x * (a + b), x * a + x * b)
    does_the_same((x + y) * a, x * a + y * a)
    does_the_same(x * (y * a), (x * y) * a)
    does_the_same(a - b, a + -1 * b)


@given(edits(), edits(), FACTORS)
def test_what_comes_out_of_the_algebra_is_an_edit_with_nothing_superfluous(a, b, x):
    total = a + x * b
    for part in total.parts.values():
        gram = part.directions.astype(np.float64) @ part.directions.astype(np.float64).T
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5, rtol=0)
    keys = [(s.layer, s.direction.tobytes()) for s in total.shifts]
    assert len(keys) == len(set(keys))
    does_the_same(a + b - b, a)
    assert (a - a).parts == {} and (a - a).shifts == ()


def test_shifts_along_one_direction_of_a_layer_are_one():
    total = Edit.shifting(1, 8 * unit(0), 2.0) + Edit.shifting(1, unit(0), -0.5) + Edit.shifting(2, unit(0), 1.0)
    assert [(s.layer, s.size) for s in total.shifts] == [(1, 1.5), (2, 1.0)]
    assert total.writers == () and total.parts == {} and total.d_model == D
    torch.testing.assert_close(torch.from_numpy((2 * total).shifts[0].vector), 3.0 * unit(0))


@pytest.mark.parametrize(
    ("layer", "direction", "size", "message"),
    [
        (-1, unit(0), 1.0, "layers count from 0"),
        (0, 2 * unit(0), 1.0, "norm 2"),
        (0, unit(0)[None], 1.0, "not .d_model."),
        (0, unit(0), float("inf"), "finite"),
        (0, unit(0) * float("nan"), 1.0, "finite"),
    ],
)
def test_an_invalid_shift_is_refused(layer, direction, size, message):
    with pytest.raises(ValueError, match=message):
        Shift(layer, direction, size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_arrays_and_tensors_of_any_dtype_make_the_same_edit(dtype):
    row, strengths = torch.randn(D).to(dtype), torch.tensor([[0.25]], dtype=dtype, requires_grad=True)
    ours = Edit(("w",), normalised(row)[None], strengths, (Shift(1, normalised(row), 2),))
    wide = row.double().numpy()
    theirs = Edit(["w"], normalised(wide)[None], np.array([[0.25]]), [Shift(1, normalised(wide), 2)])
    for edit in (ours, theirs):
        assert edit.directions.dtype == edit.strengths.dtype == edit.shifts[0].direction.dtype == np.float32
    assert ours.writers == theirs.writers and np.array_equal(ours.directions, theirs.directions)
    assert np.array_equal(ours.strengths, theirs.strengths)
    assert np.array_equal(ours.shifts[0].vector, theirs.shifts[0].vector)


def test_edits_and_recipes_need_no_torch():
    code = "import sys, abliterate.edit.compare, abliterate.edit.algebra; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_shift_of_another_width_is_refused():
    with pytest.raises(ValueError, match="width 3"):
        Edit(("w",), unit(0)[None], torch.ones(1, 1), (Shift(0, torch.eye(3)[0], 1.0),))


def test_edits_of_other_widths_do_not_add():
    with pytest.raises(ValueError, match="widths 12 and 3"):
        Edit.uniform(["w"], unit(0)) + Edit.uniform(["w"], torch.ones(3))


@pytest.mark.parametrize(
    ("writers", "directions", "strengths", "message"),
    [
        (("w",), unit(0)[None], torch.ones(2, 1), "don't fit"),
        (("w",), unit(0), torch.ones(1, 1), "don't fit"),
        (("w", "w"), unit(0)[None], torch.ones(2, 1), "twice"),
        (("w",), unit(0)[None] * 1.01, torch.ones(1, 1), "norm 1.01"),
        (("w",), unit(0)[None] * float("nan"), torch.ones(1, 1), "finite"),
        (("w",), unit(0)[None], torch.tensor([[float("inf")]]), "finite"),
        (("w",), torch.stack([unit(0), unit(1)]), torch.ones(1, 2), "orthogonal"),
    ],
)
def test_an_invalid_edit_is_refused(writers, directions, strengths, message):
    with pytest.raises(ValueError, match=message):
        Edit(writers, directions, strengths)


def test_directions_of_different_writers_need_not_be_orthogonal():
    Edit(("v", "w"), torch.stack([unit(0), unit(1)]), torch.eye(2))


@pytest.mark.parametrize("vector", [torch.zeros(D), torch.full((D,), float("nan")), torch.full((D,), float("inf"))])
def test_what_has_no_direction_is_refused(vector):
    with pytest.raises(ValueError, match="finite and not zero"):
        normalised(vector)


def test_normalising_survives_tiny_and_huge_vectors():
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(torch.from_numpy(normalised(unit(0) * scale)), unit(0))


def test_orthonormal_rows_span_the_vectors_and_start_with_the_first():
    vectors = [3 * unit(0), unit(1), unit(0) + unit(1)]  # the third is not new
    rows = torch.from_numpy(orthonormal(vectors)).double()
    assert rows.shape == (2, D)
    torch.testing.assert_close(rows @ rows.T, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows[0].float(), unit(0))
    for v in vectors:
        torch.testing.assert_close(rows.T @ (rows @ v.double()), v.double(), atol=1e-6, rtol=0)
