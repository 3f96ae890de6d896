"""`abliterate bench`: what it says, refuses and writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from abliterate.bench.suites import SUITES
from command import abliterate, fails, listing, succeeds
from models import save_tiny, tiny_llama


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with two models and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / ".cache"))
    save_tiny("one", tiny_llama(context=1024))
    save_tiny("two", tiny_llama(context=1024, seed=1))
    return tmp_path


def test_help_names_the_suites_and_has_examples_and_no_torch() -> None:
    text = " ".join(abliterate("bench", "--help").out.split())
    assert all(name in text for name in SUITES)
    assert "--no-chat-temp" in text  # the column is narrow
    assert "abliterate bench demo --recipe recipe.safetensors" in text
    script = "import sys, abliterate.cli; print(sorted({'torch', 'transformers', 'lm_eval'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_a_table_a_document_and_a_card(desk: Path) -> None:
    arguments = ("bench", "original=one", "edited=two", "--suite", "quick_knowledge", "--limit", 4)
    said = succeeds(*arguments, "--out", "out", "--card")
    assert "| quick_knowledge (acc_norm) | 4 |" in said.out
    assert "edited: quick_knowledge (16)" in said.err
    assert "it/s" not in said.err  # no bars of the harness
    assert "model-index" in Path("two/README.md").read_text()
    assert not Path("one/README.md").exists()
    told = succeeds(*arguments, "--out", "two-out", "--quiet", "--json", "--log-file", "log.txt")
    assert told.err == ""
    assert told.json["reference"] == "original"
    assert told.json["evaluated"] == {"original": 0, "edited": 0}
    assert "4 of" not in told.err
    assert "original: 1 of 1 tasks are known" in Path("log.txt").read_text()
    assert set(listing(desk / "two-out")) == {
        "bench.md", "results.json", "model-index-original.yaml", "model-index-edited.yaml",
    }  # fmt: skip


@pytest.mark.slow
def test_what_is_wrong_is_one_line(desk: Path) -> None:
    assert "did you mean" in fails(desk, "bench", "one", "--suite", "helaswag")
    assert "--batch-size some" in fails(desk, "bench", "one", "--batch-size", "some")
    assert "two columns are called 'one'" in fails(desk, "bench", "one", "one")
    assert "name the model it is for first" in fails(desk, "bench", "r.safetensors")
    assert "Rowan/hellaswag" in fails(desk, "bench", "one", "--suite", "hellaswag")


def test_without_the_harness_it_says_how_to_get_it(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def missing(_name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "pip install 'abliterate[bench]'" in fails(desk, "bench", "one")
