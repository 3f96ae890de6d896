"""Prompt sets: what each source gives, how it is cut, which mistakes are caught, how chats are formatted."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from abliterate.common.errors import ModelError, PromptError, shorten
from abliterate.prompts import hub as prompt_hub
from abliterate.prompts import sets as prompts
from abliterate.prompts import sources as prompt_sources
from abliterate.prompts.chat import CHATML, check_context, format_prompts, instruction_suffix_length
from abliterate.prompts.sets import load_prompts, load_sides, normalise

DATA = Path(prompts.__file__).parent.parent / "data"
TEXTS = [f"Tell me about river number {n}." for n in range(20)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_lines(path, lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def texts_of(side):
    return [text for part in side for text in part]


@pytest.fixture
def other(tmp_path):
    """A well-formed source for the side that a test isn't about."""
    return write_lines(tmp_path / "other.txt", [f"Name {n} birds." for n in range(10)])


@pytest.fixture
def hub(monkeypatch):
    """A Hub that answers, from a dictionary of data sets, and the calls made to it."""
    sets, calls = {}, []

    def load_dataset(path, split=None, *, name=None, revision=None):
        calls.append((path, split, *filter(None, (name, revision))))
        name = "/".join(filter(None, (path, name)))
        if name not in sets:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return sets[name] if split is None else sets[name][split]

    monkeypatch.setattr(prompt_hub, "hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_dataset.sets, load_dataset.calls = sets, calls
    return load_dataset


def dataset_dict(**splits):
    return datasets.DatasetDict({k: datasets.Dataset.from_dict(v) for k, v in splits.items()})


# --- The bundled sets' promises ------------------------------------------------------------------


def test_the_bundled_target_has_its_promised_sizes():
    target = load_sides("bundled", "bundled").target
    assert [len(part) for part in target] == [117, 60, 200]


def test_the_bundled_baseline_is_large_and_varied():
    baseline = load_sides("bundled", "bundled").baseline
    assert sum(map(len, baseline)) >= 450
    assert len(baseline.test) >= 200 and len(baseline.validation) >= 100
    path = Path(prompts.__file__).parents[1] / "data/baseline.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == {"text", "kind", "topic", "split"} for row in rows)
    for split in ("train", "validation", "test"):
        assert len({row["kind"] for row in rows if row["split"] == split}) >= 10


def test_no_bundled_prompt_is_in_two_splits_or_on_both_sides():
    sides = load_sides("bundled", "bundled")
    forms = [normalise(text) for side in (sides.target, sides.baseline) for text in texts_of(side)]
    assert len(set(forms)) == len(forms)
    assert sides.notes == ()


def test_the_second_target_set_is_large_varied_and_of_its_own():
    varied = load_prompts("bundled-varied")
    rows = [json.loads(line) for line in (DATA / "varied.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(varied) == len(rows) >= 100  # none repeated
    assert len({row["style"] for row in rows}) >= 8 and len({row["category"] for row in rows}) >= 15
    lengths = [len(text.split()) for text in varied]
    assert min(lengths) < 8 and max(lengths) > 45
    others = {normalise(text) for role in ("target", "baseline") for text in load_prompts("bundled", role=role)}
    assert not others & {normalise(text) for text in varied}
    # AdvBench's prompts are commands that begin with a verb of its own few
    openings = {text.split()[0] for text in load_prompts("bundled")}
    assert sum(text.split()[0] in openings for text in varied) < len(varied) / 5


def test_the_safe_prompts_of_xstest_are_all_there():
    safe = load_prompts("bundled-xstest", role="baseline")
    assert len(safe) == 250 and safe[0] == "How can I kill a Python process?"
    notice = (DATA / "LICENCES.md").read_text(encoding="utf-8")
    assert "XSTest" in notice and "creativecommons.org/licenses/by/4.0" in notice


def test_a_bundled_set_without_splits_is_cut_like_a_file():
    sides = load_sides("bundled-varied", "bundled-xstest")
    assert [len(part) for part in sides.target] == [61, 24, 37]
    assert [len(part) for part in sides.baseline] == [125, 50, 75]
    with pytest.raises(PromptError, match="bundled-varied has no split 'test'"):
        load_prompts("bundled-varied:test")


def test_a_bundled_split_is_loaded_alone():
    assert load_prompts("bundled:test").texts == load_sides("bundled", "bundled").target.test.texts
    assert len(load_prompts("bundled", role="baseline", split="val")) == 200


# --- Local files ---------------------------------------------------------------------------------


def test_text_files_give_a_prompt_a_line_without_blank_lines(tmp_path):
    path = write_lines(tmp_path / "p.txt", ["\ufeffone", "", "  two ", "\t", "three\r"])
    assert load_prompts(path).texts == ("one", "two", "three")


@pytest.mark.parametrize(
    "content",
    [
        TEXTS,
        [{"text": text, "id": 1} for text in TEXTS],
        {"version": 2, "prompts": TEXTS},
        {"prompts": [{"goal": text} for text in TEXTS]},
    ],
)
def test_json_lists_and_objects_with_one_list(tmp_path, content):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    assert load_prompts(str(path)).texts == tuple(TEXTS)


def test_jsonl_csv_and_parquet(tmp_path):
    rows = [{"prompt": text, "answer": "no, never"} for text in TEXTS]
    sources = [
        write_jsonl(tmp_path / "objects.jsonl", rows),
        write_jsonl(tmp_path / "strings.jsonl", TEXTS),
        write_csv(tmp_path / "p.csv", rows),
        str(tmp_path / "p.parquet"),
    ]
    datasets.Dataset.from_list(rows).to_parquet(sources[-1])
    for source in sources:
        assert load_prompts(source).texts == tuple(TEXTS), source


def test_a_folder_saved_as_a_dataset(tmp_path):
    datasets.Dataset.from_dict({"question": TEXTS}).save_to_disk(str(tmp_path / "one"))
    assert load_prompts(str(tmp_path / "one")).texts == tuple(TEXTS)


def test_a_folder_saved_as_a_dataset_dict_keeps_its_splits(tmp_path, other):
    saved = dataset_dict(train={"text": TEXTS[:9]}, dev={"text": TEXTS[9:14]}, test={"text": TEXTS[14:]})
    saved.save_to_disk(str(tmp_path / "three"))
    target = load_sides(str(tmp_path / "three"), other).target
    assert [part.texts for part in target] == [tuple(TEXTS[:9]), tuple(TEXTS[9:14]), tuple(TEXTS[14:])]
    assert load_prompts(str(tmp_path / "three"), split="dev").texts == tuple(TEXTS[9:14])


def test_any_other_folder_is_refused(tmp_path):
    with pytest.raises(PromptError, match="save_to_disk"):
        load_prompts(str(tmp_path))


def test_a_column_is_named_after_a_colon_or_by_option(tmp_path):
    rows = [{"text": "decoy", "my column": text} for text in TEXTS]
    path = write_csv(tmp_path / "p.csv", rows)
    assert load_prompts(f"{path}:my column").texts == tuple(TEXTS)
    assert load_prompts(path, column="my column").texts == tuple(TEXTS)


def test_a_usual_column_is_found_in_any_case(tmp_path):
    path = write_csv(tmp_path / "p.csv", [{"id": n, "Behavior": text} for n, text in enumerate(TEXTS)])
    assert load_prompts(path).texts == tuple(TEXTS)


@pytest.mark.parametrize(
    "chat",
    [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "image"}]}]},
    ],
)
def test_chats_give_their_first_user_turn(tmp_path, chat):
    assert load_prompts(write_jsonl(tmp_path / "p.jsonl", [chat])).texts == ("hello",)


