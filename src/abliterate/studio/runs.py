"""Runs started from the page: each an `abliterate run` of its own, so that it can be stopped cleanly."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from abliterate.common.errors import AbliterateError, shorten
from abliterate.common.files import check_folder
from abliterate.common.watching import Progress, read_progress

PASSWORD_VARIABLE = "ABLITERATE_STUDIO_PASSWORD"
METHODS = ("fit", "sweep", "article", "tpe")
PATIENCE = 60.0  # seconds a run gets to clean up before it is killed
LOST = 120.0  # after so many a stop was lost on it (a callback may swallow one): it is asked again


@dataclass
class View:
    """How a run goes.

    Attributes:
        out: its output folder.
        state: "starting", "running", "stopping", "done", "stopped", "failed" or "nothing" (no run writes it).
        progress: what it tells; None before it begins and after it ends.
        error: why it failed, on one line.
        ours: whether it was started from the page, and so can be stopped from it.
    """

    out: Path
    state: str
    progress: Progress | None = None
    error: str = ""
    ours: bool = False

    @property
    def going(self) -> bool:
        return self.state in ("starting", "running", "stopping")


@dataclass
class _Started:
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    stopped: float | None = None  # when it was asked to
    lines: list[Any] = field(default_factory=list)


class Runs:
    """The runs of one studio; one at a time, as two would share one machine's memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: dict[Path, _Started] = {}
        self._lock = threading.Lock()

    def start(self, model: str, out: Path, options: Sequence[str]) -> None:
        """Start `abliterate run MODEL --out OUT OPTIONS` in a process of its own.

        Raises:
            OutputError: when `out` isn't empty or can't be written.
            AbliterateError: when another run of this studio goes on.
        """
        check_folder(out)
        with self._lock:
            if (going := self.going()) is not None:
                raise AbliterateError(f"the run of {going.name} goes on; stop it, or wait until it is done")
            command = [sys.executable, "-m", "abliterate.cli", "run", f"--out={out}", "--quiet", *options, "--", model]
            environment = {name: value for name, value in os.environ.items() if name != PASSWORD_VARIABLE}
            environment["PYTHONSAFEPATH"] = "1"  # else `-m` imports first what lies in the folder
            errors = tempfile.TemporaryFile()  # noqa: SIM115  read when the run has ended
            process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=errors, start_new_session=True,
            )  # fmt: skip
            self._started[out] = _Started(process, errors)

    def stop(self, out: Path) -> None:
        """End a run as Ctrl-C does: nothing half-written is left.

        By SIGTERM, which the command line takes as an interrupt: SIGINT itself is ignored by what a script starts in
        the background, and so by the runs of a studio that was.

        Raises:
            AbliterateError: when it wasn't started from here, or has ended.
        """
        run = self._started.get(out)
        if run is None or run.process.poll() is not None:
            raise AbliterateError(f"no run of {out.name} that was started from this page goes on")
        run.process.terminate()
        run.stopped = time.monotonic()

    def view(self, out: Path) -> View:
        """How the run of `out` goes; also of one that was started elsewhere."""
        run = self._started.get(out)
        progress = read_progress(out)
        if run is None:
            if progress is None:
                return View(out, "done" if (out / "results.json").is_file() else "nothing")
            return View(out, "failed" if progress.ended else "running", progress, "killed" if progress.ended else "")
        if run.stopped and time.monotonic() - run.stopped > LOST:
            run.process.terminate()  # nothing, when it has ended
            run.stopped = time.monotonic()
        code = run.process.poll()
        if progress is not None:
            run.lines = progress.lines
        if code is None:
            state = "stopping" if run.stopped else "running" if progress else "starting"
            return View(out, state, progress, ours=True)
        state = "done" if code == 0 else "stopped" if run.stopped else "failed"
        return View(out, state, Progress(lines=run.lines), _why(run.errors, code) if state == "failed" else "", True)

    def going(self) -> Path | None:
        """The output of the run that was started from here and goes on."""
        return next((out for out, run in self._started.items() if run.process.poll() is None), None)

    def end(self) -> None:
        """Stop what goes on and wait until it has cleaned up."""
        for run in self._started.values():
            run.process.terminate()  # nothing, when it has ended
            try:
                run.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.process.wait()
            run.errors.close()


def _why(errors: IO[bytes], code: int) -> str:
    """The last line a run said on standard error."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("abliterate: ")), lines[-1] if lines else "")
    return shorten(said.removeprefix("abliterate: "), 400) or f"it ended with exit code {code}"
