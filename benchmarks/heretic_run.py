"""Heretic unattended: running or resuming its study, the seconds each trial took, saving its models.

Standard library only, and none of Heretic's code: its own program is run and its menus are answered. As in a
notebook it reads numbers from standard input then.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOURNALS = "checkpoints"
TIMES = "times.jsonl"
LOG = "log.txt"
STUDY_SCRIPT = Path(__file__).with_name("heretic_study.py")
_ENTRY = re.compile(r"^\[(\d+)\] (.*?)\s*$")
_TRIAL_ENTRY = re.compile(r"^\[Trial +(\d+)\] Refusals: +(\d+)/(\d+), KL divergence: ([\d.]+)$")
_BEGINS = re.compile(r"Running trial (\d+) of (\d+)")
_ENDS = "Elapsed time: "
_FINISHED = "Optimization finished!"
_LAST_FILE = "tokenizer_config.json"  # of a saved model, behind its weights
Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """A trial on the frontier that Heretic presents: its number, and what Heretic measured."""

    index: int
    refusals: int
    prompts: int
    divergence: float


Choose = Callable[[list[Trial]], dict[int, Path]]


# --- Before and after a run --------------------------------------------------------------------------


def write_config(folder: Path, settings: dict[str, Any]) -> None:
    """Write config.toml: plain values first, then a table per dictionary."""
    plain = {name: value for name, value in settings.items() if not isinstance(value, dict)}
    tables = {name: value for name, value in settings.items() if isinstance(value, dict)}
    # JSON strings, numbers and lists of strings are TOML too
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in plain.items()]
    for name, table in tables.items():
        lines += [
            "",
            f"[{name}]",
            *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()),
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def journal_of(folder: Path) -> Path:
    """The study's journal in a working directory.

    Raises:
        SystemExit: when there is none.
    """
    for path in sorted((folder / JOURNALS).glob("*.jsonl")):
        return path
    raise SystemExit(f"no study of Heretic in {folder / JOURNALS}; run the stage 'heretic' first")


def study(venv: Path, journal: Path, *options: str) -> list[dict[str, Any]]:
    """The complete trials of a journal, read with Heretic's own Optuna.

    Args:
        venv: the environment that heretic-llm is installed in.
        journal: the journal's file.
        options: `--plan N` or `--close`, which change the journal; see `heretic_study.py`.
    """
    command = [str(venv / "bin" / "python"), str(STUDY_SCRIPT), str(journal), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [trial for trial in json.loads(done.stdout) if trial["state"] == "COMPLETE"]


def copy_study(venv: Path, folder: Path, to: Path) -> None:
    """A copy of a working directory's settings and study, finished with the trials it has so far."""
    shutil.rmtree(to, ignore_errors=True)
    (to / JOURNALS).mkdir(parents=True)
    shutil.copy(folder / "config.toml", to)
    journal = journal_of(folder)
    # a run may be writing its last line
    whole = journal.read_bytes().rpartition(b"\n")[0] + b"\n"
    copy = to / JOURNALS / journal.name
    copy.write_bytes(whole)
    study(venv, copy, "--close")


def trial_times(folder: Path) -> list[dict[str, Any]]:
    """The lines of `times.jsonl`: trial (0: all before the first), seconds, cpu_seconds, at, load."""
    path = folder / TIMES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# --- Running it ----------------------------------------------------------------------------------------


def run(venv: Path, folder: Path, model: Path | str, threads: int, say: Say = print) -> None:
    """Run Heretic in `folder` (which holds its config.toml) until its trials are done, resuming what is there.

    Appends to `times.jsonl` a line per trial: its number, wall seconds, CPU seconds of the process, the time
    and the machine's load; number 0 is everything before a start's first trial. Its output goes to `log.txt`.

    Args:
        venv: the environment that heretic-llm is installed in.
        folder: working directory.
        model: folder or Hub id.
        threads: of torch.
        say: told a line per trial.

    Raises:
        SystemExit: when Heretic stops before its trials are done.
    """
    left = final = False
    trial = 0
    with _session(venv, folder, model, threads) as (process, lines), (folder / TIMES).open("a") as times:
        clock = _Clock(process.pid)
        for line in lines:
            entry = _ENTRY.match(line)
            title = entry[2] if entry else ""
            if begins := _BEGINS.search(line):
                if not trial:
                    _note(times, 0, clock.lap())  # loading, the original's scores, directions
                trial = int(begins[1])
            elif line.startswith(_ENDS) and trial:
                lap = clock.lap()
                _note(times, trial, lap)
                say(f"Heretic: trial {trial}, {lap['seconds']:.0f} s ({lap['cpu_seconds']:.0f} s of CPU)")
            elif _FINISHED in line:
                final = True
            elif entry and not final and title in _CONTINUE:
                _answer(process, entry[1])
            elif entry and final and title == "Exit program":
                left = True
                _answer(process, entry[1])
    if not left:
        raise SystemExit(f"Heretic stopped before its trials were done; see {folder / LOG}; run again to resume")


