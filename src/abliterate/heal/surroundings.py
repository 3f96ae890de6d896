"""What surrounds a training: libraries kept quiet, trackers offline, and running out of memory said in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator

import torch

from abliterate.common.errors import AbliterateError
from abliterate.models.memory import out_of_memory
from abliterate.settings.heal import HealSettings

TALKATIVE = ("trl", "accelerate", "peft", "bitsandbytes", "torch.distributed")


def resolve_auto(heal: HealSettings) -> HealSettings:
    """The settings with each "auto" replaced by what it comes to on this machine.

    Raises:
        AbliterateError: 4 bits were asked for without bitsandbytes.
    """
    cuda = torch.cuda.is_available()
    bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    if heal.quantise == "4bit" and not bitsandbytes:
        raise AbliterateError("--quantise 4bit needs bitsandbytes: pip install 'abliterate[quantised]'; or pass none")
    auto = {
        "quantise": "4bit" if cuda and bitsandbytes else "none",
        "optimizer": "paged_adamw_8bit" if cuda and bitsandbytes else "adamw_torch",
        "bf16": "yes" if cuda and torch.cuda.is_bf16_supported() else "no",
    }
    return heal.model_copy(update={name: value for name, value in auto.items() if getattr(heal, name) == "auto"})


def check_packages(heal: HealSettings) -> None:
    """Raise AbliterateError, saying what to install, when the preset or a tracker needs a package that isn't there."""
    if heal.preset != "dpo":
        return
    needed = dict.fromkeys(("trl", "tensorboard"), ("--preset dpo", "abliterate[heal]"))
    if heal.report_to != "none":
        needed[heal.report_to] = (f"--report-to {heal.report_to}", heal.report_to)
    for package, (option, install) in needed.items():
        if importlib.util.find_spec(package) is None:
            raise AbliterateError(f"{option} needs {package}, which isn't installed: pip install '{install}'")


@contextlib.contextmanager
def surroundings(heal: HealSettings) -> Iterator[None]:
    """For a training: quiet libraries, trackers that stay on this machine, and advice where memory runs out."""
    with _quiet_libraries(), _offline_trackers(heal), memory_advised(heal):
        yield


@contextlib.contextmanager
def memory_advised(heal: HealSettings) -> Iterator[None]:
    """Turn running out of memory, on a GPU or the CPU, into one error with what makes the training smaller.

    Raises:
        AbliterateError: in place of torch's, or MemoryError.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise AbliterateError(_advice(heal)) from error
        raise


def _advice(heal: HealSettings) -> str:
    advice = [f"--max-length {max(heal.max_length // 2, 8)}"]
    if heal.micro_batch > 1:
        advice.append(f"--micro-batch {heal.micro_batch // 2} --accumulation {heal.accumulation * 2}")
    if not heal.gradient_checkpointing:
        advice.append("--gradient-checkpointing")
    if resolve_auto(heal).quantise != "4bit":
        missing = importlib.util.find_spec("bitsandbytes") is None
        advice.append(f"--quantise 4bit{' (pip install abliterate[quantised])' if missing else ''}")
    advice.append(f"--rank {max(heal.rank // 4, 1)}")
    return (
        f"out of memory: training with sequences of {heal.max_length} tokens, {heal.micro_batch} at once, doesn't fit; "
        f"try, in this order: {', '.join(advice)}, or several GPUs with --launch"
    )


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No bars, warnings or telemetry of datasets, transformers, peft and trl; put back afterwards."""
    import datasets
    from huggingface_hub import constants
    from transformers.utils import logging as hf_logging

    with contextlib.ExitStack() as after, warnings.catch_warnings():
        if not datasets.are_progress_bars_disabled():
            after.callback(datasets.enable_progress_bars)
        after.callback(hf_logging.set_verbosity, hf_logging.get_verbosity())
        after.callback(setattr, constants, "HF_HUB_DISABLE_TELEMETRY", constants.HF_HUB_DISABLE_TELEMETRY)
        for logger in map(logging.getLogger, TALKATIVE):
            after.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        hf_logging.set_verbosity_error()
        constants.HF_HUB_DISABLE_TELEMETRY = True
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _offline_trackers(heal: HealSettings) -> Iterator[None]:
    """W&B writes to disk only, unless WANDB_MODE says otherwise; trackio is local by itself."""
    with contextlib.ExitStack() as after:
        if heal.report_to == "wandb" and "WANDB_MODE" not in os.environ:
            os.environ["WANDB_MODE"] = "offline"
            after.callback(os.environ.pop, "WANDB_MODE", None)
        yield
