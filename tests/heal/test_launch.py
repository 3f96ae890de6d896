"""Several processes: two on the CPU train as one does, errors come back, the ready configurations are accelerate's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from abliterate.common.errors import AbliterateError, NonFiniteError, PromptError
from abliterate.common.reporting import Silent
from abliterate.heal import launch, worker
from abliterate.heal.launch import NAMES, check_launch, command, configuration, train
from abliterate.heal.training import Job
from abliterate.settings.heal import HealRunSettings
from long import LONG
from preference_pairs import Heard, small_job

START = """
import json, os, pathlib, sys
job = json.load(open(sys.argv[1]))
folder = pathlib.Path(job["folder"])
"""
SAME = {"dropout": 0.0, "micro_batch": 1}  # each process draws its own dropout
ON_CPU = {  # workers for what accelerate has for GPUs only
    "fsdp": "fsdp_on_cpu.py", "zero2": "deepspeed_on_cpu.py", "zero3": "deepspeed_on_cpu.py",
}  # fmt: skip
DISTRIBUTED = {"ddp": "MULTI_CPU", "fsdp": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
SPREAD = {"zero2": "zero_pp_rank_1_*optim_states.pt", "zero3": "zero_pp_rank_1_*model_states.pt"}
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def one(tiny_folder, pairs_file, tmp_path_factory):
    """What one process makes of four pairs a step."""
    return train(small_job(tiny_folder, pairs_file, tmp_path_factory.mktemp("one") / "work", accumulation=4, **SAME))


@contextlib.contextmanager
def persuaded(name):
    """Let accelerate, which has all but DDP on GPUs only, start a worker here that does without."""
    with pytest.MonkeyPatch.context() as patch:
        if name in ON_CPU and not torch.cuda.is_available():
            words, worker_file = launch.command, Path(__file__).parent / ON_CPU[name]
            patch.setattr(launch, "check_launch", lambda *_: None)
            patch.setattr(launch, "command", lambda *of: [*words(*of)[:5], str(worker_file), str(of[2])])
        yield


OFTEN = [pytest.param(name, marks=LONG) if name == "zero2" else name for name in NAMES]  # zero3 does all that it does


@pytest.fixture(scope="module", params=OFTEN)
def two(request, tiny_folder, pairs_file, tmp_path_factory):
    """A job with the same global batch that two processes did, what it came to, and what was said meanwhile."""
    name, folder = request.param, tmp_path_factory.mktemp("two") / "work"
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed isn't installed: DS_BUILD_OPS=0 pip install deepspeed")
    job = small_job(tiny_folder, pairs_file, folder, accumulation=2, launch=name, processes=2, **SAME)
    heard = Heard()
    with persuaded(name):
        return job, train(job, reporter=heard), heard


@pytest.mark.slow
def test_two_processes_train_as_one_does(two, one):
    """What is left is the order of sums in float32: 1e-5 of a loss, 1e-4 in a weight."""
    from safetensors.torch import load_file

    job, two, heard = two
    name = job.settings.heal.launch
    assert (one.resolved["processes"], two.resolved["processes"]) == (1, 2)
    if not torch.cuda.is_available():
        assert two.resolved["distributed"] == DISTRIBUTED[name]
    if name in SPREAD:  # the second process kept a part
        assert list(job.checkpoints.glob(f"checkpoint-6/global_step6/{SPREAD[name]}"))
    assert two.resolved["global_batch"] == one.resolved["global_batch"] == 4
    for key in ("loss", "rewards/margins"):
        ours, theirs = [p[key] for p in one.history], [p[key] for p in two.history]
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
    before, after = (load_file(t.adapter / "adapter_model.safetensors") for t in (one, two))
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        torch.testing.assert_close(after[tensor_name], tensor, rtol=1e-3, atol=1e-4)
    assert two.results["data"] == one.results["data"]
    held_out = [t.results["held_out"] for t in (one, two)]
    assert held_out[0]["likelihood_accuracy"] == held_out[1]["likelihood_accuracy"]
    assert held_out[1]["reward_margin"] == pytest.approx(held_out[0]["reward_margin"], rel=1e-4)
    # what the main process says comes through once
    assert heard.stages["training"] == [6, 6]
    assert sum("loading" in line for line in heard.lines) == 1
    assert "Traceback" not in (job.folder / "launch.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("two", [pytest.param("fsdp", marks=LONG), *OFTEN[2:]], indirect=True)
def test_what_is_spread_over_processes_is_resumed(two, heard):
    """A checkpoint has every process's part: the last steps done again give the same adapter, byte for byte."""
    job, training, _ = two
    weights = training.adapter / "adapter_model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(job.checkpoints / "checkpoint-6")
    with persuaded(job.settings.heal.launch):
        train(job.model_copy(update={"resume": True}), reporter=heard)
    assert "going on from step 4 of 6" in heard.lines
    assert heard.stages["training"] == [2, 2]
    assert weights.read_bytes() == before


