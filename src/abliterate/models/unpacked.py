"""A packed folder as one of bfloat16, made once, for formats that transformers doesn't unpack itself."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import torch
from torch import Tensor

from abliterate.common.files import cache, check_space, made_once
from abliterate.models.gguf.convert import Stream
from abliterate.models.packed import Packed, packed_in, parts_of
from abliterate.models.shards import FLOATS, SINGLE, Checkpoint, open_checkpoint

_COPIED = 2**24  # bytes: what describes a model is smaller, weights in other formats are larger


def unpacked(folder: Path) -> Path:
    """The folder in the cache that holds a packed model's values in bfloat16; made when it isn't there.

    Memory: the largest tensor in float32.

    Args:
        folder: whose packed weights are all of formats that `packed` knows.

    Raises:
        OutputError: when the cache has no room.
    """
    checkpoint = open_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    facts = [
        str(folder.resolve()),
        [(s.path.stat().st_size, s.path.stat().st_mtime_ns) for s in checkpoint.shards.values()],
    ]
    name = hashlib.sha256(json.dumps([facts, config]).encode()).hexdigest()[:12]
    made = cache() / "unpacked" / f"{folder.resolve().name}-{name}"

    def make(temporary: Path) -> None:
        packed = packed_in(checkpoint, config)
        check_space(made, 4 * checkpoint.total)
        for file in folder.iterdir():
            if (
                file.is_file()
                and file.stat().st_size < _COPIED
                and not file.name.endswith((".safetensors", ".index.json"))
            ):
                shutil.copyfile(file, temporary / file.name)
        config.pop("quantization_config", None)
        (temporary / "config.json").write_text(json.dumps(config))
        with Stream(temporary / SINGLE, 400 * len(checkpoint.files)) as stream:
            for stored, tensor in _plain(checkpoint, packed):
                stream.add(stored, tensor)

    return made_once(made, make)


def _plain(checkpoint: Checkpoint, packed: dict[str, Packed]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, the packed ones as values; others that no model reads are left out."""
    parts = parts_of(packed)
    for name, place in checkpoint.ranges.items():
        if name not in parts and place.dtype in FLOATS:
            dtype = getattr(torch, FLOATS[place.dtype].name)
            yield name, torch.frombuffer(checkpoint.raw(name), dtype=dtype).reshape(place.shape)
    for name, one in packed.items():
        rounded = one.values(one.raw(checkpoint)).astype(ml_dtypes.bfloat16).view("int16")
        yield name, torch.from_numpy(rounded).view(torch.bfloat16)
