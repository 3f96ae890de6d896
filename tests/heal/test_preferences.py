"""Preference pairs: the three forms, what is left out and said, errors that name the place, the split."""

from __future__ import annotations

import json

import pytest

from abliterate.common.errors import PromptError
from abliterate.heal.preferences import Pair, as_row, conversation_lengths, load_preferences, read_pairs, split
from abliterate.settings.heal import HealSettings
from models import handle_of, tiny_llama
from preference_pairs import colours, write_pairs

REFUSAL = "I'm sorry, but I can't help with that."


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def settings(file, **others):
    return HealSettings.model_validate({"data": str(file), **others})


@pytest.fixture
def handle():
    return handle_of(tiny_llama())


@pytest.fixture
def write(tmp_path):
    return lambda *rows: write_pairs(tmp_path / "p.jsonl", list(rows))


# --- Forms -----------------------------------------------------------------------------------------


FORMS = {
    "text": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "messages": {"prompt": [user("2 + 2?")], "chosen": [said("4")], "rejected": [said("5")]},
    "text and messages": {"prompt": "2 + 2?", "chosen": [said("4")], "rejected": "5"},
    "conversations": {
        "prompt": "not read", "chosen": [user("2 + 2?"), said("4")], "rejected": [user("2 + 2?"), said("5")],
    },
    "conversations alone": {"chosen": [user("2 + 2?"), said(" 4 ")], "rejected": [user("2 + 2?"), said("5\n")]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(write, form):
    assert read_pairs(settings(write(FORMS[form]))) == [Pair((("user", "2 + 2?"),), "4", "5")]


def test_earlier_turns_and_a_system_message_stay(write):
    context = [{"role": "system", "content": "Be short."}, user("Hi"), said("Hello"), user("2 + 2?")]
    (pair,) = read_pairs(settings(write({"chosen": [*context, said("4")], "rejected": [*context, said("5")]})))
    assert isinstance(pair, Pair)
    assert pair.messages == context
    assert pair.question == "2 + 2?"


def test_parquet_and_other_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"q": [user(f"{i}?")], "good": [said(f"yes {i}")], "bad": [said("no")]} for i in range(3)]
    file = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    found = read_pairs(settings(file, prompt_column="q", chosen_column="good", rejected_column="bad"))
    assert [pair.chosen for pair in found] == ["yes 0", "yes 1", "yes 2"]  # type: ignore[union-attr]


def test_the_train_split_unless_another_is_named(tmp_path):
    import datasets

    parts = {name: datasets.Dataset.from_list([{**FORMS["text"], "chosen": name}]) for name in ("train", "other")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    assert read_pairs(settings(tmp_path / "d"))[0].chosen == "train"  # type: ignore[union-attr]
    assert read_pairs(settings(tmp_path / "d", data_split="other"))[0].chosen == "other"  # type: ignore[union-attr]
    with pytest.raises(PromptError, match=r"no split 'test'.*'train', 'other'"):
        read_pairs(settings(tmp_path / "d", data_split="test"))


def test_the_hub_is_asked_for_id_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split=None):
        asked.append((name, split))
        return datasets.Dataset.from_list([FORMS["conversations"]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_pairs(HealSettings())) == 1
    assert len(read_pairs(settings("a/b:train[:10]"))) == 1
    assert asked == [("mlabonne/orpo-dpo-mix-40k", None), ("a/b", "train[:10]")]


# --- Errors ----------------------------------------------------------------------------------------


GOOD = {"prompt": "a?", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**GOOD, "chosen": 3}, ["field 'chosen'", "3"]),
        ({**GOOD, "prompt": None}, ["field 'prompt'", "missing"]),
        ({**GOOD, "rejected": []}, ["field 'rejected'", "empty"]),
        ({**GOOD, "chosen": [user("x")]}, ["field 'chosen'", "the user's"]),
        ({**GOOD, "prompt": [said("x")]}, ["field 'prompt'", "the assistant's"]),
        ({**GOOD, "chosen": [{"role": "assistant"}]}, ["field 'chosen', message 1", "content"]),
        ({**GOOD, "rejected": [{"role": "bot", "content": "x"}]}, ["field 'rejected', message 1", "role"]),
        ({**GOOD, "chosen": ["x"]}, ["field 'chosen', message 1"]),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(write, row, words):
    file = write(GOOD, row)
    with pytest.raises(PromptError) as error:
        read_pairs(settings(file))
    assert all(word in str(error.value) for word in [str(file), "line 2", *words])
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path, write):
    with pytest.raises(PromptError, match=r"no column 'chosen'.*'prompt', 'answer'.*--chosen-column"):
        read_pairs(settings(write({"prompt": "a", "answer": "b"})))
    with pytest.raises(PromptError, match=r"none\.jsonl was not found"):
        read_pairs(settings(tmp_path / "none.jsonl"))
    (tmp_path / "p.jsonl").write_text(json.dumps(GOOD) + "\n{broken\n")
    with pytest.raises(PromptError, match="line 2: not valid JSON"):
        read_pairs(settings(tmp_path / "p.jsonl"))
    with pytest.raises(PromptError, match="no name"):
        read_pairs(settings(" "))