# --- What a launched process leaves ---------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """Let a few lines of Python stand for `accelerate launch`; `job` and `folder` are there."""

    def put(lines: str):
        def words(job, configuration_file, job_file):
            return [sys.executable, "-c", START + lines, str(job_file)]

        monkeypatch.setattr(launch, "command", words)

    return put


def launched(job, **heal):
    return job(launch="ddp", processes=2, **heal)


DONE = """
(folder / "training.json").write_text(json.dumps(
    {"adapter": "a", "history": [], "resolved": {"rank": 1}, "seconds": 2.5, "results": {}}))
"""


def test_the_main_process_is_followed(job, stand_in, heard):
    stand_in(
        'print("a library speaks")\n'
        'for what in (["progress", "training", 4], ["tick", 1], ["tick", 2], ["say", "step 3"]):\n'
        '    print("@abliterate " + json.dumps(what))\n' + DONE
    )
    training = train(launched(job), reporter=heard)
    assert (training.seconds, training.resolved, training.adapter.name) == (2.5, {"rank": 1}, "a")
    assert heard.stages == {"training": [3, 4]}
    assert heard.lines == ["starting 2 processes with accelerate (ddp)", "step 3"]
    assert (launched(job).folder / "launch.log").read_text() == "a library speaks\n"


def test_an_error_comes_back_as_itself(job, stand_in):
    stand_in(
        'for rank, kind in ((0, "NonFiniteError"), (1, "AbliterateError")):\n'
        '    (folder / f"error-{rank}.json").write_text(json.dumps({"kind": kind, "text": f"of {rank}"}))\n'
        "sys.exit(1)"
    )
    with pytest.raises(NonFiniteError, match="of 0"):
        train(launched(job))


def test_an_end_without_a_reason_shows_the_last_lines(job, stand_in):
    stand_in('print("before")\nprint("killed by the system", file=sys.stderr)\nsys.exit(9)')
    with pytest.raises(AbliterateError, match=r"code 9: before / killed by the system.*launch\.log"):
        train(launched(job))


def test_an_end_by_a_bug_shows_what_was_raised_first(job, stand_in):
    stand_in(
        'print("[rank1]: KeyError: first")\nprint("torch.distributed.ChildFailedError: later")\n'
        'print("=====")\nsys.exit(1)'
    )
    with pytest.raises(AbliterateError, match=r"code 1: \[rank1\]: KeyError: first \("):
        train(launched(job))


def test_an_old_result_is_not_taken_for_a_new_one(job, stand_in):
    stand_in(DONE)
    train(launched(job))
    stand_in("sys.exit(0)")
    with pytest.raises(AbliterateError, match="ended with code 0"):
        train(launched(job, resume=True))


