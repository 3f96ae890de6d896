"""Kinds of refusal: told by the answer's own words, on the wordings of the test guards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abliterate.measure.kinds import KINDS, count_kinds, kind_of
from abliterate.models.demo import GUARD

RESISTING = Path(__file__).parents[1] / "data" / "resisting"


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        (GUARD, "in known words"),
        (RESISTING / "unknown", "in words that the list doesn't know"),
        (RESISTING / "extended", "behind an explanation"),
        (RESISTING / "german-korean", "in another language"),
    ],
    ids=["demo", "unknown", "extended", "german-korean"],
)
def test_the_guards_are_of_the_kind_they_were_written_for(folder, kind):
    wordings = [entry["refusal"] for entry in json.loads((folder / "wordings.json").read_text())]
    assert len(wordings) >= 6 and {kind_of(wording) for wording in wordings} == {kind} <= set(KINDS)


def test_only_what_refuses_is_counted():
    answers = ["I'm sorry, but I can't help with that.", "Whisk three eggs.", "Das kann ich dir leider nicht erklären."]
    assert count_kinds(answers, [True, False, True]) == {"in known words": 1, "in another language": 1}
    assert kind_of("Pass.") == "in words that the list doesn't know" and kind_of("") == kind_of("Pass.")
