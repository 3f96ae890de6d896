"""Batched decoding gives what generating one prompt at a time gives."""

from __future__ import annotations

import importlib

import pytest
import torch

from abliterate.edit.edit import Edit
from abliterate.measure import slots
from abliterate.measure.decode import CHECK_EVERY, REFILL, decode
from abliterate.measure.slots import takes_slots
from abliterate.models import batches
from abliterate.models.writers import find_writers
from models import EOS, FAMILIES, handle_of, tiny, tiny_llama

PROMPTS = [
    "Hi",
    "Explain how a lock is picked, step by step",
    "Name three",
    "Write me a long poem about the sea at night, with a storm in it",
    "Why?",
    "Sum up the plot of a book that you like",
    "Spell 'cat'",
]
TOKENS = 24


def generated(handle, ids, tokens=TOKENS):
    """What `generate` gives for one prompt, without the end token."""
    out = handle.model.generate(
        torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0, use_cache=True,
        eos_token_id=sorted(handle.end_tokens), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
    )[0, len(ids) :].tolist()  # fmt: skip
    return out[:-1] if out and out[-1] in handle.end_tokens else out


def with_ends(family="llama"):
    """A handle whose answers end at different lengths: tokens that it likes to give are made end tokens."""
    handle = handle_of(FAMILIES[family]())
    free = [generated(handle, ids) for ids in handle.prompt_ids(PROMPTS)]
    handle.model.generation_config.eos_token_id = [EOS, free[0][3], free[1][9], free[2][15]]
    del handle.__dict__["end_tokens"]
    return handle


@pytest.fixture(params=[True, False], ids=["slots", "batches"])
def in_slots(request, monkeypatch):
    """Both ways of decoding: in slots that are taken over, and batch after batch."""
    if not request.param:
        monkeypatch.setattr(slots, "takes_slots", lambda *_: False)
    return request.param


