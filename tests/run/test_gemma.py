"""A real second family, with norms behind its blocks: Gemma 3 270M, loaded from a quantised GGUF."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from abliterate.apply.proof import check_proof, prove
from abliterate.common.errors import WriterError
from abliterate.edit.edit import Edit
from abliterate.models.handle import Handle
from abliterate.models.loading import load
from abliterate.models.writers import find_writers, layout
from real_models import gemma_gguf

pytestmark = pytest.mark.slow

TEXT = "A residual stream is what every layer of a transformer reads and adds to."


@pytest.fixture(scope="module")
def gemma():
    """Loaded once, for unpacking takes long; the last test changes its weights."""
    return load(gemma_gguf(), dtype="float32")


def test_the_direction_itself_is_the_wrong_one_on_gemma(gemma):
    found = layout(gemma)
    plain = tuple(dataclasses.replace(w, gain=None) for w in found.writers)
    gemma.__dict__["_layout"] = found._replace(writers=plain)
    try:
        with pytest.raises(WriterError, match=r"block 0, mid \(attention writes it\)"):
            check_proof(gemma)
    finally:
        gemma.__dict__["_layout"] = found


def test_gemma_is_proved_baked_saved_and_proved_again(gemma, tmp_path):
    found = find_writers(gemma)
    assert gemma.layers == 18
    assert [(w.layer, w.side) for w in found[1:]] == [(i, side) for i in range(18) for side in ("attention", "mlp")]
    assert found[0].gain is None
    assert all(w.gain_from is not None and w.gain_from[1] == 1.0 for w in found[1:])
    assert check_proof(gemma).component < 1e-5

    r = torch.randn(gemma.d_model)
    assert prove(gemma, r).component > 1e-2
    edit = Edit.uniform(found, r)
    ids = gemma.tokenizer(TEXT, return_tensors="pt").input_ids
    with edit.attached(gemma), torch.inference_mode():
        live = gemma.model(ids).logits
    edit.bake(gemma)
    with torch.inference_mode():
        torch.testing.assert_close(gemma.model(ids).logits, live, atol=1e-3, rtol=1e-3)
    assert prove(gemma, r).component < 1e-5

    gemma.model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval().requires_grad_(False)
    again = Handle(model=model, tokenizer=gemma.tokenizer, source="saved")
    assert prove(again, r).component < 1e-5
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, live, atol=1e-3, rtol=1e-3)
