"""Packed rows give what plain ones give, on every family; and gradients, and nothing that isn't read."""

from __future__ import annotations

import pytest
import torch

from abliterate.search.packed import Packer, Row, _bins, _Checkpointed
from models import FAMILIES, handle_of, tiny, tiny_llama

PROMPTS = ["Tell me about boats", "How does rain fall on the sea?", "A walk", "Old maps of seven seas, please"]


def rows_of(handle):
    return [Row([*ids, 40 + i, 50 + i], 2 + i % 2) for i, ids in enumerate(handle.prompt_ids(PROMPTS))]


def plainly(handle, row):
    """The same log-probabilities the long way: the whole row alone, through the model's own forward."""
    logits = handle.model(input_ids=torch.tensor([row.ids])).logits[0]
    return logits[-row.outputs :].float().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first_block", [0, 2])
def test_packed_rows_are_plain_rows(family, first_block):
    handle = handle_of(FAMILIES[family]())
    rows = rows_of(handle)
    packer = Packer(handle, list(rows), min(first_block, handle.layers - 1))
    with torch.no_grad():
        for _ in range(2):  # the second time from what is kept
            for row, found in zip(rows, packer.logprobs(range(len(rows))), strict=True):
                torch.testing.assert_close(found, plainly(handle, row), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "cohere", "olmo2"])
def test_the_usual_families_are_packed(family):
    """Without this the test above could pass by never packing."""
    handle = handle_of(FAMILIES[family]())
    rows = [Row(row.ids[-12:], 2) for row in rows_of(handle)]  # shorter than the sliding window
    assert Packer(handle, rows, 0).packs


def test_rows_longer_than_the_window_are_not_packed():
    handle = handle_of(tiny("mistral", num_hidden_layers=2, hidden_size=32, intermediate_size=64,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=8))  # fmt: skip
    rows = rows_of(handle)
    packer = Packer(handle, list(rows), 0)
    assert not packer.packs
    with torch.no_grad():
        torch.testing.assert_close(packer.logprobs([1])[0], plainly(handle, rows[1]), rtol=1e-3, atol=1e-4)


def gradient(handle, packer):
    vector = torch.zeros(handle.d_model, requires_grad=True)
    hook = handle.blocks[2].register_forward_hook(
        lambda _m, _a, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector
    )
    try:
        torch.stack([lp[0, 7] for lp in packer.logprobs([0, 1, 3])]).sum().backward()
    finally:
        hook.remove()
    return vector.grad


def test_gradients_are_those_of_plain_rows():
    handle = handle_of(tiny_llama())
    packer = Packer(handle, rows_of(handle), 2)
    first, from_kept = gradient(handle, packer), gradient(handle, packer)
    packer.packs = False
    plain = gradient(handle, packer)
    packer.checkpointing = True
    recomputed = gradient(handle, packer)
    for found in (first, from_kept, recomputed):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    assert plain.norm() > 0


def test_blocks_below_run_once_per_row():
    handle = handle_of(tiny_llama())
    packer = Packer(handle, rows_of(handle), 2)
    handle.logits(torch.zeros(1, handle.d_model))  # the head is tried out once
    runs = []
    hooks = [block.register_forward_hook(lambda *_a, i=i: runs.append(i)) for i, block in enumerate(handle.blocks)]
    with torch.no_grad():
        packer.logprobs([0, 1])
        assert runs == [0, 1, 2, 3]  # all four rows up to block 2, then two of them from there
        packer.logprobs([1, 0])
        assert runs == [0, 1, 2, 3, 2, 3]
        packer.logprobs([1, 2])
        assert runs == [0, 1, 2, 3, 2, 3, 2, 3]
    for hook in hooks:
        hook.remove()
    assert not any(isinstance(block, _Checkpointed) or type(block).__name__ == "_Skipped" for block in handle.blocks)


def test_what_is_kept_does_not_depend_on_what_was_asked_first():
    """In bfloat16 a batch's shape changes the rounding: a resumed fit asks in another order and must not see it."""
    handle = handle_of(tiny_llama(dtype=torch.bfloat16))
    one, two = (Packer(handle, rows_of(handle), 2) for _ in range(2))
    with torch.no_grad():
        one.logprobs([0, 1]), one.logprobs([2, 3])
        two.logprobs([3]), two.logprobs([1, 2])
        for first, second in zip(one.logprobs([0, 3]), two.logprobs([0, 3]), strict=True):
            assert torch.equal(first, second)


def test_the_model_is_whole_again_after_an_error():
    handle = handle_of(tiny_llama())
    packer = Packer(handle, rows_of(handle), 2)
    with torch.no_grad():
        packer.logprobs([0])
    blocks = list(handle.blocks)
    hook = handle.blocks[3].register_forward_hook(lambda *_a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packer.logprobs([0])
    hook.remove()
    assert list(handle.blocks) == blocks


def test_rows_added_later_must_share_the_prefix():
    handle = handle_of(tiny_llama())
    rows = rows_of(handle)
    packer = Packer(handle, list(rows), 0)
    assert packer.prefix
    assert packer.add([Row([*packer.prefix, 9, 8, 7], 2)]) == [4]
    with torch.no_grad():
        assert packer.logprobs([4])[0].shape == (2, handle.vocabulary)
    with pytest.raises(ValueError, match="prefix"):
        packer.add([Row([399, 9, 8], 1)])


def test_bins_hold_everything_once_and_no_more_than_fits():
    sizes = [100, 30, 200, 7, 7, 300, 90]
    bins = _bins(sizes, 256)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in members) <= 256 or len(members) == 1 for members in bins)