def test_no_process_is_left_when_it_is_interrupted(job, stand_in):
    stand_in(
        "import subprocess, time\n"
        'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])\n'
        '(folder / "pids").write_text(f"{os.getpid()} {child.pid}")\n'
        'print("@abliterate " + json.dumps(["say", "started"]), flush=True)\n'
        "time.sleep(600)"
    )

    class Interrupting(Silent):
        def say(self, text):
            if text == "started":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(launched(job), reporter=Interrupting())
    pids = [int(pid) for pid in (launched(job).folder / "pids").read_text().split()]
    for _ in range(100):
        if not any(_lives(pid) for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError("a process is left")


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_leaves_its_error_for_the_launching_process(job, monkeypatch, capsys):
    wrong = job(chosen_column="better", launch="ddp", processes=2)
    wrong.folder.mkdir()
    (wrong.folder / "job.json").write_text(wrong.model_dump_json())
    monkeypatch.setenv("RANK", "1")
    assert worker.main([str(wrong.folder / "job.json")]) == 2
    with pytest.raises(PromptError, match="has no column 'better'"):
        raise launch._why(wrong, 1, [], wrong.folder / "launch.log")
    assert capsys.readouterr().out == ""  # the main process alone speaks


# --- Configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_ready_configurations_are_accelerates(name, tmp_path):
    """Read by accelerate itself, and taken apart as `accelerate launch` does before it starts anything."""
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(configuration(name, processes=2, bf16=True)))
    read = load_config_from_file(str(file))
    assert (read.num_processes, read.mixed_precision) == (2, "bf16")
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "-m", "abliterate.heal.worker", "j"])
    arguments.nondefault = []
    arguments = _validate_launch_command(arguments)[0]
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == (
        name == "ddp", name == "fsdp", name.startswith("zero"),
    )  # fmt: skip
    if name.startswith("zero"):
        assert arguments.zero_stage == int(name[-1])
    if name == "fsdp":
        assert (arguments.fsdp_version, arguments.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")


@pytest.mark.parametrize("name", ["fsdp", "zero2", "zero3"])
def test_what_the_configurations_set_is_known_to_accelerate(name):
    """Every key under fsdp_config and deepspeed_config is an option of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    found = configuration(name, processes=2, bf16=False)
    keys = set(found["fsdp_config" if name == "fsdp" else "deepspeed_config"])
    assert keys and keys <= known


@NO_GPU
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ddp", None), "--processes 2"),
        (("fsdp", 2), "fsdp needs CUDA GPUs"),
        (("zero2", 2), "zero2 needs CUDA GPUs"),
        (("mine.yaml", 2), "none of ddp, fsdp, zero2, zero3, and no such file"),
        (("ddp", 2, "self"), "--preset self trains in one process"),
    ],
)
def test_what_cannot_be_launched_is_said_before_any_work(arguments, words):
    with pytest.raises(AbliterateError, match=words):
        check_launch(*arguments)


def test_deepspeed_is_named_where_it_is_missing(monkeypatch):
    import importlib.util

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else find(name, *a))
    check_launch("fsdp", None)
    with pytest.raises(AbliterateError, match="pip install deepspeed"):
        check_launch("zero3", None)


def test_a_file_of_ones_own(tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 4\nsomething: else\n")
    with pytest.raises(AbliterateError, match=r"can't read its configuration.*something"):
        check_launch(str(file), None)
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    check_launch(str(file), None)
    settings = HealRunSettings.model_validate({"heal": {"launch": str(file), "processes": 3}})
    words = command(Job(model="m", folder=tmp_path, settings=settings), file, tmp_path / "job.json")
    assert words[words.index("--config_file") + 1] == str(file)
    assert words[words.index("--num_processes") + 1] == "3"
    assert words[-3:] == ["-m", "abliterate.heal.worker", str(tmp_path / "job.json")]


def test_cores_are_divided_among_processes(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    found = launch._surroundings(configuration("ddp", processes=4, bf16=False) | {"use_cpu": True})
    assert found["OMP_NUM_THREADS"] == "2"
    assert json.loads(json.dumps(found))["TQDM_DISABLE"] == "1"