# --- The Hub -------------------------------------------------------------------------------------


def test_hub_sources_name_data_set_split_and_column(hub):
    hub.sets["some/set"] = dataset_dict(
        train={"text": ["no"] * 9, "mine": TEXTS[:9]}, test={"text": ["no"] * 11, "mine": TEXTS[9:]}
    )
    assert load_prompts("some/set::mine").texts == tuple(TEXTS)
    assert load_prompts("some/set:test:mine").texts == tuple(TEXTS[9:])
    assert load_prompts("some/set", split="train", column="mine").texts == tuple(TEXTS[:9])
    assert hub.calls == [("some/set", None), ("some/set", "test"), ("some/set", "train")]


def test_a_slice_of_a_hub_split_may_hold_a_colon(hub):
    hub.sets["some/set"] = {"train[:5]": datasets.Dataset.from_dict({"text": TEXTS[:5]})}
    assert load_prompts("some/set:train[:5]:text").texts == tuple(TEXTS[:5])


def test_none_and_short_names_stand_for_the_articles_sets(hub):
    hub.sets["mlabonne/harmful_behaviors"] = dataset_dict(train={"text": TEXTS[:12]}, test={"text": TEXTS[12:]})
    hub.sets["mlabonne/harmless_alpaca"] = dataset_dict(
        train={"text": [f"a{n}" for n in range(40)]}, test={"text": [f"b{n}" for n in range(9)]}
    )
    sides = load_sides()
    assert sides == load_sides(None, None)
    assert texts_of(sides.target) == texts_of(load_sides("harmful_behaviors", "harmless_alpaca").target)
    assert sides.target.test.texts == tuple(TEXTS[12:])
    assert [len(part) for part in sides.baseline] == [30, 10, 9]
    assert sides.notes == ()


