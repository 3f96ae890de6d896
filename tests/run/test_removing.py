"""Each direction of an edit, measured before it and after, against what its strengths leave."""

from __future__ import annotations

import pytest
import torch

from abliterate.apply.weights import bake
from abliterate.common.errors import WriterError
from abliterate.edit.edit import Edit
from abliterate.models.writers import find_writers
from abliterate.run.removing import Removal


@pytest.fixture
def edit(tiny_handle) -> Edit:
    """Two orthogonal directions at all writers: one whole, one at several strengths and not everywhere."""
    rows = torch.linalg.qr(torch.randn(tiny_handle.d_model, 2)).Q.T.contiguous()
    writers = find_writers(tiny_handle)
    strengths = torch.ones(len(writers), 2)
    strengths[:, 1] = torch.linspace(0, 0.8, len(writers))
    return Edit(tuple(w.name for w in writers), rows, strengths)


def test_every_direction_is_measured_at_its_own_strength(tiny_handle, edit):
    removal = Removal(tiny_handle, edit)
    bake(tiny_handle, edit)
    whole, part = removal.check(tiny_handle)
    assert whole["left"] < 1e-5 < whole["before"]
    assert (whole["writers"], whole["strength"]) == (9, {"min": 1.0, "max": 1.0})
    assert part["left"] == pytest.approx(part["expected"], rel=1e-4) and part["left"] > 1e-3
    assert part["writers"] == 8 and "embedding" not in part["sides"]
    assert part["strength"]["max"] == pytest.approx(0.8)


def test_a_direction_that_was_not_taken_out_is_an_error(tiny_handle, edit):
    removal = Removal(tiny_handle, edit)
    with pytest.raises(WriterError, match="nothing was written"):
        removal.check(tiny_handle)


def test_more_or_less_than_the_strengths_leave_is_an_error(tiny_handle, edit):
    part = Edit(edit.writers, edit.directions[1:], 0.9 * edit.strengths[:, :1])
    removal = Removal(tiny_handle, part)
    bake(tiny_handle, part * 0.2)
    with pytest.raises(WriterError, match="off by"):
        removal.check(tiny_handle)
