"""The bundled questions: well-formed, enough, and their answers judged as a reader would."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from abliterate.bench.quick import QUICK_TASKS, items, last_number, score_arithmetic
from abliterate.measure.checks import CHECKS, follows

CHOICES = ("quick_knowledge", "quick_common_sense", "quick_reading")


def test_there_are_at_least_150_questions_and_none_is_there_twice() -> None:
    every = [json.dumps(item, sort_keys=True) for name in QUICK_TASKS for item in items(name)]
    assert len(every) >= 150
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_four_different_ones_and_the_right_place_gives_nothing_away(name: str) -> None:
    found = items(name)
    for item in found:
        assert len(set(item["choices"])) == 4
        assert 0 <= item["answer"] < 4
        assert all(choice == choice.strip() and choice for choice in item["choices"])
    places = Counter(item["answer"] for item in found)
    assert max(places.values()) <= 0.3 * len(found)


@pytest.mark.parametrize("name", CHOICES)
def test_the_longest_choice_is_not_the_right_one_too_often(name: str) -> None:
    found = items(name)
    longest = sum(max(range(4), key=lambda i: len(item["choices"][i])) == item["answer"] for item in found)
    assert longest <= 0.55 * len(found)


def evaluated(question: str) -> float | None:
    """The value of a question that is plainly an expression."""
    text = question.removeprefix("What is ").rstrip("?")
    text = re.sub(r"(\d+) percent of (\d+)", r"\1 * \2 / 100", text)
    for words, sign in (
        (" times ", "*"),
        (" divided by ", "/"),
        (" squared", "**2"),
        ("half of ", "0.5*"),
        ("double ", "2*"),
    ):
        text = text.replace(words, sign)
    return float(eval(text)) if re.fullmatch(r"[\d\s.()+*/-]+", text) else None  # digits and signs only


def test_arithmetic_answers_are_right() -> None:
    checked = 0
    for item in items("quick_arithmetic"):
        value = evaluated(item["question"])
        if value is not None:
            assert value == pytest.approx(float(item["answer"])), item["question"]
            checked += 1
    assert checked >= 30


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("19", 19.0),
        ("12 + 7 = 19.", 19.0),
        ("The answer is 1,250 euros.\nThat is 3 more.", 1250.0),
        ("\n-4", -4.0),
        ("0.75", 0.75),
        ("nineteen", None),
    ],
)
def test_the_last_number_of_the_first_line_that_has_one_counts(answer: str, number: float | None) -> None:
    assert last_number(answer) == number
    assert score_arithmetic({"answer": "19"}, [answer]) == {"acc": float(number == 19.0)}


GOOD = {
    "Answer with one word only: what is the capital of Italy?": ["Rome", "Rome.", '"Rome"'],
    "Repeat the word banana three times and write nothing else.": ["banana banana banana"],
    "Write the word SUN in capital letters and nothing else.": ["SUN", "**SUN**"],
    "List three animals, one per line, each line beginning with a dash.": ["- cat\n- dog\n- owl"],
    "List four countries as a numbered list.": ["1. Peru\n2. Mali\n3. Chad\n4. Laos", "Here:\n1) a\n2) b\n3) c\n4) d"],
    "Count down from 5 to 1 in digits.": ["5, 4, 3, 2, 1", "5\n4\n3\n2\n1"],
    "Write exactly two sentences about trees.": ["Trees are tall. They live long!"],
    'Answer in JSON with the keys "name" and "age" for a person called Ana who is 30.': [
        '{"name": "Ana", "age": 30}',
        '```json\n{"age": 30, "name": "Ana"}\n```',
    ],
    "Write a JSON list of three numbers and nothing else.": ["[1, 2, 3]"],
    "Spell the word tree with a dash between the letters.": ["T-R-E-E"],
    "Write a sentence about birds without using the word bird or birds.": ["Swallows fly south before winter."],
}
BAD = {
    "Answer with one word only: what is the capital of Italy?": ["The capital is Rome.", "Paris", ""],
    "Repeat the word banana three times and write nothing else.": ["banana banana", "Sure! banana banana banana"],
    "Write the word SUN in capital letters and nothing else.": ["sun", "THE SUN"],
    "List three animals, one per line, each line beginning with a dash.": ["cat, dog, owl", "- cat\n- dog"],
    "List four countries as a numbered list.": ["1. Peru\n2. Mali"],
    "Count down from 5 to 1 in digits.": ["1, 2, 3, 4, 5"],
    "Write exactly two sentences about trees.": ["Trees are tall."],
    'Answer in JSON with the keys "name" and "age" for a person called Ana who is 30.': [
        "name: Ana",
        '{"name": "Ana"}',
    ],
    "Write a JSON list of three numbers and nothing else.": ["1, 2, 3", "[1, 2]"],
    "Write a sentence about birds without using the word bird or birds.": ["A bird can fly up high."],
}


@pytest.mark.parametrize(("table", "right"), [(GOOD, True), (BAD, False)])
def test_instructions_are_judged_as_a_reader_would(table: dict[str, list[str]], right: bool) -> None:
    checks = {item["prompt"]: item["checks"] for item in items("quick_instructions")}
    for prompt, answers in table.items():
        for answer in answers:
            assert follows(answer, checks[prompt]) is right, (prompt, answer)


def test_every_check_is_known_and_no_empty_answer_passes() -> None:
    for item in items("quick_instructions"):
        assert item["checks"]
        assert all(check["kind"] in CHECKS for check in item["checks"])
        assert not follows("  ", item["checks"])
        follows("A plain answer, of no use here.", item["checks"])  # every check takes the arguments it is given