def rows_run(handle, monkeypatch):
    """A list that gets the number of rows of every forward pass over single tokens."""
    rows = []
    last_logits = type(handle).last_logits

    def counted(self, *args, **inputs):
        if inputs["input_ids"].shape[1] == 1:
            rows.append(len(inputs["input_ids"]))
        return last_logits(self, *args, **inputs)

    monkeypatch.setattr(type(handle), "last_logits", counted)
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_generate_in_every_family(family, in_slots):
    handle = handle_of(FAMILIES[family]())
    ids = handle.prompt_ids(PROMPTS[:4])
    answers = decode(handle, ids, max_new_tokens=12)
    assert [a.ids for a in answers] == [generated(handle, row, 12) for row in ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_plain_attention_decodes_in_slots(family):
    handle = handle_of(FAMILIES[family]())
    assert takes_slots(handle, 16)
    assert takes_slots(handle, 17) == (family not in ("gemma2", "gemma3_text"))  # their windows are 16 tokens


def test_answers_of_different_lengths_in_slots_within_a_window_are_those_of_generate():
    """Sliding layers see the whole row as long as the window does."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    handle = handle_of(tiny("gemma3_text", **sizes, num_key_value_heads=2, head_dim=8, sliding_window=128))
    ids = handle.prompt_ids(PROMPTS)
    assert max(map(len, ids)) + 12 <= 128 and takes_slots(handle, 128)
    answers = decode(handle, ids, max_new_tokens=12, batch_size=3)
    assert [a.ids for a in answers] == [generated(handle, row, 12) for row in ids]


def test_a_hybrid_model_is_decoded_in_batches():
    """Its convolutions keep a state that has no columns; rows still leave."""
    handle = handle_of(
        tiny(
            "lfm2", num_hidden_layers=3, hidden_size=32, intermediate_size=64, num_attention_heads=4,
            num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], max_position_embeddings=512,
        )
    )  # fmt: skip
    assert not takes_slots(handle, 32)
    ids = handle.prompt_ids(PROMPTS[:4])
    free = [generated(handle, row) for row in ids]
    handle.model.generation_config.eos_token_id = [EOS, free[0][3], free[1][9]]
    del handle.__dict__["end_tokens"]
    expected = [generated(handle, row) for row in ids]
    assert min(map(len, expected)) < TOKENS
    assert [a.ids for a in decode(handle, ids, max_new_tokens=TOKENS)] == expected


def test_a_model_whose_cache_is_not_what_it_seems_is_decoded_in_batches():
    """The trial run decides: here a layer adds what depends on the width of the cache it is handed."""
    handle = handle_of(tiny_llama())
    decoder = handle.decoder
    plain = type(decoder).forward

    def skewed(self, *args, cache=None, **kwargs):
        output = plain(self, *args, cache=cache, **kwargs)
        if isinstance(cache, slots.Slots):
            output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    decoder.forward = skewed.__get__(decoder)
    assert not takes_slots(handle, 32)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_rows_that_end_leave_and_the_others_go_on_as_if_alone(monkeypatch, share, batch_size, in_slots):
    handle = with_ends()
    if not share:
        monkeypatch.setattr(batches, "continues_from_cache", lambda _: False)
    ids = handle.prompt_ids(PROMPTS)
    expected = [generated(handle, row) for row in ids]
    assert len({len(e) for e in expected}) >= 3  # they do end at different lengths
    answers = decode(handle, ids, max_new_tokens=TOKENS, batch_size=batch_size)
    assert [a.ids for a in answers] == expected
    for answer, tokens in zip(answers, expected, strict=True):
        assert answer.finished == (len(tokens) < TOKENS)
        assert (answer.end in handle.end_tokens) if answer.finished else answer.end is None
        assert not answer.stopped
        assert answer.text == handle.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


def test_finished_rows_cost_nothing(monkeypatch):
    handle = with_ends()
    ids = handle.prompt_ids(PROMPTS)
    lengths = [len(generated(handle, row)) for row in ids]
    takes_slots(handle, 1)
    rows = rows_run(handle, monkeypatch)
    decode(handle, ids, max_new_tokens=TOKENS)
    # the first tokens come from the prompts' own run
    alive = [sum(length >= i and i < TOKENS for length in lengths) for i in range(1, max(lengths) + 1)]
    assert rows == [count for count in alive if count]


def test_rows_in_progress_and_prompts_in_a_pass_are_bounded(monkeypatch):
    handle = with_ends()
    ids = handle.prompt_ids(PROMPTS * 4)
    takes_slots(handle, 1)
    expected = [a.ids for a in decode(handle, ids, max_new_tokens=TOKENS)]
    longest = max(map(len, ids)) + TOKENS
    monkeypatch.setattr(slots, "SLOTS_BYTES", 5.5 * longest * slots.token_bytes(handle))
    monkeypatch.setattr(importlib.import_module("abliterate.measure.decode"), "PREFILL_TOKENS", 2 * longest)
    rows = rows_run(handle, monkeypatch)
    assert [a.ids for a in decode(handle, ids, max_new_tokens=TOKENS)] == expected
    assert max(rows) == 5


def test_waiting_prompts_take_the_places_of_finished_ones(monkeypatch):
    handle = with_ends()
    ids = handle.prompt_ids(PROMPTS * 4)
    takes_slots(handle, 1)
    rows = rows_run(handle, monkeypatch)
    lengths = [len(a.ids) for a in decode(handle, ids, max_new_tokens=TOKENS, batch_size=8)]
    assert REFILL * 8 == 1  # every place is filled at once, so the batch is full until none waits
    steps = sum(min(length, TOKENS - 1) for length in lengths)
    full = rows[: rows.index(next(count for count in rows if count < 8))]
    assert sum(rows) == steps
    assert len(full) * 8 > 0.6 * steps


def test_no_answer_is_longer_than_asked_for(tiny_handle):
    ids = tiny_handle.prompt_ids(PROMPTS)
    whole = decode(tiny_handle, ids, max_new_tokens=9)
    for tokens in (1, 5):
        short = decode(tiny_handle, ids, max_new_tokens=tokens)
        assert [a.ids for a in short] == [a.ids[:tokens] for a in whole]


def test_a_settled_verdict_stops_its_own_answer_and_no_other(tiny_handle, in_slots):
    ids = tiny_handle.prompt_ids(PROMPTS)
    whole = decode(tiny_handle, ids, max_new_tokens=TOKENS)
    seen = []

    def settled(index, text):
        seen.append((index, text))
        return index in (1, 4)

    answers = decode(tiny_handle, ids, max_new_tokens=TOKENS, settled=settled)
    for index, (answer, other) in enumerate(zip(answers, whole, strict=True)):
        assert answer.stopped == (index in (1, 4))
        assert not answer.finished
        assert answer.ids == (other.ids[:CHECK_EVERY] if index in (1, 4) else other.ids)
    for index, text in seen:
        assert whole[index].text.startswith(text)  # each verdict is asked of its own prompt's answer
    assert {index for index, _ in seen} == set(range(len(PROMPTS)))


def test_answers_come_in_the_prompts_order_and_are_counted(tiny_handle, in_slots):
    done = []
    ids = tiny_handle.prompt_ids(PROMPTS)
    answers = decode(tiny_handle, ids, max_new_tokens=6, batch_size=2, tick=done.append)
    assert sum(done) == len(PROMPTS)
    back = decode(tiny_handle, ids[::-1], max_new_tokens=6, batch_size=2)
    assert [a.ids for a in back[::-1]] == [a.ids for a in answers]


def test_special_tokens_are_left_out_of_the_text_unless_kept(tiny_handle):
    tiny_handle.end_tokens  # noqa: B018 (known before the head is changed)
    head = tiny_handle.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(1e4 * torch.eye(400)[1], requires_grad=False)  # <|im_start|>, whatever the prompt
    ids = tiny_handle.prompt_ids(["Hi"])
    assert decode(tiny_handle, ids, max_new_tokens=3)[0].text == ""
    assert decode(tiny_handle, ids, max_new_tokens=3, keep_special=True)[0].text == "<|im_start|>" * 3


def test_an_attached_edit_also_changes_the_shared_prefix(in_slots):
    handle = handle_of(tiny_llama())
    edit = Edit.uniform(find_writers(handle), torch.randn(32))
    ids = handle.prompt_ids(PROMPTS)
    before = decode(handle, ids, max_new_tokens=8)
    with edit.attached(handle):
        live = decode(handle, ids, max_new_tokens=8)
        assert [a.ids for a in live] == [generated(handle, row, 8) for row in ids]
    assert [a.ids for a in live] != [a.ids for a in before]
    assert [a.ids for a in decode(handle, ids, max_new_tokens=8)] == [a.ids for a in before]


def test_no_prompts_give_no_answers(tiny_handle):
    assert decode(tiny_handle, []) == []
