"""From the columns of a table to prompts: nothing of a row is dropped without a word."""

import json

import pytest

from abliterate.prompts.sets import load_sides
from abliterate.prompts.sources import locate
from abliterate.prompts.texts import read_splits

ALPACA = [
    {"instruction": f"Classify it {n}.", "input": f" The cat {n}. " if n % 2 else "", "output": "ok"} for n in range(12)
]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("column", "beside"), [("instruction", "input"), ("instruction", "context"), ("Behavior", "ContextString")]
)
def test_what_an_instruction_is_about_is_joined_to_it_and_counted(tmp_path, column, beside):
    source = write(tmp_path / "a.jsonl", [{column: r["instruction"], beside: r["input"]} for r in ALPACA])
    splits, notes = read_splits(locate(source, "target", None, None))
    assert splits[""][:2] == ["Classify it 0.", "Classify it 1.\n\nThe cat 1."]
    assert notes == [f"prompt file {source}: '{beside}' of 6 prompts joined to '{column}'"]


def test_a_column_that_is_named_is_taken_alone_and_a_note_says_what_is_left(tmp_path):
    source = write(tmp_path / "a.jsonl", ALPACA)
    splits, notes = read_splits(locate(source, "target", "instruction", None))
    assert splits[""] == [row["instruction"] for row in ALPACA]
    assert notes == [
        f"prompt file {source}: 'input' of 6 prompts not read, as --target-column names only 'instruction'"
    ]


def test_the_note_reaches_the_run(tmp_path):
    notes = load_sides("bundled", write(tmp_path / "a.jsonl", ALPACA)).notes
    assert any("'input' of 6 prompts joined" in note for note in notes)


def test_chats_with_more_than_a_turn_are_counted(tmp_path):
    user, system = {"role": "user", "content": "Hello"}, {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": "Hi"}
    chats = [[user, answer], [system, user, answer], [user, answer, user]]
    source = write(tmp_path / "c.jsonl", [{"messages": chat} for chat in chats])
    splits, notes = read_splits(locate(source, "target", None, None))
    assert splits[""] == ["Hello"] * 3
    assert len(notes) == 1 and "of 2 chats, system prompts or turns after the user's first left out" in notes[0]
