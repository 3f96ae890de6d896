"""Preference files for tests, and a reporter that remembers what it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abliterate.heal.training import Job
from abliterate.settings.heal import HealRunSettings
from heard import Heard as Heard


def write_pairs(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def colours(count: int = 40) -> list[dict[str, str]]:
    """Pairs that differ in their words and, either way, in their lengths."""
    return [
        {
            "prompt": f"Question {i}: what do you see?",
            "chosen": "blue sky and rain " * (1 + i % 3),
            "rejected": "red sand and wind " * (1 + (i + 1) % 3),
        }
        for i in range(count)
    ]


def small_job(model: Path, pairs: Path, folder: Path, *, resume: bool = False, **heal: Any) -> Job:
    """A dpo job that a tiny model learns from in seconds."""
    small = {
        "data": str(pairs), "learning_rate": 5e-3, "micro_batch": 2, "accumulation": 2, "rank": 8, "alpha": 16,
        "held_out": 0.25, "max_length": 96, "max_steps": 6, "save_steps": 2,
    }  # fmt: skip
    settings = HealRunSettings.model_validate({"heal": small | heal, "load": {"dtype": "float32"}})
    return Job(model=str(model), folder=folder, settings=settings, resume=resume)
