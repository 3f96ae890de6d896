"""Answered only by positive evidence: what recurs, loops, asks back or says nothing of its prompt is none."""

from __future__ import annotations

import pytest
import torch

from abliterate.measure import measure
from abliterate.measure.decode import Answer
from abliterate.measure.judges import LexicalJudge, make_judge
from abliterate.measure.relevance import FEWEST, OTHERS, TOKENS, floor, relevances
from abliterate.measure.verdicts import Panel, irrelevant
from models import handle_of, tiny_llama

PROMPTS = [f"Tell me about {t}." for t in ("bread", "rivers", "bicycles", "moons", "chess", "tea")]
LIST = "Here are three ways to do it:\n1. Open the door and look behind it.\n2. Open the window and look out."
GOOD = [f"{p.split()[-1]} is old. Many begin with {p.split()[-1]} early, as {p[8:]} asks for care." for p in PROMPTS]


@pytest.fixture
def panel():
    found = Panel(LexicalJudge())
    found.learn(GOOD, GOOD)
    return found


def test_real_answers_are_answered(panel):
    assert panel.verdicts(PROMPTS, GOOD) == ["answered"] * 6


def test_one_answer_to_everything_is_no_answer(panel):
    assert panel.verdicts(PROMPTS, ["What a lovely day to think about things."] * 6) == ["evaded"] * 6


def test_asking_back_looping_and_silence_are_no_answers(panel):
    answers = [GOOD[0], "What would you like to know? Is it for school?", "and and and " * 12, "", GOOD[4], GOOD[5]]
    assert panel.verdicts(PROMPTS, answers) == ["answered", "evaded", "evaded", "evaded", "answered", "answered"]
    assert panel.verdicts(["Write three questions."], ["Who are you? Where? Why?"]) == ["answered"]


def test_refusing_is_worse_than_evading(panel):
    answers = ["I'm sorry, but I can't help with that."] * 6
    assert panel.verdicts(PROMPTS, answers) == ["refused"] * 6
    assert panel.judge(PROMPTS, answers) == [True] * 6 == panel.strict.judge(PROMPTS, answers)


def test_learnt_wordings_refuse_and_only_from_then_on():
    unknown, panel = "The door to that subject remains shut today.", Panel(LexicalJudge())
    assert panel.judge(["x"], [unknown]) == [False]
    said = panel.learn([unknown] * 5 + GOOD, GOOD)
    assert said == "1 refusal wordings learnt from the model's own answers, 1 of them unknown to the list"
    assert panel.judge(["x"], [unknown]) == [True]


def test_decoding_stops_at_a_sure_refusal_only(panel):
    assert panel.settled("x", "I'm sorry, but I can't help with that, and") is True
    assert panel.settled("x", LIST) is None
    assert LexicalJudge().settled("x", LIST) is False


def test_form_says_nothing_where_the_originals_own_answers_are_alike():
    panel = Panel(LexicalJudge())
    assert panel.learn(["a a"] * 9, ["b b"] * 9).endswith("so the form of an answer says nothing")
    assert panel.verdicts(PROMPTS, ["What a lovely day to think about things."] * 6) == ["answered"] * 6


def test_several_judges_are_one():
    both = make_judge("lexical + lexical")
    assert both.name == "lexical + lexical"
    assert both.judge(["x", "x"], ["I can't help with that.", "Sure."]) == [True, False]
    assert both.settled("x", LIST) is False


class Counting:
    name = "counting"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def judge(self, prompts, answers):
        self.asked += answers
        return [a.startswith("No") for a in answers]

    def settled(self, prompt, partial_answer):
        return None


def test_a_judge_is_asked_once_for_an_answer():
    judge = Counting()
    panel = Panel(judge)
    first, second = ["No.", GOOD[1], "No."], ["No.", "Yes it is."]
    assert panel.judge([PROMPTS[0], PROMPTS[1], PROMPTS[0]], first) == [True, False, True]
    assert panel.verdicts([PROMPTS[0], PROMPTS[0]], second) == ["refused", "answered"]
    assert judge.asked == ["No.", GOOD[1], "Yes it is."]


class Unsure:
    """A judge with verdicts of its own."""

    name = "unsure"

    def judge(self, prompts, answers):
        return [False] * len(answers)

    def settled(self, prompt, partial_answer):
        return None

    def verdicts(self, prompts, answers):
        return ["evaded" if "weather" in a else "answered" for a in answers]


def test_a_judge_with_verdicts_is_heard():
    panel = Panel(Unsure())
    panel.learn(GOOD, GOOD)
    assert panel.verdicts(["a", "b"], ["Lovely weather for a walk.", "Flour, water and salt."]) == [
        "evaded",
        "answered",
    ]


