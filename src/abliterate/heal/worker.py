"""One process of a launched training: `python -m abliterate.heal.worker JOB.json`, as `accelerate launch` starts it.

The main process says how it goes in lines on its standard output, which the launching process (`heal.launch`) reads:
each starts with `MARK` and goes on with JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.common.errors import AbliterateError
from abliterate.common.files import write_text
from abliterate.heal.training import Job, Training

if TYPE_CHECKING:
    from abliterate.common.reporting import Reporter, Tick

MARK = "@abliterate "
RESULT_FILE = "training.json"
PRESETS = {"dpo": "abliterate.heal.dpo", "self": "abliterate.heal.self_taught"}
"""The module whose `train(job, reporter=...)` is a preset: it gives a Training, or raises an AbliterateError."""


def train_here(job: Job, *, reporter: Reporter | None = None) -> Training:
    """Train in this process, as one of several if `accelerate launch` started it."""
    training: Training = importlib.import_module(PRESETS[job.settings.heal.preset]).train(job, reporter=reporter)
    return training


def error_file(job: Job, rank: int) -> Path:
    """Where a process leaves why it ended."""
    return job.folder / f"error-{rank}.json"


class _Lines:
    """A reporter that writes marked lines for the launching process."""

    def say(self, text: str) -> None:
        self._write("say", text)

    def progress(self, stage: str, total: int) -> Tick:
        self._write("progress", stage, total)
        return lambda done: self._write("tick", done)

    def _write(self, *what: Any) -> None:
        sys.stdout.write(f"{MARK}{json.dumps(what)}\n")
        sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Train the job in the file named; returns the exit code."""
    job = Job.model_validate_json(Path(arguments[0]).read_text(encoding="utf-8"))
    rank = int(os.environ.get("RANK", "0"))
    try:
        training = train_here(job, reporter=_Lines())
    except AbliterateError as error:
        write_text(error_file(job, rank), json.dumps({"kind": type(error).__name__, "text": str(error)}))
        return error.exit_code
    if rank == 0:
        write_text(job.folder / RESULT_FILE, json.dumps({**asdict(training), "adapter": str(training.adapter)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
