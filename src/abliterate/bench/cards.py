"""Benchmark results where models are shared: the Hub's `model-index`, and a section of the card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abliterate.bench.models import Contestant
from abliterate.bench.table import AVERAGE, BenchResult
from abliterate.common.files import whole_file


def model_index(result: BenchResult, label: str) -> list[dict[str, Any]]:
    """One model's scores as the Hub's `model-index` (https://github.com/huggingface/hub-docs, modelcard.md).

    Shares are in per cent, as on the leaderboards.
    """
    entries = []
    for row in result.document["rows"]:
        if row["name"] == AVERAGE:
            continue
        scores = row["models"][label]
        metric, _, extraction = row["metric"].partition(",")
        share = 0 <= scores["score"] <= 1
        shots = f" ({row['shots']}-shot)" if row["shots"] else ""
        entries.append(
            {
                "task": {"type": "text-generation", "name": "Text Generation"},
                "dataset": {
                    "name": f"{row['name']}{shots}",
                    "type": row["dataset"] or row["name"],
                    "args": {"num_few_shot": row["shots"]},
                },
                "metrics": [
                    {
                        "type": metric,
                        "value": round(100 * scores["score"] if share else scores["score"], 2),
                        "name": f"{metric} ({extraction})" if extraction not in ("", "none") else metric,
                    }
                ],
            }
        )
    return [{"name": label, "results": entries}]


def write_index(result: BenchResult, label: str, folder: Path) -> Path:
    """Write a model's `model-index` as YAML, to be put into a card's head; returns the file."""
    import yaml

    file = folder / f"model-index-{re.sub(r'[^A-Za-z0-9._-]+', '-', label)}.yaml"
    text = yaml.safe_dump({"model-index": model_index(result, label)}, sort_keys=False)
    file.write_text(text, encoding="utf-8")
    return file


def write_cards(result: BenchResult, contestants: Sequence[Contestant]) -> list[Path]:
    """Put the results into the README.md of each model in a local folder; returns the files.

    The reference, somebody else's model as a rule, is left alone unless it is the only one.
    """
    from abliterate.cards.others import with_benchmark

    section = result.text.replace("# Benchmark\n", "## Benchmark\n", 1)
    written = []
    for contestant in contestants[1:] or contestants:
        if contestant.place is None:
            continue
        file = contestant.place / "README.md"
        old = file.read_text(encoding="utf-8") if file.is_file() else f"# {contestant.label}\n"
        with whole_file(file) as temporary:
            index = model_index(result, contestant.label)
            temporary.write_text(with_benchmark(old, index, section), encoding="utf-8")
        written.append(file)
    return written
