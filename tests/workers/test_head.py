"""A whole run on a cluster whose head dies: one line, and `--resume` goes on to what a run without workers gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from abliterate.edit.recipe import load_recipe
from abliterate.workers import pool
from command import succeeds
from long import LONG
from planted import save_planted


@LONG
def test_a_run_whose_head_died_is_taken_up_again(tmp_path):
    pytest.importorskip("ray")
    model, target, baseline = save_planted(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    few = [
        model, "--target", target, "--baseline", baseline, "--train-prompts", "12", "--validation-prompts", "6",
        "--test-prompts", "6", "--max-new-tokens", "6", "--method", "fit", "--steps", "12", "--dtype", "float32",
        "--report-judge", "none", "--also-prompts", "0",
    ]  # fmt: skip
    command = [sys.executable, "-m", "abliterate", "run", *few, "--out", tmp_path / "two", "--ray", f"127.0.0.1:{port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def head():
        cores = ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
        running = subprocess.Popen([*start, *cores], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while not pool._answers(f"127.0.0.1:{port}"):
            assert running.poll() is None, running.stdout.read()
            time.sleep(0.5)
        return running, psutil.Process(running.pid).children(recursive=True)

    first, its = head()
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    said = []
    for line in run.stderr:
        said.append(line)
        if "fitting" in line:
            next(one for one in its if one.name() == "gcs_server").kill()
    assert run.wait() == 2, said
    assert "--resume goes on" in said[-1]
    first.wait()
    second, _ = head()
    try:
        done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=600)
    finally:
        second.terminate()
        second.wait()
    assert done.returncode == 0, done.stderr[-3000:]
    succeeds("run", *few, "--out", tmp_path / "none", "--quiet")
    two, none = (load_recipe(tmp_path / name / "recipe.safetensors").edit for name in ("two", "none"))
    assert two.writers == none.writers
    np.testing.assert_allclose(two.directions, none.directions, atol=1e-5)
    np.testing.assert_allclose(two.strengths, none.strengths, atol=1e-5)