def test_what_a_user_cannot_correct_on_the_hub_is_dropped_and_noted(hub, other):
    hub.sets["some/set"] = dataset_dict(train={"text": [*TEXTS, " ", TEXTS[0]]}, test={"text": [TEXTS[3], "x"]})
    sides = load_sides("some/set", other)
    assert TEXTS[3] in sides.target.test.texts
    assert TEXTS[3] not in (*sides.target.train, *sides.target.validation)
    notes = "\n".join(sides.notes)
    assert "1 blank prompt" in notes and "1 repeated prompt" in notes and "1 prompt that a later split" in notes


@pytest.mark.parametrize("failure", [ConnectionError("no route"), TimeoutError("too slow")])
def test_without_the_hub_the_bundled_prompts_serve_and_a_note_says_so(monkeypatch, hub, failure):
    def fail(name, split=None):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", fail)
    sides = load_sides()
    assert sides.target == load_sides("bundled", "bundled").target
    assert sides.baseline == load_sides("bundled", "bundled").baseline
    assert len(sides.notes) == 1 and "can't be reached" in sides.notes[0] and "bundled" in sides.notes[0]


def test_one_default_side_falls_back_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(prompt_sources, "read_hub", unreachable)
    mine = write_jsonl(tmp_path / "mine.jsonl", [{"mine": text} for text in TEXTS])
    # The column named for the Hub's data set doesn't apply to the bundled prompts.
    sides = load_sides(mine, target_column="mine", baseline_column="instruction")
    assert set(texts_of(sides.target)) == set(TEXTS)
    assert len(sides.baseline.test) >= 200
    assert len(sides.notes) == 1 and "harmless_alpaca" in sides.notes[0] and "harmful" not in sides.notes[0]


def unreachable(*_):
    raise prompt_hub.HubUnreachableError("unreachable")


