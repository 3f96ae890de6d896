"""The marks that reasoning stands between: found, read and closed."""

import pytest

from abliterate.prompts.reasoning import (
    Marks,
    after_reasoning,
    block_at,
    closed_at_end,
    common_opening,
    find_prefill,
    looked_for,
    marks_of,
    mirrored,
    open_at_end,
    opening_tag,
)

# what opens, what closes it at once, as the model's template writes it where it has a switch
KNOWN = {
    "<think>": "<think>\n\n</think>\n\n",
    "<thinking>": "<thinking>\n\n</thinking>\n\n",
    "<thought>": "<thought>\n\n</thought>\n\n",
    "<seed:think>": "<seed:think>\n\n</seed:think>\n\n",
    "<longcat_think>": "<longcat_think>\n\n</longcat_think>\n\n",
    "<chain_of_thought>": "<chain_of_thought>\n\n</chain_of_thought>\n\n",
    "◁think▷": "◁think▷\n\n◁/think▷\n\n",
    "[THINK]": "[THINK][/THINK]",
    "<|START_THINKING|>": "<|START_THINKING|><|END_THINKING|>",
    "<|inner_prefix|>": "<|inner_prefix|><|inner_suffix|>",
    "<|channel>thought": "<|channel>thought\n<channel|>",
    "<unused94>thought": "<unused94>thought\n<unused95>",
    "<|begin_of_thought|>": "<|begin_of_thought|>\n\n<|end_of_thought|>\n\n",
    "<|channel|>analysis": "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>",
    "<|channel|>analysis<|message|>": (
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"
    ),
}


@pytest.mark.parametrize("mark", KNOWN)
def test_known_marks_are_closed_whoever_opens_them(mark):
    closed = KNOWN[mark]
    assert find_prefill([f"{mark}\nHm, well", f"\n {mark} so"], ["hi", "ho"]) == closed
    prompts = [f"{mark} is a word; {role}<|assistant|>{mark}" for role in ("a", "b")]
    assert prompts[0] + find_prefill(["Hm"], prompts) == prompts[0].removesuffix(mark) + closed
    assert closed_at_end("assistant\n" + closed) and not closed_at_end("assistant\n" + mark)


def test_white_space_that_the_template_wrote_is_not_written_twice():
    for tail, rest in (("", "\n\n</think>\n\n"), ("\n", "\n</think>\n\n"), ("\n\n", "</think>\n\n")):
        assert find_prefill(["Well"], [f"assistant\n<think>{tail}"]) == rest


@pytest.mark.parametrize(
    "answers", [["<think>\nWell", "Well"], ["Well", "Well"], ["<answer>a", "<answer>b"], ["<|end_of_thought|>"] * 2, []]
)
def test_other_openings_are_left_alone(answers):
    assert find_prefill(answers, ["hi"] * len(answers)) is None
    assert open_at_end("the tag <think> is one; assistant\n") is None


def test_a_block_ends_with_its_own_mark():
    for text in ("<seed:think>a </think>", "<think>a </Think>", "<|inner_prefix|>a<|inner_suffix|>"):
        block = block_at(f" \u200b{text}")
        found = block.marks.ends.search(text)
        assert (found is not None) and text[found.start() :] in ("</think>", "</Think>", "<|inner_suffix|>")


def test_settings_add_marks():
    more = marks_of("<ponder> </ponder>\n\nHmm: So:")
    assert more == (Marks("<ponder>", "</ponder>"), Marks("Hmm:", "So:"))
    assert marks_of(None) == ()
    assert find_prefill(["Hmm: a", "Hmm: b"], ["x", "y"], more) == "Hmm:\n\nSo:\n\n"
    assert find_prefill(["a"], ["assistant <ponder>"], more) == "\n\n</ponder>\n\n"


def test_marks_are_found_by_looking():
    assert opening_tag(["<ponder>a", " <ponder> b"]) == "<ponder>" and opening_tag(["<ponder>a", "b"]) is None
    split = "{% set content = content.split('</ponder>')[-1] %}"
    assert looked_for("<ponder>", (), split) == mirrored("<ponder>") == Marks("<ponder>", "</ponder>")
    assert looked_for("<|in|>", (), "{{ x.split('<|out|>')[-1] }}") == Marks("<|in|>", "<|out|>")
    long = [f"<ponder>x {n} <b>y</b> </ponder>\n\nThe answer." for n in range(3)]
    assert looked_for("<ponder>", [*long, "<ponder>still"], "") == Marks("<ponder>", "</ponder>")


def test_tags_around_an_answer_are_no_reasoning():
    assert looked_for("<answer>", ["<answer>Yes.</answer>"] * 4, "") is None
    assert looked_for("<answer>", ["<answer>Yes."] * 4, "{{ x.split('</think>')[-1] }}") is None
    assert looked_for("<answer>", ["<answer>Yes."] * 4, "") is None


def test_what_all_answers_open_with():
    assert common_opening(["Okay, the user asks", "Okay, the user wants"]) == "Okay, the user"
    assert common_opening(["a b", "a b"]) == "a b" and common_opening(["a", "b"]) == ""
    assert common_opening(["a"]) == "" and common_opening([]) == "" and common_opening(["", "a"]) == ""


@pytest.mark.parametrize(
    "reply",
    [
        "<think>was it refused?</think> answered", "so: [THINK]refused?[/THINK]answered",
        "<|channel|>analysis<|message|>refused?<|end|><|start|>assistant<|channel|>final<|message|>answered",
        "◁think▷refused?◁/think▷answered", "answered <think>or refused", "answered <|channel|>analysis<|message|>or",
    ],
)  # fmt: skip
def test_what_a_reply_says_besides_its_reasoning(reply):
    assert after_reasoning(reply) == "answered"
