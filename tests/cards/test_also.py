"""What is said of further sets."""

from __future__ import annotations

from abliterate.cards.also import also_notes, also_rows
from abliterate.cards.tables import results
from abliterate.measure.differences import gap
from abliterate.measure.document import RunDocument
from abliterate.measure.rates import Rate


def document(given: Rate, other: Rate, safe: tuple[Rate, Rate], p: float = 1.0) -> RunDocument:
    def numbers(rate: Rate, main: Rate) -> dict:
        return {"refusal": rate.to_json("refused"), "gap": gap(main, rate)}

    state = {"refusal": given.to_json("refused"), "over_refusal": Rate(0, 200).to_json("refused")}
    changed = {"only_original": safe[0].count, "only_edited": safe[1].count, "p": p}
    return RunDocument.model_validate({
        "original": state, "edited": state,
        "also": [
            {"source": "/home/fox/secret/own.txt", "side": "target", "prompts": other.total, "sha256": "",
             "original": numbers(other, given), "edited": numbers(other, given)},
            {"source": "bundled-xstest", "side": "baseline", "prompts": safe[0].total, "sha256": "",
             "original": numbers(safe[0], given), "edited": numbers(safe[1], given), "paired": changed},
        ],
    })  # fmt: skip


def test_rows_for_every_table():
    found = document(Rate(2, 200), Rate(3, 100), (Rate(9, 100), Rate(7, 100)))
    rows = also_rows(found)
    assert [row[0] for row in rows] == ["refusals, own.txt", "over-refusals, XSTest's safe prompts"]
    assert rows[1][1].startswith("9 of 100") and rows[1][2].startswith("7 of 100")
    assert results(found).rows[-2:] == rows
    assert also_notes(found) == []


def test_a_large_gap_is_said_in_words():
    (note,) = also_notes(document(Rate(2, 200), Rate(14, 100), (Rate(9, 100), Rate(7, 100))))
    assert note.startswith("Large gap: 14 of 100 refused of own.txt, 2 of 200 of the given target prompts, ")
    assert "holds less for prompts of other origin" in note and "more" in note
    (note,) = also_notes(document(Rate(100, 200), Rate(14, 100), (Rate(9, 100), Rate(7, 100))))
    assert "fewer" in note and "holds less" not in note


def test_a_change_of_over_refusals_is_said_with_its_test():
    (note,) = also_notes(document(Rate(2, 200), Rate(3, 100), (Rate(0, 100), Rate(12, 100)), p=0.0005))
    assert "more are refused than before" in note and "p = 0.0005" in note


def test_instructions_are_in_every_table_and_their_change_in_words():
    state = {"refusal": Rate(2, 200).to_json("refused"), "over_refusal": Rate(0, 200).to_json("refused")}
    told = {"prompts": 48, "role": "system", "original": Rate(40, 48).to_json(), "edited": Rate(25, 48).to_json(),
            "paired": {"only_original": 16, "only_edited": 1, "p": 0.0003}, "kinds": {}}  # fmt: skip
    found = RunDocument.model_validate({"original": state, "edited": state, "obligations": told})
    assert results(found).rows[-1][:2] == ["instructions obeyed", "40 of 48 = 83.3% (70.4% to 91.3%)"]
    assert also_notes(found)[0].startswith(
        "Instructions: fewer are obeyed than before: 16 only by the original, 1 only"
    )


def test_what_is_not_answered_is_said_where_it_is_known():
    found = document(Rate(2, 200), Rate(3, 100), (Rate(9, 100), Rate(7, 100))).to_json()
    missing = Rate(20, 100)
    found["original"] |= {"not_answered": Rate(4, 200).to_json()}
    found["edited"] |= {"not_answered": Rate(4, 200).to_json()}
    for state in ("original", "edited"):
        found["also"][0][state] |= {"not_answered": missing.to_json(), "gap": gap(Rate(4, 200), missing)}
    told = RunDocument.model_validate(found)
    assert [row[0] for row in also_rows(told)][:2] == ["refusals, own.txt", "not answered, own.txt"]
    assert also_notes(told)[0].startswith("Large gap: 20 of 100 not answered of own.txt, 4 of 200 of the given target")