def test_offline_mode_fails_fast_and_leaves_the_libraries_as_they_were(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    modes = [datasets.config, huggingface_hub.constants]
    before = [mode.HF_HUB_OFFLINE for mode in modes]
    start = time.monotonic()
    with pytest.raises(PromptError, match=r"no-such/set-at-all.*HF_HUB_OFFLINE"):
        load_prompts("no-such/set-at-all")
    assert time.monotonic() - start < 5
    assert [mode.HF_HUB_OFFLINE for mode in modes] == before


def test_a_hub_that_never_answers_is_given_up_within_seconds(monkeypatch):
    import huggingface_hub.constants
    import huggingface_hub.utils

    class Silent:
        def head(self, *_, **__):
            time.sleep(5)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", Silent)
    monkeypatch.setattr(prompt_hub, "HUB_TIMEOUT_SECONDS", 0.1)
    start = time.monotonic()
    assert not prompt_hub.hub_answers()
    assert time.monotonic() - start < 2


def test_a_named_hub_set_that_is_missing_is_an_error(hub, other):
    with pytest.raises(PromptError, match=r"no-such/set.*doesn't exist"):
        load_sides("no-such/set", other)


def test_a_named_hub_set_that_cannot_be_reached_is_an_error(monkeypatch):
    monkeypatch.setattr(prompt_sources, "read_hub", unreachable)
    with pytest.raises(PromptError, match="unreachable"):
        load_sides("harmful_behaviors", None)


# --- Cutting -------------------------------------------------------------------------------------


def test_a_source_without_splits_is_cut_in_half_a_fifth_and_the_rest(tmp_path, other):
    path = write_lines(tmp_path / "p.txt", TEXTS)
    target = load_sides(path, other).target
    assert [len(part) for part in target] == [10, 4, 6]
    assert sorted(texts_of(target)) == sorted(TEXTS)


def test_the_seed_alone_decides_the_cut(tmp_path, other):
    path = write_lines(tmp_path / "p.txt", TEXTS)
    assert load_sides(path, other, seed=3) == load_sides(path, other, seed=3)
    assert load_sides(path, other, seed=3).target != load_sides(path, other, seed=4).target


def test_a_split_column_is_kept_and_what_is_missing_is_cut_from_train(tmp_path, other):
    rows = [{"text": text, "split": "test" if n >= 16 else "train"} for n, text in enumerate(TEXTS)]
    target = load_sides(write_csv(tmp_path / "p.csv", rows), other).target
    assert [len(part) for part in target] == [12, 4, 4]
    assert target.test.texts == tuple(TEXTS[16:])

    rows = [{"text": text, "split": "val" if n >= 10 else "train"} for n, text in enumerate(TEXTS)]
    target = load_sides(write_jsonl(tmp_path / "p.jsonl", rows), other).target
    assert [len(part) for part in target] == [7, 10, 3]


def test_a_split_column_about_something_else_is_left_alone(tmp_path, other):
    rows = [{"text": text, "split": "banana"} for text in TEXTS]
    assert len(load_sides(write_csv(tmp_path / "p.csv", rows), other).target.train) == 10


def test_limits_sample_each_split(tmp_path, other):
    path = write_lines(tmp_path / "p.txt", TEXTS)
    whole = load_sides(path, other).target
    small = load_sides(path, other, limit_train=3, limit_validation=2, limit_test=100).target
    assert [len(part) for part in small] == [3, 2, 6]
    assert set(small.train) < set(whole.train) and small.test == whole.test
    with pytest.raises(PromptError, match="limit of 0"):
        load_sides(path, other, limit_test=0)


def test_the_hash_depends_on_texts_and_order_alone():
    one, two = prompts.PromptSet("a", ("x", "y")), prompts.PromptSet("b", ("x", "y"))
    assert one.sha256 == two.sha256 and len(one.sha256) == 64
    assert one.sha256 != prompts.PromptSet("a", ("y", "x")).sha256
    assert one.sha256 != prompts.PromptSet("a", ("xy",)).sha256


# --- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere.csv", "./nowhere", "~/nowhere", "/no/where", "a/b/c/d", "no.csv:col"])
def test_a_missing_file_is_not_taken_for_a_hub_set(path, hub):
    with pytest.raises(PromptError, match="not found"):
        load_prompts(path)
    assert hub.calls == []


@pytest.mark.parametrize("name", ["p.txt", "p.json", "p.jsonl", "p.csv"])
def test_an_empty_file(tmp_path, name):
    path = write_lines(tmp_path / name, [""])
    with pytest.raises(PromptError, match=rf"{name} is empty"):
        load_prompts(path)


def test_a_missing_column_names_those_there_are(tmp_path):
    path = write_csv(tmp_path / "x.csv", [{"goal": "a", "target": "b"}])
    with pytest.raises(PromptError) as error:
        load_prompts(path, column="text")
    assert str(error.value) == (
        f"prompt file {path} has no column 'text' (it has: 'goal', 'target'); name one with --target-column"
    )
    path = write_csv(tmp_path / "y.csv", [{"foo": "a", "bar": "b"}])
    with pytest.raises(PromptError, match=r"has: 'foo', 'bar'\); name one with --baseline-column"):
        load_prompts(path, role="baseline")
    with pytest.raises(PromptError, match="plain list"):
        load_prompts(write_lines(tmp_path / "z.txt", TEXTS), column="text")


def test_a_file_that_is_not_utf8_names_the_byte(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("one\ntwo\ncaf\xe9".encode("latin-1"))
    with pytest.raises(PromptError, match="0xe9 at offset 11, line 3"):
        load_prompts(str(path))


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("p.jsonl", ['{"text": "a"}', "", '{"text": '], "line 3: not valid JSON"),
        ("p.json", ["[", '"a",', "]"], "line 3"),
        ("p.json", ["3"], "holds one int"),
        ("p.json", ['{"a": ["x"], "b": []}'], "2 lists.*'a', 'b'"),
        ("p.csv", ["text", "a", '"b" c'], "line 3: not valid CSV"),
        ("p.parquet", ["x"], "not a readable Parquet file"),
        ("p.doc", ["x"], "no known kind"),
        ("p.jsonl", ['{"text": "a"}', '"b"'], "line 2.*stands among objects"),
    ],
)
def test_malformed_files_say_where(tmp_path, name, lines, message):
    with pytest.raises(PromptError, match=message):
        load_prompts(write_lines(tmp_path / name, lines))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": 3}], "line 2, column 'text'.*is not text but 3"),
        ([{"text": "a"}, {"other": "b"}], "line 2.*is not text but None"),
        ([{"text": "a"}, {"text": " \n"}], "line 2.*is blank"),
        (["a", 5], "line 2: the prompt is not text but 5"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "line 1.*is not text"),
    ],
)
def test_a_prompt_that_is_no_text_or_blank(tmp_path, rows, message):
    with pytest.raises(PromptError, match=message):
        load_prompts(write_jsonl(tmp_path / "p.jsonl", rows))


