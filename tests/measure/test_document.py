"""results.json as types: what goes in comes out, old and odd files, and the schema that is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abliterate.common.errors import AbliterateError
from abliterate.measure.document import RunDocument, load_document, schema
from abliterate.measure.rates import Rate

SCHEMA = Path(__file__).parents[2] / "docs" / "results.schema.json"
SMALL = {
    "schema": 1,
    "model": {"source": "a/b", "revision": None, "class": "LlamaForCausalLM", "of_a_later_version": 3},
    "original": {"refusal": Rate(7, 8).to_json("refused"), "divergence": None},
    "edited": {
        "refusal": Rate(0, 8).to_json("refused"),
        "divergence": {"first_token": 0.125, "answer": 0.25, "prompts": 8},
        "degenerate": Rate(1, 8).to_json(),
    },
    "healed": None,
    "frontier": [{"refusal": Rate(1, 8).to_json("refused"), "divergence": 0.1, "weight": 2.0, "chosen": True}],
    "kept": {"source": "keep.txt"},
}


def test_what_goes_in_comes_out():
    assert RunDocument.model_validate(SMALL).to_json() == SMALL


def test_states_and_counts():
    document = RunDocument.model_validate(SMALL)
    assert list(document.states) == ["original", "edited"]
    edited = document.states["edited"]
    assert edited.degenerate is not None
    assert (edited.refusal.counted, edited.degenerate.counted) == (0, 1)
    assert document.frontier[0].weight == 2.0
    assert document.about.name == "refusal"


def test_a_file_round_trip(tmp_path):
    document = RunDocument.model_validate(SMALL)
    document.save(tmp_path / "results.json")
    assert load_document(tmp_path / "results.json") == document


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "can't be read as JSON"),
        ("[]", "no JSON object"),
        ('{"schema": 7}', "schema 7; this version reads 1"),
        ('{"original": {"refusal": {"refused": 1, "total": "many", "rate": 0, "ci95": [0, 1]}}}',
         "original.refusal.total"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, text, expected):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(AbliterateError, match=expected):
        load_document(tmp_path / "results.json")


def test_the_published_schema_is_that_of_the_types():
    assert json.loads(SCHEMA.read_text()) == schema()
