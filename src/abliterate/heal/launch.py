"""Starting a training: in this process, or in several through `accelerate launch`.

Ready configurations are in `data/launch/`: `ddp`, `fsdp`, `zero2`, `zero3`; a file of one's own (`accelerate config`
writes one) serves for several machines.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import IO, Any

from abliterate.common import errors
from abliterate.common.errors import AbliterateError
from abliterate.common.files import write_text
from abliterate.common.reporting import Reporter, Silent, Tick, untold
from abliterate.heal.training import Job, Training
from abliterate.heal.worker import MARK, RESULT_FILE, error_file, train_here

NAMES = ("ddp", "fsdp", "zero2", "zero3")
ALONE = ("self",)  # presets that train in one process only
TAIL_LINES = 3
PATIENCE_SECONDS = 20.0
RAISED = re.compile(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception)\b: ")  # how a trace ends; the launcher's own comes last


def train(job: Job, *, reporter: Reporter | None = None) -> Training:
    """Make the folder ready and train the job, in as many processes as its settings say.

    Raises:
        AbliterateError: what the preset raises, in whichever process it came up; the launch can't be had here; a
            process ended for a reason of its own (the text shows its last lines).
        OutputError: when resuming, the folder holds another training.
    """
    from abliterate.heal.trainer import prepare_folder

    heal = job.settings.heal
    if heal.launch is not None:
        check_launch(heal.launch, heal.processes, heal.preset)
    prepare_folder(job)
    if heal.launch is None:
        return train_here(job, reporter=reporter)
    return _launched(job, reporter or Silent())


def check_launch(launch: str, processes: int | None, preset: str = "dpo") -> None:
    """Raise before any work when a launch can't be had.

    Raises:
        AbliterateError: it names no configuration, or lacks GPUs, processes or DeepSpeed; says which.
    """
    import torch

    if preset in ALONE:
        raise AbliterateError(f"--preset {preset} trains in one process; leave --launch out")
    if launch not in NAMES:
        _check_own_file(launch)
        return
    gpus = torch.cuda.device_count()
    if launch != "ddp" and not gpus:  # accelerate would silently train as ddp
        raise AbliterateError(f"--launch {launch} needs CUDA GPUs, and there is none here; ddp runs on the CPU too")
    if launch.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise AbliterateError(f"--launch {launch} needs DeepSpeed, which isn't installed: pip install deepspeed")
    if not gpus and processes is None:
        raise AbliterateError(f"--launch {launch} without GPUs needs a number of processes on the CPU: --processes 2")


def configuration(launch: str, *, processes: int | None, bf16: bool) -> dict[str, Any]:
    """One of the ready configurations, filled in for this machine, as accelerate reads it.

    Args:
        launch: one of `NAMES`.
        processes: how many; None is one per GPU.
        bf16: whether the arithmetic is in bfloat16.
    """
    import torch
    import yaml

    text = (resources.files("abliterate") / "data" / "launch" / f"{launch}.yaml").read_text(encoding="utf-8")
    gpus = torch.cuda.device_count()
    return {
        **yaml.safe_load(text),
        "num_processes": processes or max(gpus, 1),
        "main_process_port": _free_port(),
        "mixed_precision": "bf16" if bf16 else "no",
        "use_cpu": gpus == 0,
    }


def command(job: Job, configuration_file: Path, job_file: Path) -> list[str]:
    """What `accelerate launch` is started with."""
    heal = job.settings.heal
    chosen = ["--num_processes", str(heal.processes)] if heal.launch not in NAMES and heal.processes else []
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration_file), *chosen,
        "-m", "abliterate.heal.worker", str(job_file),
    ]  # fmt: skip


def _check_own_file(launch: str) -> None:
    path = Path(launch).expanduser()
    if not path.is_file():
        raise AbliterateError(
            f"--launch {launch} is none of {', '.join(NAMES)}, and no such file; "
            "`accelerate config --config_file FILE.yaml` writes one"
        )
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        load_config_from_file(str(path))
    except Exception as error:  # yaml's, accelerate's and dataclasses' kinds
        raise AbliterateError(
            f"accelerate can't read its configuration {launch}: {errors.shorten(str(error), 200)}"
        ) from (error)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _launched(job: Job, reporter: Reporter) -> Training:
    import yaml

    from abliterate.heal.surroundings import resolve_auto

    heal = resolve_auto(job.settings.heal)
    for left in (*job.folder.glob("error-*.json"), job.folder / RESULT_FILE):
        left.unlink(missing_ok=True)
    assert heal.launch is not None
    if heal.launch in NAMES:
        file = job.folder / "accelerate.yaml"
        filled = configuration(heal.launch, processes=heal.processes, bf16=heal.bf16 == "yes")
        write_text(file, yaml.safe_dump(filled, sort_keys=False))
    else:
        file, filled = Path(heal.launch).expanduser(), {}
    job_file = job.folder / "launched.json"
    write_text(job_file, job.model_dump_json(indent=2))
    count = heal.processes or filled.get("num_processes")
    reporter.say(f"starting {f'{count} processes' if count else 'processes'} with accelerate ({heal.launch})")
    log = job.folder / "launch.log"
    code, tail = _run(command(job, file, job_file), log, _surroundings(filled), reporter)
    found = _result(job)
    if code != 0 or found is None:
        raise _why(job, code, tail, log)
    return found


def _surroundings(filled: dict[str, Any]) -> dict[str, str]:
    """The processes' environment: no bars or telemetry, and on the CPU the cores divided among them."""
    quiet = {
        "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # `-m` would import what lies in the folder one works in before what is installed
    }  # fmt: skip
    if filled.get("use_cpu") and "OMP_NUM_THREADS" not in os.environ:
        quiet["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(filled["num_processes"])))
    return {**os.environ, **quiet}


def _run(words: list[str], log: Path, environment: dict[str, str], reporter: Reporter) -> tuple[int, list[str]]:
    """Run to the end, passing on what the main process reports; what else is written goes to the log.

    Returns:
        The exit code, and the last lines of the log.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with log.open("w", encoding="utf-8") as kept, _processes(words, environment) as process:
        assert process.stdout is not None
        _relay(process.stdout, kept, tail, reporter)
        return process.wait(), list(tail)


@contextlib.contextmanager
def _processes(words: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process with all it starts, none of which is left when the block ends."""
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
        encoding="utf-8", errors="replace", env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sent)  # the group lives on while any process in it does
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=PATIENCE_SECONDS)