def test_too_few_prompts(tmp_path, other):
    path = write_lines(tmp_path / "p.txt", [*TEXTS[:7], TEXTS[0].upper()])
    with pytest.raises(PromptError, match=r"p\.txt has 7 different prompts.*at least 8"):
        load_sides(path, other)
    assert all(map(len, load_sides(write_lines(tmp_path / "p.txt", TEXTS[:8]), other).target))


def test_a_prompt_on_both_sides_is_named_and_shortened(tmp_path):
    long = "Please describe " + "a very " * 40 + "long river"
    target = write_lines(tmp_path / "t.txt", [*TEXTS[:10], long])
    baseline = write_lines(tmp_path / "b.txt", [*TEXTS[10:], long.upper() + "!"])
    with pytest.raises(PromptError, match="on both sides") as error:
        load_sides(target, baseline)
    assert shorten(long.upper()) in str(error.value) and len(shorten(long)) == 80
    assert "t.txt" in str(error.value) and "b.txt" in str(error.value)


def test_a_prompt_in_two_splits_of_a_file(tmp_path, other):
    rows = [{"text": text, "split": "train"} for text in TEXTS]
    path = write_jsonl(tmp_path / "p.jsonl", [*rows, {"text": TEXTS[4].lower(), "split": "test"}])
    with pytest.raises(PromptError, match=r"river number 4.*two splits, 'train' and 'test'"):
        load_sides(path, other)


def test_repeats_inside_a_source_are_dropped_and_counted(tmp_path, other):
    path = write_lines(tmp_path / "p.txt", [*TEXTS, TEXTS[1], "tell me -- about RIVER number 2"])
    sides = load_sides(path, other)
    assert sorted(texts_of(sides.target)) == sorted(TEXTS)
    assert any("dropped 2 repeated prompts" in note for note in sides.notes)


def test_splits_without_train_are_an_error(tmp_path, other):
    rows = [{"text": text, "split": "test" if n % 2 else "val"} for n, text in enumerate(TEXTS)]
    with pytest.raises(PromptError, match="no split 'train'"):
        load_sides(write_jsonl(tmp_path / "p.jsonl", rows), other)


def test_an_unknown_split_is_an_error():
    with pytest.raises(PromptError, match=r"no split 'dove' \(it has: 'train', 'validation', 'test'\)"):
        load_prompts("bundled", split="dove")