# --- What is left out ------------------------------------------------------------------------------


def test_what_cannot_teach_is_left_out_counted_and_said(write, handle, heard):
    file = write(
        *colours(6),
        {**GOOD, "chosen": REFUSAL},
        {**GOOD, "rejected": REFUSAL},  # what should be learnt
        {**GOOD, "chosen": "  "},
        {**GOOD, "rejected": "b"},
        {"chosen": [user("a"), said("x")], "rejected": [user("b"), said("y")]},
        {**GOOD, "prompt": "long " * 200},
        {**GOOD, "chosen": "long " * 200},
    )
    found = load_preferences(settings(file, max_length=150, held_out=0.0), handle, reporter=heard)
    assert len(found.train) == 8
    assert REFUSAL in [pair.rejected for pair in found.train]
    assert REFUSAL not in [pair.chosen for pair in found.train]
    assert found.counts == {
        "read": 13, "refusing": 1, "empty": 1, "same": 1, "apart": 1, "too_long": 1, "cut": 1,
    }  # fmt: skip
    line = heard.lines[-1]
    for words in (
        "of 13 read",
        "1 whose chosen answer refuses",
        "1 whose prompt alone is too long",
        "answers of 1 cut",
    ):
        assert words in line
    assert heard.stages["judging chosen answers"] == [10, 10]


def test_refusals_stay_when_asked_for(write, handle):
    file = write(*colours(3), {**GOOD, "chosen": REFUSAL})
    found = load_preferences(settings(file, keep_refusals=True, held_out=0.0), handle)
    assert REFUSAL in [pair.chosen for pair in found.train]
    assert "refusing" not in found.counts


def test_the_judge_decides_and_sees_the_question(write, handle):
    class Judge:
        name = "test"

        def judge(self, prompts, answers):
            assert prompts[0].startswith("Question 0")
            return [answer.startswith("blue") and len(answer) < 20 for answer in answers]

        def settled(self, prompt, partial):
            return None

    found = load_preferences(settings(write(*colours(9)), held_out=0.0), handle, judge=Judge())
    assert found.counts["refusing"] == 3


def test_too_few_pairs_say_why(write, handle):
    with pytest.raises(PromptError, match=r"gives 1 usable preference pairs .*1 whose chosen answer refuses"):
        load_preferences(settings(write(GOOD, {**GOOD, "chosen": REFUSAL})), handle)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl's own default
def test_lengths_are_those_of_what_trl_trains_on(handle, tmp_path):
    from trl import DPOConfig, DPOTrainer

    handle.system_prompt = "Be short."
    pair = Pair((("user", "What do you see?"),), "blue sky", "red sand and wind")
    lengths = conversation_lengths(pair, handle)
    import datasets

    trainer = DPOTrainer(
        model=handle.model,
        ref_model=tiny_llama(),
        args=DPOConfig(output_dir=str(tmp_path), report_to=[], bf16=False, use_cpu=True),
        train_dataset=datasets.Dataset.from_list([as_row(pair, handle)]),
        processing_class=handle.tokenizer,
    )
    row = trainer.train_dataset[0]
    theirs = [len(row["prompt_ids"]) + extra for extra in (0, len(row["chosen_ids"]), len(row["rejected_ids"]))]
    assert list(lengths) == theirs
    assert "Be short." in handle.tokenizer.decode(row["prompt_ids"])


# --- Split -----------------------------------------------------------------------------------------


def pairs(count, questions=None):
    return [Pair((("user", f"q{i % (questions or count)}"),), f"yes {i}", f"no {i}") for i in range(count)]


def test_no_prompt_is_on_both_sides_and_the_order_does_not_matter():
    every = pairs(60, questions=20)
    train, held = split(every, 0.2, 100, seed=1)
    assert sorted(p.chosen for p in train + held) == sorted(p.chosen for p in every)
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    assert len(held) == 12
    backwards = split(every[::-1], 0.2, 100, seed=1)
    assert {p.chosen for p in backwards[1]} == {p.chosen for p in held}
    assert {p.chosen for p in split(every, 0.2, 100, seed=2)[1]} != {p.chosen for p in held}


@pytest.mark.parametrize(
    ("share", "most", "held"), [(0.0, 9, 0), (0.01, 9, 1), (0.5, 9, 5), (0.5, 3, 3), (0.99, 99, 9)]
)
def test_how_many_are_held_out(share, most, held):
    assert len(split(pairs(10), share, most, seed=0)[1]) == held


def test_most_pairs_are_drawn_by_the_seed(write, handle):
    file = write(*colours(30))
    drawn = [
        {p.question for p in load_preferences(settings(file, most_pairs=5, held_out=0.0), handle, seed=seed).train}
        for seed in (0, 0, 1)
    ]
    assert len(drawn[0]) == 5
    assert drawn[0] == drawn[1] != drawn[2]
