"""What card, report and terminal say of an edit: how it was found, of how many directions, and what is left of each."""

from __future__ import annotations

import pytest

from abliterate.cards.card import model_card
from abliterate.cards.edit import directions, said
from abliterate.measure.document import RunDocument
from abliterate.measure.rates import Rate


def removed(strength: tuple[float, float], left: float, expected: float, layers: list[int]) -> dict:
    return {
        "writers": 2 * len(layers), "layers": layers, "sides": ["attention", "mlp"],
        "strength": {"min": strength[0], "max": strength[1]}, "before": 0.31, "left": left, "expected": expected,
        "where": "block 9, mid (attention writes it)",
    }  # fmt: skip


def document(method: str, taken: list[dict], **more) -> RunDocument:
    split = {"count": 8, "sha256": "0" * 64}
    side = {"source": "bundled", "train": split, "validation": split, "test": split}
    measured = {"refusal": Rate(1, 10).to_json("refused"), "divergence": None}
    recipe = {
        "method": method, "direction": {"layer": 12, "site": "pre", "position": -1}, "writers": 20,
        "strength": {"min": 0.1, "max": 1.2}, "removed": taken,
        "proof": {"writers": {"component": 1e-6, "where": "x"}, "edited": {"component": 0.14, "where": "y"}},
    }  # fmt: skip
    return RunDocument.model_validate(
        {
            "model": {"source": "a/b", "revision": None}, "recipe": {**recipe, **more},
            "settings": {"measure": {"max_new_tokens": 100, "judge": "lexical"}, "seed": 0},
            "prompts": {"target": side, "baseline": side}, "original": measured, "edited": measured,
            "environment": {"abliterate": "0", "torch": "2", "transformers": "5"},
        }
    )  # fmt: skip


TWO = [removed((0.1, 0.6), 0.14, 0.139, [8, 9]), removed((0.9, 1.2), 0.02, 0.02, [10])]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr("abliterate.cards.card.find_upstream", lambda *args: ({}, ""))


def test_a_fitted_edit_was_learnt_by_gradients():
    text = model_card(document("fit", TWO))
    assert "learnt by gradients" in text and "method `fit`" in text
    assert "direction: difference of means" not in text
    assert "Nothing was trained" not in text and "no weight was trained" in text
    assert "2 directions taken out of 20 writers (attention and mlp, blocks 8 to 10), strength 0.1 to 1.2" in text


def test_each_direction_is_measured_against_its_own_strength():
    found = document("fit", TWO)
    rows = directions(found.recipe).rows
    assert rows[0] == [
        "1",
        "4 writers (attention and mlp, blocks 8 to 9)",
        "0.1 to 0.6",
        "90% to 40%",
        "0.31",
        "0.14",
    ]
    assert rows[1][0] == "2" and rows[1][2:4] == ["0.9 to 1.2", "10% to -20%"] and "block 10" in rows[1][1]
    assert all(f"| {' | '.join(row)} |" in model_card(found) for row in rows)
    assert "of each of the 2 directions the edited model's stream, to which the embedding" in model_card(found)
    assert "0.14 is left (off by at most 1e-03)" in model_card(found)


def test_one_direction_needs_no_table():
    found = document("sweep", TWO[1:])
    text = model_card(found)
    assert "direction: difference of means at layer 12, site `pre`, position -1; method `sweep`" in text
    assert "Nothing was trained" in text
    assert "1 direction taken out of 20 writers" in text
    assert not directions(found.recipe).rows


def test_an_older_document_says_which_direction_it_looked_at():
    text = model_card(document("fit", []))
    assert "of the edit's first direction the edited model's stream holds at most 0.14" in text


def test_card_report_and_terminal_say_the_same():
    found = document("fit", TWO)
    for sentence in said(found):
        plain = model_card(found).replace("`", "").casefold()
        assert sentence[:-1].casefold() in plain


def test_trials_are_called_so():
    assert any("searched by trials; method tpe" in text for text in said(document("tpe", TWO)))
