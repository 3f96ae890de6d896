"""Scores already measured: a file per model and task, so that only what is new is run."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from abliterate.common import resumable
from abliterate.common.errors import OutputError
from abliterate.common.files import cache, write_text

SCHEMA = 1


@dataclass
class TaskScores:
    """What one model scores on one task of the harness.

    Attributes:
        task: the task's name.
        version: the task's own version.
        shots: worked examples given.
        chat: whether questions were formatted with the chat template.
        metrics: "metric,filter" -> (score, standard error or None), as the harness aggregates them.
        items: "metric,filter" -> score per item, where it is a number.
        hashes: of each item, in the items' order.
        higher_is_better: per metric.
        seconds: it took to run.
        harness: version of lm-evaluation-harness.
    """

    task: str
    version: str
    shots: int
    chat: bool
    metrics: dict[str, tuple[float, float | None]]
    items: dict[str, list[float]]
    hashes: list[str]
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    seconds: float = 0.0
    harness: str = ""


def default_folder() -> Path:
    """Where scores are kept: `bench` in the cache of abliterate."""

    return cache() / "bench"


def key_of(parts: dict[str, Any]) -> str:
    """Sha256 of everything a score depends on."""
    return resumable.key_of({"schema": SCHEMA, **parts}, _as_text)


def _as_text(value: Any) -> str:
    """What JSON can't hold, the same in every process: of a function, its source."""
    if callable(value):
        with contextlib.suppress(TypeError, OSError):
            return inspect.getsource(value)
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


class Store:
    """Scores in a folder, by key."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def load(self, key: str) -> TaskScores | None:
        """The scores of a key; None when there are none, or the file can't be read."""
        try:
            document = json.loads(self._file(key).read_text(encoding="utf-8"))
            scores = TaskScores(**document)
        except (OSError, ValueError, TypeError):
            return None
        scores.metrics = {name: (value[0], value[1]) for name, value in scores.metrics.items()}
        return scores

    def save(self, key: str, scores: TaskScores) -> None:
        """Keep scores; a cache that can't be written doesn't stop a benchmark."""
        try:
            write_text(self._file(key), json.dumps(asdict(scores)))
        except OutputError:
            return

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"
