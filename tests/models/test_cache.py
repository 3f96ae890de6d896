"""A cache goes in and comes back under the model's own name for it, or an error says so."""

from __future__ import annotations

import functools

import pytest

from abliterate.common.errors import ModelError
from abliterate.measure.decode import decode
from abliterate.models.cache import NAMES
from models import handle_of, tiny_llama

PROMPTS = ["How are you?", "What is rain?", "Tell me of the sea.", "Why do birds sing?"]


class Output:
    """What a decoder gives, with its cache under a name of its own."""

    def __init__(self, output, name):
        self.last_hidden_state = output.last_hidden_state
        if name:
            setattr(self, name, output.cache)


def knowing(name):
    """A handle whose decoder takes and gives its cache under `name` alone and swallows other names."""
    handle = handle_of(tiny_llama())
    plain = handle.decoder.forward

    def passed(**kwargs):
        cache = kwargs.pop(name, None)
        others = {key: value for key, value in kwargs.items() if key not in NAMES}
        return Output(plain(cache=cache, **others), name)

    if name == "cache":
        handle.decoder.forward = functools.wraps(plain)(lambda *_, **kwargs: passed(**kwargs))
    else:
        handle.decoder.forward = lambda *, past_key_values=None, position_ids=None, **kwargs: passed(
            past_key_values=past_key_values, position_ids=position_ids, **kwargs
        )
    vars(handle)["_plain_head"] = True
    return handle


def answers(handle):
    return [answer.ids for answer in decode(handle, handle.prompt_ids(PROMPTS), max_new_tokens=6)]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_answers_are_the_same_whatever_the_cache_is_called(name):
    assert answers(knowing(name)) == answers(handle_of(tiny_llama()))


def test_a_cache_that_was_asked_for_and_does_not_come_back_is_an_error():
    handle = handle_of(tiny_llama())
    plain = handle.decoder.forward
    handle.decoder.forward = functools.wraps(plain)(lambda **kwargs: Output(plain(**kwargs), None))
    vars(handle)["_plain_head"] = True
    with pytest.raises(ModelError, match="LlamaModel gives no cache back"):
        answers(handle)