def save_models(
    venv: Path, folder: Path, model: Path | str, threads: int, choose: Choose, say: Say = print
) -> list[Trial]:
    """Have Heretic save the merged models of trials; returns the trials it presents as Pareto optimal.

    Args:
        venv, folder, model, threads: as for `run`; the study in `folder` must be finished.
        choose: given the trials presented, says which to save: trial's number to folder.
        say: told a line per model.

    Raises:
        SystemExit: when Heretic stops early or doesn't present a trial that is wanted.
    """
    shown: dict[int, tuple[Trial, str]] = {}
    wanted: dict[int, Path] | None = None
    to_do: dict[int, Path] = {}
    in_menu = left = False
    with _session(venv, folder, model, threads) as (process, lines):
        for line in lines:
            in_menu = in_menu or _FINISHED in line
            if not (entry := _ENTRY.match(line)):
                continue
            number, title = entry.groups()
            if found := _TRIAL_ENTRY.match(title):
                index, refusals, prompts = (int(found[i]) for i in (1, 2, 3))
                shown[index] = (Trial(index, refusals, prompts, float(found[4])), number)
            elif not in_menu and title in _CONTINUE:
                _answer(process, number)
            elif in_menu and title == "Exit program":  # the last entry of the trials' menu
                if wanted is None:
                    wanted = choose([trial for trial, _ in shown.values()])
                    to_do = dict(wanted)
                following = next((index for index in to_do if index in shown), None)
                if following is None:
                    left = True
                    _answer(process, number)
                else:
                    path = to_do.pop(following)
                    say(f"Heretic: saving the model of trial {following}")
                    # the trial, save to a folder, which, merged, and back to the trials
                    _answer(process, shown[following][1], "1", str(path), "1", "5")
    if not left:
        raise SystemExit(f"Heretic stopped before its models were saved; see {folder / LOG}")
    missing = [index for index, path in (wanted or {}).items() if not is_saved(path)]
    if missing:
        raise SystemExit(f"Heretic didn't save the models of trials {missing}; see {folder / LOG}")
    return [trial for trial, _ in shown.values()]


def is_saved(folder: Path) -> bool:
    """Whether a model is whole in the folder that Heretic saved it to."""
    return (folder / _LAST_FILE).is_file()


_CONTINUE = ("Continue the previous run", "Show the results from the previous run")


@contextmanager
def _session(
    venv: Path, folder: Path, model: Path | str, threads: int
) -> Iterator[tuple[subprocess.Popen[str], Iterator[str]]]:
    """Heretic running in `folder`, and the lines it writes, each also logged; ended with the block."""
    environment = dict(
        os.environ,
        COLAB_GPU="1",  # its menus then read numbers from standard input
        PYTHONUNBUFFERED="1",
        OMP_NUM_THREADS=str(threads),
        HF_HUB_OFFLINE="1",
        HF_HOME=str(folder / "hf"),  # the prompts' data sets are cached there
        TOKENIZERS_PARALLELISM="false",
        COLUMNS="200",
    )
    command = [str(venv / "bin" / "heretic"), "--model", str(model)]
    with (folder / LOG).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None

        def lines() -> Iterator[str]:
            for line in process.stdout or ():
                log.write(line)
                log.flush()
                yield line

        try:
            yield process, lines()
        finally:
            _stop(process)


def _answer(process: subprocess.Popen[str], *answers: str) -> None:
    assert process.stdin is not None
    process.stdin.write("".join(answer + "\n" for answer in answers))
    process.stdin.flush()


def _stop(process: subprocess.Popen[str]) -> None:
    """End Heretic if it still runs; its journal is whole after every trial."""
    try:
        process.wait(0 if sys.exc_info()[0] else 60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --- Seconds -------------------------------------------------------------------------------------------


class _Clock:
    """Wall and CPU seconds of a process since its last lap."""

    def __init__(self, pid: int) -> None:
        self.stat = Path(f"/proc/{pid}/stat")
        self.wall, self.cpu = time.time(), 0.0

    def lap(self) -> dict[str, float]:
        wall, cpu = time.time(), self._cpu_seconds()
        lap = {"seconds": round(wall - self.wall, 2), "cpu_seconds": round(cpu - self.cpu, 2), "at": round(wall, 1)}
        lap["load"] = os.getloadavg()[0]
        self.wall, self.cpu = wall, cpu
        return lap

    def _cpu_seconds(self) -> float:
        try:
            # the name may hold spaces, so count from behind its bracket: utime and stime are fields 14 and 15
            fields: Sequence[str] = self.stat.read_text().rpartition(")")[2].split()
        except OSError:
            return self.cpu
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _note(file: Any, trial: int, lap: dict[str, float]) -> None:
    file.write(json.dumps({"trial": trial, **lap}) + "\n")
    file.flush()
