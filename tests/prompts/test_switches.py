"""Templates of reasoning models: closed as their own switch does it, and the same on every day."""

import datetime

import pytest
import transformers.utils.chat_template_utils as of_transformers

from abliterate.prompts.chat import CHATML, conversations, fixed, format_prompts, render
from abliterate.prompts.switches import switched_off
from models import tiny_tokenizer

TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
HEAD = TURNS + "<|im_start|>assistant\n"
NO = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
SEED = (
    "{% if thinking_budget is defined and thinking_budget == 0 %}You answer in one step.\n{% endif %}" + HEAD +
    "{% if thinking_budget is defined and thinking_budget == 0 %}<seed:think>\n</seed:think>{% endif %}"
)  # fmt: skip
SWITCHES = {
    "Qwen3.5": (HEAD + NO + "{% else %}<think>\n{% endif %}", {"enable_thinking": False}),
    "Qwen3": (HEAD + NO + "{% endif %}", {"enable_thinking": False}),
    "GLM-4.5": (HEAD.replace("<|im_end|>", "{{ '/nothink' if enable_thinking is false else '' }}<|im_end|>")
                + "{% if enable_thinking is false %}<think></think>\n{% endif %}", {"enable_thinking": False}),
    "Command A": (HEAD + "{% if reasoning is defined and not reasoning %}<|START_THINKING|><|END_THINKING|>{% else %}"
                  "<|START_THINKING|>{% endif %}", {"reasoning": False}),
    "DeepSeek V3.1": (HEAD + "{% if thinking is defined and not thinking %}</think>{% else %}<think>{% endif %}",
                      {"thinking": False}),
    "Gemma 4": (HEAD + "{% if not enable_thinking | default(true) %}<|channel>thought\n<channel|>{% endif %}",
                {"enable_thinking": False}),
    "Seed-OSS": (SEED, {"thinking_budget": 0}),
    "an effort of none": (HEAD + "{% if reasoning_effort == 'none' %}[THINK][/THINK]{% endif %}",
                          {"reasoning_effort": "none"}),
    "one that forbids it": (HEAD + "{% if skip_thinking %}<think></think>{% else %}<think>{% endif %}",
                            {"skip_thinking": True}),
    "another word": (HEAD + "{% if deliberate is defined and not deliberate %}<think></think>{% else %}<think>"
                     "{% endif %}",
                     {"deliberate": False}),
    "an object": (HEAD + "{% if thinking is defined and thinking.type == 'disabled' %}</think>{% else %}<think>"
                  "{% endif %}",
                  {"thinking": {"type": "disabled"}}),
}  # fmt: skip
NONE = {
    "no switch": HEAD + "<think>\n",
    "off already": HEAD + "{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}",
    "gpt-oss": "Reasoning: {{ reasoning_effort | default('medium') }}\n" + HEAD,
    "about earlier answers": HEAD + "{{ messages[0].reasoning_content if keep_thinking is defined else '' }}",
}


def off(template):
    tokenizer = tiny_tokenizer()
    chats = conversations(["hi", "how are you"], None)
    return switched_off(lambda switches: render(tokenizer, chats, template, None, switches), template)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_templates_own_switch_is_found_and_gives_what_it_gives(name):
    template, switches = SWITCHES[name]
    assert off(template)[0] == switches
    tokenizer = tiny_tokenizer()
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
        **switches,
    )
    assert off(template)[1][0] == own


@pytest.mark.parametrize("name", NONE)
def test_where_there_is_no_switch_none_is_found(name):
    assert off(NONE[name]) is None


class Later(datetime.datetime):
    """A day long after."""

    @classmethod
    def now(cls, tz=None):
        return cls(2031, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("{{ strftime_now('%d %B %Y, %A %H:%M') }}", "26 July 2024, Friday 12:00"),
        ("{%- set d = strftime_now('%Y-%m-%d') %}{{ 'Current date: ' + d + '\\n' }}", "Current date: 2024-07-26\n"),
        ("{%- if strftime_now is defined %}{{ strftime_now('%b %-d, %y') }}{% endif %}", "Jul 26, 24"),
        ("{%- macro today() %}{{ strftime_now('%F') }}{% endmacro %}{{ today() }}", "2024-07-26"),
        ("{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}",
         "26 Jul 2024"),
        ("  {% if true %}\n{{ strftime_now('%Y') }}\n  {% endif %}\n", "2024\n"),
    ],
)  # fmt: skip
def test_the_day_is_the_same_every_day(monkeypatch, template, written):
    tokenizer, texts = tiny_tokenizer(), ["hi"]
    ids = format_prompts(tokenizer, texts, chat_template=template + CHATML)
    monkeypatch.setattr(of_transformers, "datetime", Later)
    assert format_prompts(tokenizer, texts, chat_template=template + CHATML) == ids
    (chat,) = render(tokenizer, conversations(texts, None), template + CHATML, None)
    assert chat == written + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_without_a_date_is_left_as_it_is():
    assert fixed(CHATML) == CHATML