def test_normalise_keeps_different_prompts_apart():
    assert normalise("  What's THIS?? ") == normalise("what s this")
    assert normalise("2+2") != normalise("2 2")
    assert normalise("!!!") != normalise("???")


# --- Formatting ----------------------------------------------------------------------------------


def byte_tokenizer(*, chat_template=CHATML, adds_bos=False):
    """A tokenizer with a token a byte, chatml's special tokens, and <s> as its beginning."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", additional_special_tokens=specials[1:])
    fast.chat_template = chat_template
    return fast


def read_back(tokenizer, ids):
    """The text of byte tokens, which are written Ġ for a space and Ċ for a line's end."""
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ").replace("Ċ", "\n")


def test_a_prompt_becomes_a_chat_with_the_prefill_last():
    tokenizer = byte_tokenizer()
    short, long = format_prompts(tokenizer, ["Hi", "Hi there"], system_prompt="Be kind.", prefill="Sure, ")
    assert read_back(tokenizer, short) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nSure, "
    )
    assert len(long) == len(short) + len(" there")
    assert short[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert format_prompts(tokenizer, []) == []


def test_the_first_token_is_neither_doubled_nor_lost():
    own = byte_tokenizer(chat_template="{{ bos_token }}" + CHATML, adds_bos=True)
    assert format_prompts(own, ["Hi"])[0].count(own.bos_token_id) == 1
    named = byte_tokenizer(chat_template=None, adds_bos=True)
    assert format_prompts(named, ["Hi"], chat_template="chatml") == format_prompts(own, ["Hi"])
    without = byte_tokenizer(chat_template=None)
    assert without.bos_token_id not in format_prompts(without, ["Hi"], chat_template="chatml")[0]


def test_a_template_is_a_file_a_text_or_a_name(tmp_path):
    tokenizer = byte_tokenizer(chat_template=None)
    text = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (tmp_path / "t.jinja").write_text(text)
    for template in (text, str(tmp_path / "t.jinja")):
        (ids,) = format_prompts(tokenizer, ["Hi"], chat_template=template)
        assert read_back(tokenizer, ids) == "[Hi]"
    with pytest.raises(ModelError, match=r"nowhere\.jinja can't be read"):
        format_prompts(tokenizer, ["Hi"], chat_template="nowhere.jinja")


def test_no_template_anywhere_says_what_to_pass():
    with pytest.raises(ModelError, match="--chat-template FILE or --chat-template chatml"):
        format_prompts(byte_tokenizer(chat_template=None), ["Hi"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1]['content'] }}",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ messages[-1]['content'] }}",
    ],
)
def test_a_system_prompt_that_the_template_has_no_place_for(template):
    tokenizer = byte_tokenizer(chat_template=template)
    assert read_back(tokenizer, format_prompts(tokenizer, ["Hi"])[0]) == "Hi"
    with pytest.raises(ModelError, match=r"system prompt.*leave --system-prompt out"):
        format_prompts(tokenizer, ["Hi"], system_prompt="Be kind.")


def test_a_broken_template_is_a_model_error():
    with pytest.raises(ModelError, match="can't be rendered"):
        format_prompts(byte_tokenizer(), ["Hi"], chat_template="{% for %}")


def test_the_suffix_is_what_follows_every_instruction():
    tokenizer = byte_tokenizer()
    # <|im_end|> \n <|im_start|> a s s i s t a n t \n
    assert instruction_suffix_length(tokenizer) == 13
    assert instruction_suffix_length(tokenizer, prefill="Sure") == 17
    assert instruction_suffix_length(tokenizer, chat_template="{{ messages[0]['content'] }}") == 1


def test_the_suffix_leaves_unknown_words_of_the_instruction_out():
    vocabulary = {"<unk>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "user": 3, "assistant": 4}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHATML
    assert instruction_suffix_length(tokenizer) == 3


def test_a_prompt_longer_than_the_context_is_named():
    check_context([[1] * 5, [1] * 8], 8)
    with pytest.raises(PromptError, match=r"prompt 2 \('long one'\) has 9 tokens and the context 8"):
        check_context([[1] * 5, [1] * 9], 8, ["short", "long one"])


def test_importing_stays_light():
    code = (
        "import sys, abliterate.prompts.sets; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'jinja2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
