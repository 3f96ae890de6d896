"""The card of a saved model, as people read it and as the Hub does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from abliterate.cards.head import find_upstream
from abliterate.run.pipeline import run
from abliterate.settings.run import RunSettings
from models import save_tiny

SETTINGS = {
    "prompts": {
        "target": "bundled", "baseline": "bundled", "train_prompts": 8, "validation_prompts": 8, "test_prompts": 8,
    },
    "collect": {"filter": False},
    "search": {"method": "article", "candidates": 1},
    "measure": {"max_new_tokens": 8},
}  # fmt: skip
LICENCE = "license: other\nlicense_name: fox-licence\nlicense_link: https://example.org/fox\n"
SOURCE_CARD = f"---\n{LICENCE}language:\n- en\n---\n# Fox\n\nSpeak German to it.\n"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A run on a tiny model that has a card."""
    folder = tmp_path_factory.mktemp("card")
    save_tiny(folder / "fox")
    (folder / "fox" / "README.md").write_text(SOURCE_CARD)
    return run(str(folder / "fox"), folder / "out", RunSettings.model_validate(SETTINGS))


@pytest.fixture(scope="module")
def done(result):
    """(card, its metadata, results.json) of that run."""
    text = (result.out / "model" / "README.md").read_text()
    return text, yaml.safe_load(text.split("---\n")[1]), result.document


def test_hub_reads_the_metadata(done):
    from huggingface_hub import ModelCard

    text, metadata, document = done
    assert metadata["base_model"] == Path(document["model"]["source"]).name  # no path of this machine
    assert metadata["base_model_relation"] == "finetune"
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"abliterate", "abliterated"} <= set(metadata["tags"])
    assert ModelCard(text).data.tags == metadata["tags"]


def test_the_base_models_own_card_is_kept_below(done):
    text, metadata, _ = done
    above, under = text.split("\n# The card of fox\n")
    assert metadata["language"] == ["en"] and "Speak German" not in above
    assert under == "\n# Fox\n\nSpeak German to it.\n"


def test_licence_is_carried_over(done):
    text, metadata, _ = done
    assert metadata["license"] == "other"
    assert metadata["license_name"] == "fox-licence"
    assert metadata["license_link"] == "https://example.org/fox"
    assert "licence and terms still hold" in text


def test_numbers_are_those_measured(done):
    text, _, document = done
    rows = {cells[1].strip(): [c.strip() for c in cells[2:4]] for cells in map(row_cells, table(text))}
    for name, key, counted in (
        ("refusals", "refusal", "refused"), ("over-refusals", "over_refusal", "refused"),
        ("degenerate answers", "degenerate", "count"),
    ):  # fmt: skip
        for shown, model in zip(rows[name], ("original", "edited"), strict=True):
            rate = document[model][key]
            assert shown.startswith(f"{rate[counted]} of {rate['total']} = {rate['rate']:.1%} (")
    divergence = document["edited"]["divergence"]
    assert rows["divergence, first token"] == ["0", f"{divergence['first_token']:.3f}"]
    assert rows["divergence, along answers"] == ["0", f"{divergence['answer']:.3f}"]


def test_how_to_use_it(done):
    text, _, _ = done
    usage = text[text.index("## How to use it") : text.index("## What it did")]
    for what in ("transformers", "vllm serve", "llama-server", "--ollama", "The chat template lies beside the weights"):
        assert what in usage
    limits = text[text.index("## Limits") :]
    assert "8 target prompts" in limits and "8 tokens" in limits
    assert "demo" not in text


def test_a_notebook_shows_the_result(result):
    """Its repr is the closing table, and the report comes in a frame of its own."""
    shown = result._repr_markdown_()
    assert repr(result) == shown and "| refusals |" in shown and str(result.out) in shown
    frame = result.report()._repr_html_()
    assert frame.startswith("<iframe srcdoc=") and "<script" not in frame and "&lt;!doctype html&gt;" in frame


def row_cells(line: str) -> list[str]:
    return line.split("|")


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]


def test_says_what_was_done(done):
    text, _, document = done
    direction = document["recipe"]["direction"]
    assert f"layer {direction['layer']}, site `{direction['site']}`, position {direction['position']}" in text
    assert f"{document['recipe']['writers']} writers" in text
    assert document["prompts"]["target"]["test"]["sha256"][:16] in text
    assert "Guardrails are now yours to provide" in text
    assert "is untied" in text
    assert "`lexical` judge" in text


def test_nothing_is_left_unfilled(done):
    text, _, _ = done
    assert not re.search(r"\bNone\b|\bnan\b|[{}]", text)


def test_untied_model_says_nothing_of_tying(tmp_path):
    from models import tiny_llama

    save_tiny(tmp_path / "fox", tiny_llama(tied=False))
    result = run(str(tmp_path / "fox"), tmp_path / "out", RunSettings.model_validate({**SETTINGS, "keep_tied": True}))
    text = (tmp_path / "out" / "model" / "README.md").read_text()
    assert " tied" not in text
    assert "license" not in text.split("---\n")[1]
    assert result.document["recipe"]["tied"] is None
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ("---\nlicense: apache-2.0  # ours\n---\n", {"license": "apache-2.0"}),
        ("---\r\nlicense: 'mit'\r\n---\r\n", {"license": "mit"}),
        ("\ufeff---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", {"license": ["mit", "apache-2.0"]}),
        ("---\nlicense:\nlanguage: en\n---\n", {"language": "en"}),
        ("---\ntitle: a---b\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: [mit\n---\n", {}),
        ("# A model\n\nlicense: mit\n", {}),
        ("", {}),
    ],
)
def test_licence_of_a_folder(tmp_path, card, licence):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert find_upstream(str(tmp_path))[0] == licence


def test_licence_of_a_folder_without_card(tmp_path):
    assert find_upstream(str(tmp_path)) == ({}, "")


def test_licence_of_an_unknown_hub_model():
    assert find_upstream("org/no-such-model") == ({}, "")
