"""Which devices a model is put on: what is there, what options say, and what transformers is told."""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from abliterate.common.errors import ModelError
from abliterate.common.files import cache
from abliterate.models.shards import open_checkpoint

SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
_SIZE = re.compile(r"(\d+|cpu|mps)=(\d+(?:\.\d+)?) ?([KMGT]?i?)B", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def default_kind() -> str:
    """The kind of device that is used where nothing is said: "cuda", "mps", "xpu", ... or "cpu"."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def devices_here() -> list[str]:
    """Every device of this machine that a model can be put on, as --device takes it."""
    kind = default_kind()
    if kind in ("cpu", "mps"):
        return list(dict.fromkeys((kind, "cpu")))
    return [*(f"{kind}:{index}" for index in range(torch.accelerator.device_count())), "cpu"]


def placing(
    device: str | None = None, device_map: str | None = None, max_memory: str | None = None,
    tensor_parallel: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What `from_pretrained` is told of devices.

    Args:
        device: one device for all of the model.
        device_map: the same, or a way of transformers to spread it: "auto", "balanced", "sequential".
        max_memory: the most bytes of weights on each device, as "0=20GiB,cpu=60GiB"; what is left goes to disk.
        tensor_parallel: every matrix spread over the processes that torchrun started.

    Raises:
        ModelError: a device that isn't there, a size that isn't one, or options that contradict each other.
    """
    if tensor_parallel:
        if device or device_map or max_memory:
            raise ModelError("--tensor-parallel spreads the model itself; leave the other options for devices out")
        return _tensor_parallel()
    if device and device_map:
        raise ModelError("--device and --device-map say the same thing; give one of them")
    wanted = device or device_map
    limits = _limits(max_memory) if max_memory else {}
    if wanted in SPREADING or (limits and wanted is None):
        return {"device_map": wanted or "auto", **({"max_memory": limits} if limits else {})}
    if limits:
        raise ModelError("--max-memory is for a model that is spread; give it with --device-map auto, or alone")
    if wanted is None:
        kind = default_kind()
        return {} if kind == "cpu" else {"device_map": kind if kind == "mps" else "auto"}
    if wanted not in (here := devices_here()) and f"{wanted}:0" not in here:
        ways = f", or one of {', '.join(SPREADING)}" if device_map else ""
        raise ModelError(f"device {wanted} isn't on this machine; here there are: {', '.join(here)}{ways}")
    return {"device_map": wanted}


def _limits(text: str) -> dict[int | str, int]:
    """The bytes allowed on each device, GPUs by number."""
    found: dict[int | str, int] = {}
    for part in text.split(","):
        match = _SIZE.fullmatch(part.strip())
        if match is None:
            raise ModelError(f"--max-memory: '{part.strip()}' is no device with a size; write it as 0=20GiB,cpu=60GiB")
        name = match[1].lower()
        found[int(name) if name.isdigit() else name] = int(float(match[2]) * _UNITS[match[3].lower()])
    gpus = 0 if default_kind() in ("cpu", "mps") else torch.accelerator.device_count()
    for name in found:
        if (name == "mps" and default_kind() != "mps") or (isinstance(name, int) and name >= gpus):
            raise ModelError(f"--max-memory: device {name} isn't on this machine; here there are: {listing()}")
    return found


def listing() -> str:
    """This machine's devices in words."""
    return ", ".join(devices_here())


def check_room(source: str, folder: Path, limits: Mapping[int | str, int], item: int) -> None:
    """Raise ModelError when the device that computes can't hold the largest block of a model.

    Args:
        source: the model's name.
        folder: with its safetensors.
        limits: the bytes allowed on each device.
        item: bytes a weight will take.
    """
    largest, size = largest_block(folder, item)
    main = min(limits, key=lambda name: (isinstance(name, str), str(name)))  # the first GPU, else the CPU
    if size > limits[main]:
        raise ModelError(
            f"--max-memory: {main} is given {limits[main] / 2**20:,.2f} MiB, and {largest} of {source} alone takes "
            f"{size / 2**20:,.2f} MiB; give it more"
        )


def largest_block(folder: Path, item: int) -> tuple[str, int]:
    """The name and bytes of the largest block, or weight outside of them, of a folder's safetensors."""
    sizes: dict[str, int] = {}
    for shard in open_checkpoint(folder).shards.values():
        for name, tensor in shard.tensors.items():
            block = re.match(r".*?\.\d+(?=\.)", name)
            key = block[0] if block else name
            sizes[key] = sizes.get(key, 0) + math.prod(tensor.shape) * item
    return max(sizes.items(), key=lambda entry: entry[1])


def room_on_disk(folder: str | None) -> tempfile.TemporaryDirectory[str]:
    """A new folder for weights that transformers must write down to bring them for each pass; gone with the object.

    Args:
        folder: in which it is made; None for the cache.

    Raises:
        ModelError: when it can't be written.
    """
    if folder is None:
        place = cache() / "offload"
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
    else:
        place = Path(folder).expanduser()
    try:
        return tempfile.TemporaryDirectory(prefix="weights-", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise ModelError(
            f"offload folder {place} can't be written: {(error.strerror or str(error)).lower()}; name a folder that is "
            "there with --offload-folder"
        ) from error


def _tensor_parallel() -> dict[str, Any]:
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ModelError(
            "--tensor-parallel needs several processes: torchrun --nproc-per-node N -m abliterate run MODEL "
            "--tensor-parallel"
        )
    from transformers import distributed

    config: Any = distributed.DistributedConfig
    if "tp_plan" in config.__dataclass_fields__:
        return {"distributed_config": config(tp_plan="auto")}
    return {"tp_plan": "auto"}
