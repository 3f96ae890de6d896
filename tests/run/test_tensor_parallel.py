"""Two processes that hold one model together do what one does, and one of them writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from abliterate.edit.recipe import load_recipe
from command import SMALL, succeeds
from models import FAMILIES, save_tiny

TESTS = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def torchrun(*arguments):
    """Two processes; their output when both end well."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("family", ["llama_untied_biases", "gemma2"])
def test_every_stage(family, tmp_path):
    torchrun(TESTS / "tensor_parallel.py", save_tiny(tmp_path / family, FAMILIES[family]()))


def test_a_run_writes_once_what_one_process_writes(tiny_folder, tmp_path):
    options = [
        *SMALL,
        "--method",
        "sweep",
        "--force",
        "--dtype",
        "float32",
        "--also-prompts",
        "0",
        "--obligations",
        "0",
    ]
    succeeds("run", tiny_folder, "--out", tmp_path / "one", *options)
    out = torchrun("-m", "abliterate", "run", tiny_folder, "--out", tmp_path / "two", *options, "--tensor-parallel")
    assert out.count("recipe.safetensors") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    one, two = (load_recipe(tmp_path / name / "recipe.safetensors").edit for name in ("one", "two"))
    assert one.writers == two.writers
    assert np.allclose(one.directions, two.directions, atol=1e-4)
    files = {name: sorted(p.name for p in (tmp_path / name / "model").iterdir()) for name in ("one", "two")}
    assert files["one"] == files["two"]
