"""Conversations: what is streamed is what greedy decoding gives, at every strength, with nothing read twice."""

from __future__ import annotations

import json

import pytest
import torch

from abliterate.apply import hooks
from abliterate.common.errors import AbliterateError
from abliterate.edit.edit import Edit
from abliterate.measure.decode import decode
from abliterate.models.writers import find_writers
from abliterate.studio.conversation import Conversation, Sampling, _drawn
from models import FAMILIES, handle_of, tiny_llama


@pytest.fixture
def handle():
    return handle_of(tiny_llama())


def an_edit(handle):
    return Edit.uniform(find_writers(handle), torch.randn(handle.d_model, generator=torch.Generator().manual_seed(3)))


def greedy(handle, ids, tokens=12):
    return decode(handle, [ids], max_new_tokens=tokens)[0].text.rstrip("�")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_an_answer_is_the_greedy_one(family):
    handle = handle_of(FAMILIES[family]())
    talk = Conversation(handle, sampling=Sampling(max_new_tokens=12))
    pieces = []
    said = talk.reply("Tell me about boats", pieces.append)
    assert said == "".join(pieces) == greedy(handle, handle.prompt_ids(["Tell me about boats"])[0])
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]


def test_further_turns_read_only_what_is_new(handle, monkeypatch):
    talk = Conversation(handle, sampling=Sampling(max_new_tokens=6))
    talk.reply("Tell me about boats")
    read = []
    whole = handle.last_logits
    monkeypatch.setattr(
        type(handle), "last_logits", lambda self, **k: (read.append(k["input_ids"].shape[1]), whole(**k))[1]
    )
    second = talk.reply("And the sea?")
    assert read[0] < 60 and read[1:] == [1] * (len(read) - 1)
    fresh = Conversation(handle, sampling=Sampling(max_new_tokens=6), messages=talk.messages[:2])
    assert fresh.reply("And the sea?") == second


def test_strength_scales_the_edit_and_zero_is_the_original(handle):
    edit = an_edit(handle)
    talk = Conversation(handle, edit, 1.0, Sampling(max_new_tokens=12))
    original, edited = talk.compare("Tell me about boats")
    assert talk.messages == []
    ids = handle.prompt_ids(["Tell me about boats"])[0]
    assert original == greedy(handle, ids)
    with edit.attached(handle):
        assert edited == greedy(handle, ids)
    assert original != edited
    talk.strength = 0.0
    assert talk.reply("Tell me about boats") == original
    talk.messages.clear()
    talk.strength = 1.0
    assert talk.reply("Tell me about boats") == edited  # nothing of the other strength's cache is used


def test_an_edit_is_made_ready_once_for_each_answer(handle, monkeypatch):
    made = []
    factors = hooks.weight_factors
    monkeypatch.setattr(hooks, "weight_factors", lambda *given: (made.append(1), factors(*given))[1])
    talk = Conversation(handle, an_edit(handle), 1.0, Sampling(max_new_tokens=6))
    talk.reply("Tell me about boats")
    assert len(made) == 1
    talk.reply("And the sea?")
    assert len(made) == 2
    talk.compare("Tell me about boats")  # the original needs none
    assert len(made) == 3
    assert not any(module._forward_hooks for module in handle.model.modules())


def test_two_conversations_dont_mix_strengths(handle):
    edit = an_edit(handle)
    one, two = (Conversation(handle, edit, s, Sampling(max_new_tokens=8)) for s in (1.0, 0.0))
    alone = [c.compare("Old maps")[1] for c in (one, two)]
    mixed: dict[int, str] = {0: "", 1: ""}
    streams = [c.stream([{"role": "user", "content": "Old maps"}]) for c in (one, two)]
    for _ in range(8):
        for i, stream in enumerate(streams):
            mixed[i] += next(stream, "")
    assert [mixed[0], mixed[1]] == alone


def test_an_interrupted_answer_is_remembered_and_can_go_on(handle):
    talk = Conversation(handle, sampling=Sampling(max_new_tokens=12))

    def stop(_piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.reply("Tell me about boats", stop)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert talk.reply("Go on")


def test_drawing_is_seeded_and_respects_top_p():
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    sampling = Sampling(temperature=1.0, top_p=0.5)
    assert {_drawn(logits, sampling, torch.Generator().manual_seed(s)) for s in range(30)} == {1}
    wide = Sampling(temperature=2.0)
    draws = [_drawn(logits, wide, torch.Generator().manual_seed(s)) for s in range(60)]
    assert len(set(draws)) > 2
    assert draws == [_drawn(logits, wide, torch.Generator().manual_seed(s)) for s in range(60)]


def test_saved_turns_and_bad_strengths(handle, tmp_path):
    talk = Conversation(handle, an_edit(handle), 0.5, Sampling(max_new_tokens=4))
    talk.system("Be brief.")
    talk.reply("Hello")
    talk.save(tmp_path / "talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["strength"] == 0.5
    with pytest.raises(AbliterateError, match="not a number"):
        talk.check_strength("half")
    with pytest.raises(AbliterateError, match="no edit"):
        Conversation(handle).check_strength("1")
