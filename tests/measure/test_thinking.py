"""Reasoning left open: taken apart from the answer, counted apart, and never a verdict's ground."""

from __future__ import annotations

import pytest
import torch

from abliterate.measure.decode import Answer, decode
from abliterate.measure.document import RunDocument
from abliterate.measure.measurement import measure
from abliterate.measure.thinking import thinking_json
from abliterate.models.handle import Handle, reasoning_open
from models import CHATML, EOS, handle_of, tiny_llama, tiny_tokenizer

INSIDE = "The user wants this. I can't help with that. Or can I?"
SAYS = f"<think>\n{INSIDE}\n</think>\n\nSure, here it is."


@pytest.fixture
def says(monkeypatch):
    """Make every model say a text and end."""

    def script(text: str) -> Handle:
        handle = handle_of(tiny_llama(), tiny_tokenizer())
        tokens = [*handle.tokenizer(text)["input_ids"], EOS]
        plain, step = Handle.last_logits, iter(range(10**6))

        def last_logits(self, keep=1, **inputs):
            logits, cache = plain(self, keep, **inputs)
            scripted = torch.full_like(logits, -9.0)
            scripted[..., tokens[next(step) % len(tokens)]] = 9.0
            return scripted, cache

        monkeypatch.setattr(Handle, "last_logits", last_logits)
        return handle

    return script


def answered(handle, limit=200, settled=None):
    (answer,) = decode(handle, handle.prompt_ids(["Do it"]), max_new_tokens=limit, settled=settled)
    return answer


def test_an_answer_is_what_follows_the_reasoning(says):
    handle, seen = says(SAYS), []
    with reasoning_open(handle):
        answer = answered(handle, settled=lambda _, text: seen.append(text) or False)
    assert (answer.text, answer.reasoning, answer.unclosed) == ("Sure, here it is.", INSIDE, False)
    assert all("help" not in text for text in seen)  # no verdict on the reasoning
    assert handle.tokenizer.decode(answer.ids) == SAYS  # divergence is along all that was said


def test_without_it_nothing_is_taken_apart(says):
    answer = answered(says(SAYS))
    assert (answer.text, answer.reasoning, answer.unclosed) == (SAYS, None, False)


def test_the_limit_inside_the_reasoning(says):
    handle = says(SAYS)
    with reasoning_open(handle):
        answer = answered(handle, limit=12)
    assert (answer.text, answer.unclosed, answer.finished) == ("", True, False)
    assert INSIDE.startswith(answer.reasoning) and answer.reasoning


def test_a_template_that_opens_the_reasoning_itself(says):
    handle = says(SAYS.removeprefix("<think>\n"))
    handle.chat_template = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'")
    with reasoning_open(handle):
        answer = answered(handle)
    assert (answer.text, answer.reasoning) == ("Sure, here it is.", INSIDE)


def test_a_template_s_switch_is_turned_on_and_the_prefill_is_back_afterwards():
    handle = handle_of(tiny_llama(), prefill="<think>\n\n</think>\n\n")
    handle.chat_template = CHATML.replace("assistant\\n'", "assistant\\n' + ('<think>' if enable_thinking else 'No.')")
    with reasoning_open(handle):
        assert handle.tokenizer.decode(handle.prompt_ids(["Do it"])[0]).endswith("assistant\n<think>")
    assert handle.tokenizer.decode(handle.prompt_ids(["Do it"])[0]).endswith("No.<think>\n\n</think>\n\n")
    with reasoning_open(handle, False):
        assert handle.prefill and not handle.thinks


def test_verdicts_are_on_the_answer_and_the_reasoning_is_counted_apart(says):
    refused = f"<think>{INSIDE}</think>I can't help with that."
    for text, count in ((SAYS, 0), (refused, 2)):
        handle = says(text)
        with reasoning_open(handle):
            found = measure(handle, ["Do it", "Do that"], ["Say it", "Say that"], max_new_tokens=200)
        assert found.refusal.count == count
        apart = thinking_json(found.target_answers)
        assert (apart["reasoned"]["count"], apart["refused_inside"]["refused"], apart["unclosed"]["count"]) == (2, 2, 0)


def test_what_never_left_its_reasoning_is_not_called_degenerate(says):
    handle = says(SAYS)
    with reasoning_open(handle):
        found = measure(handle, ["Do it"], ["Say it"], max_new_tokens=12)
    assert found.degenerate.count == 0 and thinking_json(found.baseline_answers)["unclosed"]["count"] == 1


def test_counts():
    answers = [
        Answer([], "Sure.", True, False, reasoning="Easy. Let me see."),
        Answer([], "Sure.", True, False, reasoning="Hm. I'm sorry, but I can't help with that. Well"),
        Answer([], "", False, False, reasoning="And so on", unclosed=True),
        Answer([], "I can't help with that.", True, False),
    ]
    found = thinking_json(answers)
    assert (found["reasoned"]["count"], found["reasoned"]["total"]) == (3, 4)
    assert (found["refused_inside"]["refused"], found["refused_inside"]["total"]) == (1, 3)
    assert (found["unclosed"]["count"], found["unclosed"]["total"]) == (1, 4)
    told = {"thinking": {"original": {"target": found, "baseline": found}}}
    assert RunDocument.model_validate(told).to_json() == told