def _relay(lines: IO[str], log: IO[str], tail: deque[str], reporter: Reporter) -> None:
    tick: Tick = untold
    for line in lines:
        if not line.startswith(MARK):
            log.write(line)
            log.flush()
            if line.strip():
                tail.append(line.strip())
            continue
        what, *values = json.loads(line[len(MARK) :])
        if what == "say":
            reporter.say(*values)
        elif what == "progress":
            tick = reporter.progress(*values)
        else:
            tick(*values)


def _result(job: Job) -> Training | None:
    file = job.folder / RESULT_FILE
    if not file.is_file():
        return None
    document = json.loads(file.read_text(encoding="utf-8"))
    return Training(**{**document, "adapter": Path(document["adapter"])})


def _why(job: Job, code: int, tail: list[str], log: Path) -> AbliterateError:
    """The first error a process left, or what is known of the end of one that left none."""
    for file in sorted(job.folder.glob(error_file(job, 0).name.replace("0", "*"))):
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = getattr(errors, found["kind"], AbliterateError)
        return kind(found["text"])
    raised = [line for line in log.read_text(encoding="utf-8").splitlines() if RAISED.match(line)]
    last = errors.shorten(raised[0] if raised else " / ".join(tail), 300) or "nothing"
    return AbliterateError(f"the launched training ended with code {code}: {last} (all it wrote: {log})")
