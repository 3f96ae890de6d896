"""Benchmark results on cards, as people read them and as the Hub does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from abliterate.bench.cards import model_index, write_cards, write_index
from abliterate.bench.models import Contestant
from abliterate.bench.table import BenchResult, Table
from abliterate.cards.others import with_benchmark

ROWS: list[dict[str, Any]] = [
    {
        "name": "arc_challenge", "metric": "acc_norm,none", "shots": 25, "dataset": "allenai/ai2_arc",
        "models": {"original": {"score": 0.5}, "edited": {"score": 0.48123}},
    },
    {
        "name": "gsm8k", "metric": "exact_match,strict-match", "shots": 5, "dataset": "openai/gsm8k",
        "models": {"original": {"score": 0.1}, "edited": {"score": 0.09}},
    },
    {
        "name": "quick_reading", "metric": "acc_norm,none", "shots": 0, "dataset": None,
        "models": {"original": {"score": 0.7}, "edited": {"score": 0.7}},
    },
    {
        "name": "average", "metric": "", "shots": 0, "dataset": None,
        "models": {"original": {"score": 0.4}, "edited": {"score": 0.4}},
    },
]  # fmt: skip
CARD = "---\nlicense: mit\ntags:\n- abliterate\n---\n\n# Fox\n\nText --- with dashes.\n\n---\n\nMore.\n"


@pytest.fixture
def result() -> BenchResult:
    return BenchResult({"rows": ROWS}, Table(["original", "edited"], [], None), "# Benchmark\n\nthe table\n")


def test_the_hub_reads_the_scores(result: BenchResult) -> None:
    card = ModelCard(with_benchmark(CARD, model_index(result, "edited"), "## Benchmark\n\nthe table"))
    assert card.data.license == "mit"
    assert card.data.model_name == "edited"
    found = [(e.dataset_name, e.dataset_type, e.metric_type, e.metric_value) for e in card.data.eval_results]
    assert found == [
        ("arc_challenge (25-shot)", "allenai/ai2_arc", "acc_norm", 48.12),
        ("gsm8k (5-shot)", "openai/gsm8k", "exact_match", 9.0),
        ("quick_reading", "quick_reading", "acc_norm", 70.0),
    ]
    assert card.data.eval_results[1].metric_name == "exact_match (strict-match)"


def test_a_card_keeps_the_rest_and_old_results_are_replaced(result: BenchResult) -> None:
    once = with_benchmark(CARD, model_index(result, "original"), "## Benchmark\n\nold")
    twice = with_benchmark(once, model_index(result, "edited"), "## Benchmark\n\nnew")
    assert twice.count("## Benchmark") == twice.count("model-index") == 1
    assert "old" not in twice
    assert "# Fox\n\nText --- with dashes.\n\n---\n\nMore." in twice
    assert twice == with_benchmark(twice, model_index(result, "edited"), "## Benchmark\n\nnew")


def test_a_card_without_a_head_gets_one(result: BenchResult) -> None:
    text = with_benchmark("# Fox\n", model_index(result, "edited"), "## Benchmark")
    assert ModelCard(text).data.eval_results
    assert "# Fox" in text


def test_cards_of_all_but_the_reference_are_written(result: BenchResult, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(CARD)
    columns = [
        Contestant("original", str(tmp_path / "a")),
        Contestant("edited", str(tmp_path / "b")),
        Contestant("recipe", str(tmp_path / "a"), recipe=tmp_path / "r.safetensors"),
        Contestant("hub", "org/name"),
    ]
    assert write_cards(result, columns) == [tmp_path / "b" / "README.md"]
    assert (tmp_path / "a" / "README.md").read_text() == CARD
    assert "the table" in (tmp_path / "b" / "README.md").read_text()
    assert write_cards(result, columns[:1]) == [tmp_path / "a" / "README.md"]


def test_the_index_is_a_file_of_its_own_too(result: BenchResult, tmp_path: Path) -> None:
    file = write_index(result, "edited", tmp_path)
    assert yaml.safe_load(file.read_text()) == {"model-index": model_index(result, "edited")}
