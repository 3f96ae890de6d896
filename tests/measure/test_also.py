"""Further sets of a model with a planted refusal: counted apart, compared with the given set."""

from __future__ import annotations

import pytest

from abliterate.measure import also
from abliterate.measure.also import FurtherVerdicts, also_json, verdicts_on, weigh
from abliterate.measure.document import RunDocument
from abliterate.measure.measurement import measure
from abliterate.measure.verdicts import Panel
from abliterate.prompts.further import Further
from abliterate.prompts.sets import PromptSet
from planted import BASELINE, TARGET, RefusesWithR, planted


@pytest.fixture(scope="module")
def found():
    handle = planted()
    sets = [
        Further("target", PromptSet("others", ("tell of Q", "Queens", "tell of mice", "a tale"))),
        Further("baseline", PromptSet("safe", ("of Quiet things", "of stones"))),
    ]
    given = measure(handle, TARGET, BASELINE, judge=RefusesWithR(), max_new_tokens=2)
    said = verdicts_on(handle, sets, RefusesWithR(), max_new_tokens=2)
    edited = [FurtherVerdicts([], [False] * 4), FurtherVerdicts([], [False] * 2)]
    told = also_json(sets, {"original": said, "edited": edited}, {"original": given, "edited": given})
    return [one.refused for one in said], told


def test_each_set_is_counted_apart(found):
    shown, (others, safe) = found
    assert shown == [[True, True, False, False], [True, False]]
    assert (others["original"]["refusal"]["refused"], others["original"]["refusal"]["total"]) == (2, 4)
    assert (safe["original"]["refusal"]["refused"], safe["edited"]["refusal"]["refused"]) == (1, 0)
    assert others["paired"] == {"only_original": 2, "only_edited": 0, "p": 0.5}


def test_a_set_is_compared_with_the_given_one_of_its_side(found):
    _, (others, safe) = found
    assert others["original"]["gap"]["difference"] == -0.5  # of 8 given all are refused
    assert safe["original"]["gap"]["difference"] == 0.5
    typed = RunDocument.model_validate({"also": [others, safe]})
    assert typed.to_json() == {"also": [others, safe]}


def test_a_panel_says_what_is_not_answered(monkeypatch):
    handle, panel = planted(), Panel(RefusesWithR())
    one = Further("target", PromptSet("others", (*TARGET[:4], *BASELINE[:4])))
    given = measure(handle, TARGET, BASELINE, judge=panel, max_new_tokens=2)
    (said,) = verdicts_on(handle, [one], panel, max_new_tokens=2)
    assert said.verdicts is not None and said.refused == [True] * 4 + [False] * 4
    said.verdicts = ["refused"] * 4 + ["answered"] * 4
    weigh(handle, one, said, 0.5)  # answers of one letter are too short to tell
    assert said.missing == said.refused
    monkeypatch.setattr(also, "irrelevant", lambda *args: ["refused"] * 4 + ["evaded"] * (4 if args[-1] == 0.5 else 0))
    weigh(handle, one, said, 0.5)
    (told,) = also_json([one], {"original": [said]}, {"original": given})
    assert told["original"]["refusal"]["refused"] == 4 and told["original"]["not_answered"]["count"] == 8
    missing = sum(verdict != "answered" for verdict in given.verdicts) / 8  # of the given set, counted alike
    assert told["original"]["gap"]["difference"] == 1 - missing
    assert RunDocument.model_validate({"also": [told]}).to_json() == {"also": [told]}


def test_a_judge_that_choosing_never_saw_is_asked_too():
    class Strict(RefusesWithR):
        name = "strict"

        def judge(self, prompts, answers):
            return [True] * len(answers)

    handle = planted()
    one = Further("target", PromptSet("others", ("tell of Q", "a tale")))
    given = measure(handle, TARGET, BASELINE, judge=RefusesWithR(), max_new_tokens=2)
    said = verdicts_on(handle, [one], RefusesWithR(), second=Strict(), max_new_tokens=2)
    (told,) = also_json([one], {"original": said}, {"original": given})
    assert told["original"]["refusal"]["refused"] == 1 and told["original"]["second"]["refused"] == 2
    assert RunDocument.model_validate({"also": [told]}).to_json() == {"also": [told]}
