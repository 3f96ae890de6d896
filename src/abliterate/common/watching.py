"""How a run goes, in a small file that another terminal can watch."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from abliterate.common.errors import AbliterateError
from abliterate.common.resumable import beside

LEAST_INTERVAL = 0.5  # seconds between writes
LINES = 200  # most lines kept


@dataclass
class Progress:
    """What a run tells.

    Attributes:
        pid: of the process that runs.
        started: seconds since the epoch.
        stage, done, total: where it is.
        stage_started: when this stage began.
        lines: what it said so far, each with its seconds since the start.
        ended: None while it runs, then "done", "failed" (or interrupted) or "killed".
    """

    pid: int = 0
    started: float = 0.0
    stage: str = ""
    done: int = 0
    total: int = 0
    stage_started: float = 0.0
    lines: list[tuple[float, str]] = field(default_factory=list)
    ended: str | None = None

    def say(self, text: str) -> None:
        """Keep a line; the oldest goes when there are many."""
        self.lines = [*self.lines, (time.time() - self.started, text)][-LINES:]

    def begin(self, stage: str, total: int) -> None:
        """Begin a stage of so many steps."""
        self.stage, self.done, self.total, self.stage_started = stage, 0, total, time.time()

    @property
    def where(self) -> str:
        """How far the stage is, and about how long it still takes."""
        spent, left = time.time() - self.stage_started, self.total - self.done
        when = f", about {spent / self.done * left:.0f} s left" if self.done else ""
        return f"{self.stage}: {self.done} of {self.total}{when}"


class ProgressFile:
    """Writes a run's progress beside its output, at most twice a second; a watcher never sees half a file.

    It appears with the first stage, so that bad input leaves nothing, and is gone when the run ends; a killed
    run leaves it behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.progress = Progress(os.getpid(), time.time())
        self.written = 0.0
        self.has_place = path.parent.is_dir()  # no folder is made for it: a failed run must leave none

    def say(self, text: str) -> None:
        self.progress.say(text)
        if self.written:
            self._write()

    def stage(self, name: str, total: int) -> None:
        self.progress.begin(name, total)
        if self.has_place:
            self._write()

    def tick(self, done: int) -> None:
        self.progress.done += done
        if self.written and time.monotonic() - self.written > LEAST_INTERVAL:
            self._write()

    def end(self) -> None:
        if self.has_place:
            self._temporary.unlink(missing_ok=True)  # there, when an interrupt came while it was written
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk is the run's to report
            self._temporary.write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
            os.replace(self._temporary, self.path)
            self.written = time.monotonic()

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(f"{self.path.name}.tmp")


def progress_file(out: str | Path) -> Path:
    """The hidden file beside an output in which its run's progress stands."""
    return beside(out, "progress.json")


def read_progress(out: str | Path) -> Progress | None:
    """The progress of the run that writes `out`; None when there is none.

    Raises:
        AbliterateError: when the file isn't one of ours.
    """
    path = progress_file(out)
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        progress = Progress(**document)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise AbliterateError(f"{path} is not a run's progress: {error}; remove it if no run is going on") from error
    if progress.ended is None and not psutil.pid_exists(progress.pid):
        progress.ended = "killed"
    return progress


def follow(out: str | Path, *, interval: float = 0.5, patience: float = 0.0) -> Iterator[Progress]:
    """The progress of a run, again and again until it ends.

    Args:
        out: the run's output.
        interval: seconds between looks.
        patience: seconds to wait for a run that hasn't begun.

    Raises:
        AbliterateError: when no run writes `out`.
    """
    waited, last = 0.0, None
    while (progress := read_progress(out)) is None:
        if waited >= patience:
            hint = "; it is finished" if Path(out).exists() else ""
            raise AbliterateError(f"no run is writing {out} now{hint}; start one with `abliterate run ... --out {out}`")
        time.sleep(interval)
        waited += interval
    while progress is not None:
        last = progress
        yield progress
        if progress.ended:
            return
        time.sleep(interval)
        progress = read_progress(out)
    assert last is not None
    last.ended = "done" if Path(out).exists() else "failed"
    yield last
