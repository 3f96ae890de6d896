"""What a source means as it is typed or pasted."""

import pytest

from abliterate.common.errors import PromptError
from abliterate.prompts.sources import locate


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("org/set", ("org/set", None, None, None, None)),
        ("org/set/", ("org/set", None, None, None, None)),
        ("org/set/sub:harmful:Goal", ("org/set", "sub", "harmful", "Goal", None)),
        ("org/set:sub:harmful:Goal", ("org/set", "sub", "harmful", "Goal", None)),
        ("org/set/sub::Goal", ("org/set", "sub", None, "Goal", None)),
        ("org/set@abc:train", ("org/set", None, "train", None, "abc")),
        ("https://huggingface.co/datasets/org/set", ("org/set", None, None, None, None)),
        ("https://huggingface.co/datasets/org/set/viewer/sub/test", ("org/set", "sub", "test", None, None)),
        ("hf.co/datasets/org/set/tree/refs%2Fpr%2F1:train", ("org/set", None, "train", None, "refs/pr/1")),
        ("hf.co/datasets/org/set?row=3:test", ("org/set", None, "test", None, None)),
        ("hf://datasets/org/set:test:text", ("org/set", None, "test", "text", None)),
        ("datasets/org/set", ("org/set", None, None, None, None)),
        ("squad", ("squad", None, None, None, None)),
    ],
)  # fmt: skip
def test_a_data_set_of_the_hub(source, meant):
    found = locate(source, "target", None, None)
    assert (found.dataset, found.subset, found.split, found.column, found.revision) == meant


@pytest.mark.parametrize("source", ["org/set:a:b:c:d", "https://huggingface.co/datasets/org/set/blob/main/a.csv", ":x"])
def test_what_is_none_says_how_one_is_written(source):
    with pytest.raises(PromptError, match=r"write it as id\[/subset\]\[:split\[:column\]\]"):
        locate(source, "target", None, None)


def test_an_address_outside_the_hub_is_said_to_be_one():
    with pytest.raises(PromptError, match="an address outside the Hub; download it"):
        locate("https://example.com/data/harmful.csv", "target", None, None)


def test_three_parts_are_a_path_where_the_first_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PromptError, match="data/mine/bad was not found"):
        locate("data/mine/bad", "target", None, None)
