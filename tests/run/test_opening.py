"""How a job sees that a model reasons, and closes it."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest

from abliterate.common.errors import AbliterateError
from abliterate.measure.decode import Answer
from abliterate.models.handle import Handle
from abliterate.run.opening import set_prefill
from abliterate.settings.run import resolve
from heard import Heard
from models import CHATML, tiny_llama, tiny_tokenizer

opening = importlib.import_module("abliterate.run.opening")  # abliterate.run is the function, too
TEXTS = ["hi", "how are you", "why", "when"]
GLM = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{{ '/nothink' if enable_thinking is false else '' }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think></think>\n{% endif %}"
)


@pytest.fixture
def heard():
    return Heard()


def answering(monkeypatch, *texts, template=CHATML, **more):
    """A handle whose answers are these texts."""
    monkeypatch.setattr(opening, "decode", lambda *_a, **_k: [Answer([], text, False, False) for text in texts])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return replace(Handle(tiny_llama(), tokenizer, "tiny"), **more)


def test_a_known_mark_is_closed(monkeypatch, heard):
    handle = answering(monkeypatch, *["<seed:think>Well"] * 4)
    set_prefill(handle, TEXTS, heard)
    assert handle.prefill == "<seed:think>\n\n</seed:think>\n\n" and not handle.switches
    assert "reasoning mark; prefilling" in heard.lines[0]


def test_a_switch_that_only_adds_is_a_prefill(monkeypatch, heard):
    template = CHATML + "{% if enable_thinking is false %}<think></think>\n{% endif %}"
    handle = answering(monkeypatch, *["<think>\nWell"] * 4, template=template)
    set_prefill(handle, TEXTS, heard)
    assert handle.prefill == "<think></think>\n" and not handle.switches


def test_a_switch_that_changes_the_prompt_is_given_to_the_template(monkeypatch, heard):
    handle = answering(monkeypatch, *["<think>\nWell"] * 4, template=GLM)
    set_prefill(handle, TEXTS, heard)
    assert handle.prefill is None and handle.switches == {"enable_thinking": False}
    theirs = handle.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert handle.prompt_ids(["hi"])[0] == handle.tokenizer(theirs, add_special_tokens=False)["input_ids"]
    assert "switch is off (enable_thinking=False)" in heard.lines[0]
    handle.thinks = True
    assert handle.prompt_ids(["hi"])[0] != handle.tokenizer(theirs, add_special_tokens=False)["input_ids"]


def test_a_mark_that_answers_close_is_found_and_remembered(monkeypatch, heard):
    handle = answering(monkeypatch, *["<ponder>Hm </ponder>Well, yes."] * 4)
    set_prefill(handle, TEXTS, heard)
    assert handle.prefill == "<ponder>\n\n</ponder>\n\n" and [m.opening for m in handle.marks] == ["<ponder>"]


@pytest.mark.parametrize("start", ["<ponder>Hm", "Okay, the user"])
def test_a_like_opening_that_is_not_closed_is_warned_of(monkeypatch, heard, start):
    handle = answering(monkeypatch, *[f"{start} {n}" for n in range(4)])
    set_prefill(handle, TEXTS, heard)
    assert handle.prefill is None
    assert len(heard.lines) == 1 and start.split(">")[0] in heard.lines[0] and "--reasoning-marks" in heard.lines[0]


@pytest.mark.parametrize("texts", [["I'm sorry, but I can't help with that."] * 4, ["Yes, a", "No, b", "So c", "d"]])
def test_refusals_and_unlike_openings_are_not(monkeypatch, heard, texts):
    handle = answering(monkeypatch, *texts)
    set_prefill(handle, TEXTS, heard)
    assert handle.prefill is None and heard.lines == []


def test_marks_are_settings_and_checked():
    settings = resolve({"load.reasoning_marks": "<a> </a>\n<b> </b>"}, environment={})
    assert settings.load.reasoning_marks == "<a> </a>\n<b> </b>"
    with pytest.raises(AbliterateError, match="two marks, what opens and what closes"):
        resolve({"load.reasoning_marks": "<a>"}, environment={})
