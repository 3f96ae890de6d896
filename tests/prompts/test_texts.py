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
    ("column", "beside"),
    [
        ("instruction", "input"), ("instruction", "context"), ("Behavior", "ContextString"), ("prompt", "context"),
        ("question", "passage"), ("data.query", "data.inputs"),
    ],
)  # fmt: skip
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


def test_a_row_written_out_whole_is_not_taken_for_its_prompt(tmp_path):
    whole = [{**row, "text": f"### Instruction: {row['instruction']} ### Response: ok"} for row in ALPACA]
    splits, _ = read_splits(locate(write(tmp_path / "a.jsonl", whole), "target", None, None))
    assert splits[""][:2] == ["Classify it 0.", "Classify it 1.\n\nThe cat 1."]
    chats = [
        {"text": "<|user|>Hi<|assistant|>", "messages": [{"role": "user", "content": f"Hi {n}"}]} for n in range(9)
    ]
    splits, _ = read_splits(locate(write(tmp_path / "c.jsonl", chats), "target", None, None))
    assert splits[""][0] == "Hi 0"


def test_what_a_prompt_says_already_is_not_added_to_it(tmp_path):
    rows = [{"prompt": f"Sum up: the cat {n}.", "input": f"the cat {n}."} for n in range(9)]
    splits, notes = read_splits(locate(write(tmp_path / "a.jsonl", rows), "target", None, None))
    assert splits[""][0] == "Sum up: the cat 0." and notes == []


def test_files_of_several_names_in_one_folder_are_named(tmp_path):
    for name in ("harmful", "benign"):
        for part in (0, 1):
            write(tmp_path / f"{name}-{part:05}-of-00002.jsonl", [{"prompt": f"{name} {part} {n}"} for n in range(8)])
    splits, notes = read_splits(locate(str(tmp_path), "target", None, None))
    assert len(splits[""]) == 32 and notes == [f"prompt folder {tmp_path}: read as one: benign.jsonl, harmful.jsonl"]
