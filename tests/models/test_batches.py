"""Batches, and the prefix that prompts share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterate.models import batches
from abliterate.models.batches import attention_window, buckets, continues_from_cache, inputs, positions, share_prefix
from models import FAMILIES, handle_of, tiny_llama

SHARED = [1, 87, 85, 266, 201, 90]
ROWS = [[*SHARED, 74, 75, 265], [*SHARED, 3, 4, 5, 6, 7, 8, 9, 10], [*SHARED, 74]]


@given(st.lists(st.integers(6, 200), min_size=1, max_size=80), st.integers(1, 16), st.integers(0, 5))
def test_every_row_is_in_one_batch_with_little_padding(lengths, batch_size, shared):
    found = list(buckets(lengths, batch_size, shared))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) <= batch_size
        own = [lengths[i] - shared for i in batch]
        assert own[0] == max(own)  # longest first
        assert len(own) * max(own) - sum(own) <= 0.15 * len(own) * max(own) + 1e-6


def test_with_padding_allowed_batches_are_full():
    assert [len(b) for b in buckets([1, 100, 50, 3, 7], 2, padding=1.0)] == [2, 2, 1]


def test_the_shared_prefix_leaves_the_tokens_to_be_read(tiny_handle):
    assert share_prefix(tiny_handle, ROWS).length == 6
    assert share_prefix(tiny_handle, ROWS, keep=3).length == 4
    assert share_prefix(tiny_handle, ROWS, keep=4).length == 0  # three tokens aren't worth a run
    assert share_prefix(tiny_handle, [[1, 2, 3, 4, 5, 6], [2, 2, 3, 4, 5, 6]]).length == 0


def test_a_prefix_is_no_pass_of_its_own_where_weights_are_brought_for_it(tiny_handle, monkeypatch):
    monkeypatch.setattr(batches, "offloaded", lambda _model: True)
    assert share_prefix(tiny_handle, ROWS).length == 0
    assert share_prefix(tiny_handle, ROWS * 4).length == 6  # 66 tokens more would be computed


@pytest.mark.parametrize("family", FAMILIES)
def test_states_from_a_shared_prefix_are_those_of_a_plain_run(family):
    handle = handle_of(FAMILIES[family]())
    assert continues_from_cache(handle)
    prefix = share_prefix(handle, ROWS)
    for _ in range(2):  # the prefix is not used up
        batched = handle.hidden_states(**inputs(handle, ROWS, prefix)).last_hidden_state[:, -1]
        for row, state in zip(ROWS, batched, strict=True):
            alone = handle.hidden_states(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
            torch.testing.assert_close(state, alone, atol=1e-5, rtol=1e-5)


def test_a_model_that_cannot_start_from_a_cache_is_run_whole():
    handle = handle_of(FAMILIES["llama"]())
    decoder = handle.decoder
    plain = type(decoder).forward

    def forgetful(self, *args, cache=None, **kwargs):
        return plain(self, *args, **kwargs)

    decoder.forward = forgetful.__get__(decoder)
    assert not continues_from_cache(handle)
    assert share_prefix(handle, ROWS).length == 0


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_window_shorter_than_the_rows_leaves_nothing_shared(family):
    """Padding between the prefix and the rest would push the prefix out of short rows' windows."""
    handle = handle_of(FAMILIES[family]())
    assert attention_window(handle) == 16
    assert share_prefix(handle, ROWS).length == 6
    assert share_prefix(handle, ROWS, room=3).length == 0
    long = [*ROWS, [*SHARED, *range(20, 40)]]
    prefix = share_prefix(handle, long)
    assert prefix.length == 0
    batched = handle.hidden_states(**inputs(handle, long, prefix)).last_hidden_state[:, -1]
    for row, state in zip(long, batched, strict=True):
        alone = handle.hidden_states(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
        torch.testing.assert_close(state, alone, atol=1e-5, rtol=1e-5)


def test_padding_is_on_the_left_and_counts_for_nothing():
    handle = handle_of(tiny_llama())
    arguments = inputs(handle, [[5, 6, 7], [8]], share_prefix(handle, [[5, 6, 7], [8]]))
    assert arguments["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert arguments["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert arguments["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert positions(torch.tensor([[0, 1, 1, 0, 1]])).tolist() == [[0, 0, 1, 1, 2]]
