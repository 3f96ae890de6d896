"""What is said of verdicts and judges, and that a judge who disagrees is heard."""

from __future__ import annotations

from abliterate.cards.tables import results
from abliterate.cards.verdicts import verdicts
from abliterate.measure.document import RunDocument
from abliterate.measure.rates import Rate


def measured(refused, evaded, second):
    answered = 100 - refused - evaded
    differ = [{"side": "target", "index": i, "panel": "answered", "judge": "refused"} for i in range(second - refused)]
    return {
        "refusal": Rate(refused, 100).to_json("refused"),
        "over_refusal": Rate(1, 100).to_json("refused"),
        "answered": Rate(answered, 100).to_json(),
        "evaded": Rate(evaded, 100).to_json(),
        "not_answered": Rate(refused + evaded, 100).to_json(),
        "collapse": {"target": 0.5, "baseline": 0.0},
        "second": {
            "judge": "trained",
            "refusal": Rate(second, 100).to_json("refused"),
            "over_refusal": Rate(1, 100).to_json("refused"),
            "not_answered": Rate(second, 100).to_json(),
            "agree": Rate(200 - len(differ), 200).to_json(),
            "disagreements": differ,
        },
    }


def document(edited):
    prompts = {"wordings": {"learnt": 14, "unknown": 5}}
    return RunDocument.model_validate({"original": measured(70, 0, 78), "edited": edited, "prompts": prompts})


def test_a_judge_that_sees_refusals_where_the_choosing_one_sees_none_is_heard():
    said = " ".join(verdicts(document(measured(1, 0, 81))))
    assert "counts 81 of 100" in said and "agree on 120 of 200 answers" in said
    assert "14 refusal wordings learnt from the original's own answers, 5 of them unknown" in said
    assert "more than the 1 counted by the judge that chose" in said and "Trust the larger number" in said


def test_judges_who_agree_say_so_and_evasions_are_counted():
    said = " ".join(verdicts(document(measured(1, 30, 1))))
    assert "the edited model: 69 answered, 1 refused, 30 evaded" in said
    assert "agree on 200 of 200" in said and said.count("Trust the larger number") == 0


def test_the_closing_table_has_them_all():
    rows = {row[0]: row[2] for row in results(document(measured(1, 30, 2))).rows}
    assert rows["not answered (refused or evaded)"].startswith("31 of 100")
    assert rows["refusals by a second judge (trained)"].startswith("2 of 100")
    assert rows["answers on which the judges agree"].startswith("199 of 200")


def test_a_document_without_verdicts_says_nothing_of_them():
    plain = {"refusal": Rate(3, 9).to_json("refused")}
    assert verdicts(RunDocument.model_validate({"original": plain})) == []
