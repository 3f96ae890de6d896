"""An edit attached live."""

from __future__ import annotations

import pytest
import torch

from abliterate.common.errors import WriterError
from abliterate.edit.edit import Edit, orthonormal
from abliterate.models.writers import find_writers
from models import handle_of, tiny_llama

pytestmark = pytest.mark.device

IDS = torch.arange(3, 15)[None]


def test_the_edit_is_gone_when_the_context_ends(tiny_handle):
    before = tiny_handle.model(IDS).logits
    edit = Edit.uniform(find_writers(tiny_handle), torch.randn(32))
    with edit.attached(tiny_handle) as same:
        assert same is tiny_handle
        assert (tiny_handle.model(IDS).logits - before).abs().max() > 0.1
    assert torch.equal(tiny_handle.model(IDS).logits, before)


def test_the_edit_is_gone_after_an_error(tiny_handle):
    before = tiny_handle.model(IDS).logits
    with pytest.raises(RuntimeError), Edit.uniform(find_writers(tiny_handle), torch.randn(32)).attached(tiny_handle):
        raise RuntimeError
    assert torch.equal(tiny_handle.model(IDS).logits, before)


def test_strength_zero_changes_nothing(tiny_handle):
    before = tiny_handle.model(IDS).logits
    with Edit.uniform(find_writers(tiny_handle), torch.randn(32), 0.0).attached(tiny_handle):
        assert torch.equal(tiny_handle.model(IDS).logits, before)


def test_edits_nest_as_their_sum_where_directions_are_orthogonal(tiny_handle):
    rows = orthonormal(torch.randn(2, 32))
    a, b = (Edit.uniform(find_writers(tiny_handle), r, 0.7) for r in rows)
    with a.attached(tiny_handle), b.attached(tiny_handle):
        nested = tiny_handle.model(IDS).logits
    with (a + b).attached(tiny_handle):
        torch.testing.assert_close(tiny_handle.model(IDS).logits, nested, atol=1e-5, rtol=1e-5)


def test_half_precision_works_and_keeps_its_dtype():
    handle = handle_of(tiny_llama(dtype=torch.bfloat16))
    with Edit.uniform(find_writers(handle), torch.randn(32)).attached(handle):
        logits = handle.model(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_an_edit_for_another_model_is_refused_and_leaves_no_hook(tiny_handle):
    before = tiny_handle.model(IDS).logits
    first = find_writers(tiny_handle)[1]
    foreign = Edit.uniform([first, "transformer.h.0.mlp.c_proj.weight"], torch.randn(32))
    with pytest.raises(WriterError, match=r"transformer\.h\.0\.mlp\.c_proj\.weight"), foreign.attached(tiny_handle):
        pass
    wide = Edit.uniform([first], torch.randn(64))
    with pytest.raises(WriterError, match=r"64 entries.*d_model 32"), wide.attached(tiny_handle):
        pass
    assert torch.equal(tiny_handle.model(IDS).logits, before)
