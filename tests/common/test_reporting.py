"""What libraries write on standard error goes to the log, never to the terminal."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from abliterate.common.reporting import libraries_told
from models import save_tiny

SCRIPT = """
import logging, sys, warnings
from abliterate.cli import main
from abliterate.commands import inspect

def chatty(model):
    import torch, transformers
    warnings.warn("soon to be gone", FutureWarning)
    logging.getLogger("bitsandbytes.cextension").warning("Failed to load CPU gemm_4bit_forward")
    for name in ("accelerate", "peft", "trl", "torch"):
        logging.getLogger(name).warning(f"{name} has a remark")
    transformers.utils.logging.get_logger("transformers.models").warning("a model's remark")
    print("a bar", file=sys.stderr)
    return model

inspect.source_of = chatty
sys.argv[0] = "abliterate"
main()
"""


@pytest.mark.slow
def test_libraries_warn_in_the_log_file_alone(tmp_path):
    model, log = save_tiny(tmp_path / "model"), tmp_path / "log"
    command = [sys.executable, "-c", SCRIPT, "inspect", str(model), "--log-file", str(log)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "loading" in done.stderr
    kept = log.read_text()
    for said in ("FutureWarning: soon to be gone", "Failed to load CPU gemm_4bit_forward", "a model's remark", "a bar",
                 *(f"{name} has a remark" for name in ("accelerate", "peft", "trl", "torch"))):  # fmt: skip
        assert said in kept and said not in done.stdout


def test_what_outlives_a_job_is_told_to_the_next(capsys):
    first, second = [], []
    logger = logging.getLogger("a library")
    with libraries_told(first.append):
        logger.addHandler(logging.StreamHandler())
        logger.warning("one")
    logger.warning("between")
    with libraries_told(second.append):
        logger.warning("two")
    print("ours", file=sys.stderr)
    assert (first, second) == (["one"], ["two"])
    assert capsys.readouterr().err == "ours\n"
