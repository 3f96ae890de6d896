"""A run can be watched from another process, and what it leaves says what became of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from abliterate.common.errors import AbliterateError
from abliterate.common.watching import ProgressFile, follow, progress_file, read_progress
from command import PROMPTS, abliterate, listing, succeeds
from models import save_tiny


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_progress_is_read_back(out):
    file = ProgressFile(progress_file(out))
    file.say("loading")
    assert read_progress(out) is None  # nothing before the first stage
    file.stage("fitting", 40)
    file.written = -10.0  # as if half a second had passed
    file.tick(3)
    found = read_progress(out)
    assert (found.stage, found.done, found.total, found.ended) == ("fitting", 3, 40, None)
    assert [line for _, line in found.lines] == ["loading"]
    file.end()
    assert listing(out.parent) == {}


def test_following_a_run_to_its_end(out):
    file = ProgressFile(progress_file(out))
    file.stage("fitting", 2)
    looks = []
    for progress in follow(out, interval=0.01):
        looks.append(progress.ended)
        if len(looks) == 2:
            out.mkdir()
            file.end()
    assert looks == [None, None, "done"]


def test_no_run_is_said(out):
    with pytest.raises(AbliterateError, match="no run is writing"):
        next(follow(out))
    progress_file(out).write_text("{}x")
    with pytest.raises(AbliterateError, match="not a run's progress"):
        read_progress(out)


@pytest.mark.slow
def test_a_killed_run_is_seen_as_killed(tmp_path):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "out"
    command = [sys.executable, "-m", "abliterate.cli", "run", str(model), *PROMPTS, "--no-filter", "--method", "sweep",
               "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not progress_file(out).exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    shown = abliterate("watch", out, "--once")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert shown.code == 0 and "loading" in shown.out
    done = abliterate("watch", out)
    assert done.code == 2 and "killed" in done.err
    assert not out.exists()


def test_a_log_file_has_every_line_quiet_or_not(tmp_path):
    model, log = save_tiny(tmp_path / "model"), tmp_path / "logs" / "run.log"
    succeeds("inspect", model, "--quiet", "--log-file", log)
    first = log.read_text()
    assert "loading" in first
    assert abliterate("inspect", tmp_path / "missing", "--log-file", log).code == 2
    assert log.read_text().startswith(first) and "error:" in log.read_text()


def test_every_command_that_tells_how_it_goes_takes_a_log_file():
    import inspect

    import typer

    from abliterate.cli import app

    for name, command in typer.main.get_command(app).commands.items():
        options = {parameter.name for parameter in command.params}
        if "quiet" in options:
            assert "log_file" in options, name
            assert "reported(" in inspect.getsource(command.callback), name
