"""Names as people type and paste them."""

import pytest

from abliterate.common.names import HubName, hub_name, pasted


@pytest.mark.parametrize(
    "text",
    [
        "org/name", "https://huggingface.co/org/name", "http://www.huggingface.co/org/name/", "huggingface.co/org/name",
        "hf.co/org/name", "https://hf.co/org/name", "org/name/", " org/name ", "hf://org/name", "hf://models/org/name",
        "https://huggingface.co/org/name?library=transformers#usage", "'org/name'", "“org/name”", "`hf.co/org/name`",
        "\u200borg/name\ufeff", "'org/name\u00a0'", "<https://huggingface.co/org/name>", "https://huggingface.co/org/name.git",
    ],
)  # fmt: skip
def test_an_id_is_found_in_what_is_pasted(text):
    assert hub_name(text) == HubName("org/name")


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ("org/name@main", "main"),
        ("'hf.co/org/name@main'", "main"),
        ("https://huggingface.co/org/name/commit/abc123", "abc123"),
        ("org/name@refs/pr/3", "refs/pr/3"),
        ("https://huggingface.co/org/name/tree/v1.0/", "v1.0"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F3", "refs/pr/3"),
    ],
)
def test_a_revision_is_found_beside_it(text, revision):
    assert hub_name(text) == HubName("org/name", revision)


def test_what_follows_an_id_is_kept():
    assert hub_name("https://hf.co/org/name/blob/main/a.gguf").rest == ("blob", "main", "a.gguf")


@pytest.mark.parametrize("text", ["/a b/c.txt", "'/a b/c.txt'", "file:///a%20b/c.txt", ' "file:///a%20b/c.txt" '])
def test_a_path_is_found_in_what_is_pasted(text):
    assert pasted(text) == "/a b/c.txt"