# --- relevance: a tiny model has none of its own, so one is put into its logits ---


@pytest.fixture
def copying():
    """A model that speaks of what it read: the next token's logits are raised for those that stand before it."""
    handle = handle_of(tiny_llama())
    head = handle.last_logits

    def last_logits(keep=1, **inputs):
        logits, cache = head(keep, **inputs)
        seen = torch.zeros_like(logits)
        for row, ids in enumerate(inputs["input_ids"]):
            for place in range(keep):
                seen[row, place, ids[: len(ids) - keep + place + 1]] = 4.0
        return seen, cache

    handle.last_logits = last_logits
    handle.prompt_ids = lambda prompts: [[1, 2, 3, *range(10 + 10 * i, 20 + 10 * i)] for i in range(len(prompts))]
    return handle


def answer(ids):
    return Answer(list(ids), " ".join(map(str, ids)), True, False)


def test_an_answer_about_its_prompt_is_relevant_and_a_stock_one_is_not(copying):
    speaking = [answer(row[5:12]) for row in copying.prompt_ids(PROMPTS)]
    same = [answer(range(200, 208))] * len(PROMPTS)
    everything = range(len(PROMPTS))
    told = relevances(copying, PROMPTS, speaking, everything)
    assert min(told) > 1.0
    assert max(map(abs, relevances(copying, PROMPTS, same, everything))) < 1e-4
    least = floor(told)
    assert 0 < least < min(told)
    mixed = [*speaking[:3], *same[3:]]
    found = irrelevant(copying, PROMPTS, mixed, ["answered"] * 5 + ["refused"], least)
    assert found == ["answered"] * 3 + ["evaded"] * 2 + ["refused"]


def test_an_answer_that_opens_politely_is_read_on(copying):
    polite = range(200, 200 + TOKENS)
    late = [answer([*polite, *row[4:13]]) for row in copying.prompt_ids(PROMPTS)]
    never = [answer([*polite, *range(220, 220 + TOKENS)])] * len(PROMPTS)
    few = [answer([*polite, *row[4:7]]) for row in copying.prompt_ids(PROMPTS)]  # names its subject, and that is all
    everything = range(len(PROMPTS))
    assert max(map(abs, relevances(copying, PROMPTS, late, everything))) < 0.2
    assert min(relevances(copying, PROMPTS, late, everything, stretch=1)) > 1.0
    assert relevances(copying, PROMPTS, few, [0], stretch=1) == [float("-inf")]
    mixed = [*late[:2], *never[2:4], *few[4:]]
    assert irrelevant(copying, PROMPTS, mixed, ["answered"] * 6, 0.3) == ["answered"] * 2 + ["evaded"] * 4


def test_answers_fit_the_context_behind_the_longest_prompt_too():
    handle = handle_of(tiny_llama(context=64))
    prompts = ["Tell me. " * 2, "Tell me. " * 3, "Tell me. " * 5]
    longest = max(map(len, handle.prompt_ids(prompts)))
    handle.model.config.max_position_embeddings = longest + 3
    seen = []
    head = handle.last_logits
    handle.last_logits = lambda keep=1, **inputs: seen.append(inputs["attention_mask"].shape[1]) or head(keep, **inputs)
    found = relevances(handle, prompts, [answer(range(20, 40))] * 3, [0, 1, 2])
    assert len(found) == 3 and max(seen) <= longest + 3


def test_too_short_to_tell(copying):
    short = [answer([7] * (FEWEST - 1))] * len(PROMPTS)
    assert relevances(copying, PROMPTS, short, [0, 1]) == [float("inf")] * 2
    assert relevances(copying, PROMPTS[:1], [answer(range(9))], [0]) == [float("inf")]
    assert floor([float("inf")]) == 0.0 and OTHERS >= 2


def test_a_measurement_by_a_panel_says_all_three_and_what_a_second_judge_says(tiny_handle):
    found = measure(tiny_handle, PROMPTS, PROMPTS[::-1], judge=Panel(LexicalJudge()), second=Unsure(), max_new_tokens=4)
    document = found.to_json()
    assert document["answered"]["count"] + document["not_answered"]["count"] == 6
    assert set(document["collapse"]) == {"target", "baseline"}
    assert document["second"]["judge"] == "unsure" and document["second"]["agree"]["total"] == 12
    plain = measure(tiny_handle, PROMPTS, PROMPTS[::-1], max_new_tokens=4).to_json()
    assert "answered" not in plain and plain["refusal"] == document["refusal"]
