"""Weights that a checkpoint holds packed: which tensors belong to one, their values, and packing values again.

A packed weight is codes (numbers of few bits) times scales, a scale for each block of them. Known, by what lies in the
files: float8 with a scale for the tensor, each row or each block (DeepSeek's `weight_scale_inv`, ModelOpt's and
compressed-tensors' `weight_scale`); MXFP4 (gpt-oss' `_blocks` and `_scales`, and as compressed-tensors and DeepSeek lay
it out) and MXFP8, whose scales are powers of two (OCP Microscaling Formats, 1.0); NVFP4, whose scales are float8 times
one of the tensor's (ModelOpt, compressed-tensors); bitsandbytes' NF4 and FP4 (Dettmers 2023, "QLoRA") and 8 bits;
8-bit integers with float scales. No torch here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from abliterate.common.errors import ModelError
from abliterate.edit.stored_tensor import Shape
from abliterate.models.packing import E2M1, E4M3, Matrix, Scales, floats, integers, table
from abliterate.models.shards import FLOATS, SINGLE, Checkpoint, StoredRange, read_index, read_shard

Array = np.ndarray[Any, Any]

_FLOAT8 = {"F8_E4M3": E4M3, "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
_EXPONENTS = ("U8", "F8_E8M0")
_STATE = ".quant_state.bitsandbytes__"  # of a 4-bit weight: its shape and the like, as JSON
_BLOCK = 128  # side of a block of float8 where nothing says it: DeepSeek's


@dataclass(frozen=True)
class Packed:
    """A weight that is packed in a checkpoint.

    Attributes:
        name: its name in a checkpoint that isn't packed, by which recipes know it.
        kind: the format, for people.
        shape: of its values; `turned`: they lie transposed, [..., column, row].
        parts: what each of its tensors is ("codes", "scale", ...) -> where it lies.
        facts: what its tensors don't say: the side of a block, ...
    """

    name: str
    kind: str
    shape: Shape
    parts: dict[str, StoredRange]
    turned: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def raw(self, checkpoint: Checkpoint) -> dict[str, bytearray]:
        """What lies in a checkpoint's files of each of its tensors, by what it is."""
        return {role: checkpoint.raw(part.name) for role, part in self.parts.items()}

    def matrices(self, raw: Mapping[str, bytearray]) -> list[Matrix]:
        """Its matrices, views into the bytes of its parts: what is written to them is written there."""
        held = {role: np.frombuffer(raw[role], np.uint8) for role in self.parts}
        rows, columns = (self.shape[:1] + self.shape)[-2:][:: -1 if self.turned else 1]
        if "state" in self.parts:
            return [self._four_bits(held)]
        codes = held["codes"].reshape(_count(self.shape) // (rows * columns), rows, -1)
        kind = self.facts["codes"]
        made = integers() if kind == "integers" else floats((_FLOAT8 | {"E2M1": E2M1})[kind])
        scale = self.parts["scale"]
        dtype = np.dtype(np.uint8) if scale.dtype in _EXPONENTS else (FLOATS | _FLOAT8)[scale.dtype]
        grid: Array = held["scale"].view(dtype).reshape(_grid(scale.shape, len(codes), rows))
        over = held["over"].view(np.float32) if "over" in held else None
        block = _block((rows, columns), grid.shape[1:], self.facts.get("block"))
        return [
            Matrix(
                one, Scales(grid[min(i, len(grid) - 1)], self.facts.get("unit", 1.0), over, "inverse" in self.facts),
                made, block, fixed=len(codes) > len(grid),
            )
            for i, one in enumerate(codes)
        ]  # fmt: skip

    def _four_bits(self, held: Mapping[str, Array]) -> Matrix:
        state = json.loads(held["state"].tobytes())
        stored = held["scale"] if "nested" in held else held["scale"].view(np.float32)
        nested = None
        if "nested" in held:
            numbers, sizes = (held[role].view(np.float32) for role in ("nested_map", "nested"))
            nested = numbers, sizes, float(state["nested_offset"]), int(state["nested_blocksize"])
        rows = _count(self.shape) // self.shape[-1]
        scales = Scales(stored.reshape(1, -1), nested=nested)
        codes = table(held["map"].view(np.float32))
        return Matrix(held["codes"].reshape(rows, -1), scales, codes, (1, int(state["blocksize"])), flat=True)

    def values(self, raw: Mapping[str, bytearray]) -> Array:
        """All of it as an unpacked checkpoint would hold it, float32."""
        values = np.stack([matrix.values() for matrix in self.matrices(raw)])
        return (values.swapaxes(1, 2) if self.turned else values).reshape(self.shape)


def _count(shape: Shape) -> int:
    return int(np.prod(shape))


def _grid(shape: Shape, matrices: int, rows: int) -> Shape:
    """The shape [matrix, row of blocks, column of blocks] of scales."""
    count = _count(shape)
    if count in (1, matrices):
        return (count, 1, 1)
    if len(shape) == 1 or (len(shape) == 2 and matrices > 1 and shape[0] == matrices):
        return (count // rows, rows, 1)
    return (count // _count(shape[-2:]), *shape[-2:])


def _block(shape: Shape, grid: Shape, said: Any) -> tuple[int, int]:
    """How many rows and columns share a scale, of a matrix and the grid of its scales."""
    sides = []
    for axis in (0, 1):
        size, count = shape[axis], grid[axis]
        tried = [int(said[axis])] if isinstance(said, list) and len(said) == 2 else []
        tried += [size // count] * (size % count == 0) + [_BLOCK]
        sides.append(next((side for side in tried if side > 0 and -(-size // side) == count), -(-size // count)))
    return sides[0], sides[1]


def packed_in(checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> dict[str, Packed]:
    """The packed weights of a checkpoint, by the names that they have in one that isn't.

    Args:
        checkpoint: all of its tensors.
        config: its config.json, for the side of blocks.
    """
    return _find(checkpoint.ranges, checkpoint.raw, config)


def _find(
    tensors: Mapping[str, StoredRange], raw: Callable[[str], bytearray], config: Mapping[str, Any] | None = None
) -> dict[str, Packed]:
    said = (config or {}).get("quantization_config")
    block = said.get("weight_block_size") if isinstance(said, dict) else None
    found = [one for name in tensors if (one := _packed(name, tensors, raw, block)) is not None]
    beside = {part.name for one in found for role, part in one.parts.items() if role != "codes"}  # scales of float8
    return {one.name: one for one in found if one.parts["codes"].name not in beside}


def checkpoint_shapes(folder: str | os.PathLike[str]) -> dict[str, Shape | None]:
    """The names of a folder's tensors and their shapes, from the safetensors headers; None where the index names
    a tensor whose file is not there. A packed weight has its name and shape unpacked, and no scales.

    Raises:
        ModelError: when there are no safetensors files and no index, or a header is damaged.
    """
    folder = Path(folder)
    index = read_index(folder)
    single = [folder / SINGLE] if (folder / SINGLE).is_file() else folder.glob("*.safetensors")
    files = {folder / file for file in index["weight_map"].values()} if index else set(single)
    if not files:
        raise ModelError(f"model folder {folder} holds no *.safetensors; only those are read")
    shards = {file: read_shard(file) for file in sorted(files) if file.is_file()}
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.tensors.items()}
    where = {name: shard for shard in shards.values() for name in shard.tensors}
    shapes: dict[str, Shape | None] = dict.fromkeys(index["weight_map"]) if index else {}
    shapes |= {name: tensor.shape for name, tensor in tensors.items()}
    return unpacked_shapes(shapes, _find(tensors, lambda name: where[name].raw(name)))


def unpacked_shapes(shapes: Mapping[str, Shape | None], packed: Mapping[str, Packed]) -> dict[str, Shape | None]:
    """Names and shapes of a checkpoint's tensors as if its packed weights weren't."""
    parts = parts_of(packed)
    return {n: shape for n, shape in shapes.items() if n not in parts} | {n: one.shape for n, one in packed.items()}


def parts_of(packed: Mapping[str, Packed]) -> set[str]:
    """The names of all tensors that belong to packed weights."""
    return {part.name for one in packed.values() for part in one.parts.values()}


def _packed(
    name: str, tensors: Mapping[str, StoredRange], raw: Callable[[str], bytearray], block: Any
) -> Packed | None:
    """The packed weight whose codes a tensor is; None where it is none, or its scales aren't there."""
    codes = tensors[name]
    stem = name.removesuffix(".weight")
    if name.endswith("_blocks") and codes.dtype == "U8" and len(codes.shape) > 3:
        scale = tensors.get(name.removesuffix("_blocks") + "_scales")
        *lead, rows, groups, size = codes.shape
        parts = {"codes": codes} | ({"scale": scale} if scale else {})
        shape = (*lead, groups * size * 2, rows)
        return Packed(name.removesuffix("_blocks"), "MXFP4", shape, parts, True, {"codes": "E2M1"}) if scale else None
    state = next((tensors[k] for kind in ("nf4", "fp4") if (k := name + _STATE + kind) in tensors), None)
    if state is not None:
        shape = tuple(json.loads(raw(state.name))["shape"])
        return _bitsandbytes(name, shape, codes, state, tensors)
    if codes.dtype == "I8" and stem + ".SCB" in tensors:
        facts = {"codes": "integers", "unit": 1 / 127}
        parts = {"codes": codes, "scale": tensors[stem + ".SCB"]}
        return Packed(name, "8 bits of bitsandbytes", codes.shape, parts, facts=facts)
    if codes.dtype not in (*_FLOAT8, "U8", "I8") or len(codes.shape) < 2:
        return None
    plain = name.removesuffix("_packed")
    endings = (f"{plain}_scale_inv", f"{plain}_scale", f"{stem}.scale", f"{stem}.qscale_weight")
    scale = next((tensors[ending] for ending in endings if ending in tensors), None)
    if scale is None or f"{plain}_zero_point" in tensors:
        return None
    parts = {"codes": codes, "scale": scale}
    if codes.dtype in _FLOAT8:
        known = scale.dtype in (*FLOATS, *_EXPONENTS)
        kind = "MXFP8" if scale.dtype in _EXPONENTS else "FP8"
        return Packed(name, kind, codes.shape, parts, facts={"codes": codes.dtype, "block": block}) if known else None
    if codes.dtype == "I8" and scale.dtype in FLOATS:
        return Packed(name, "INT8", codes.shape, parts, facts={"codes": "integers"})
    shape, facts = (*codes.shape[:-1], 2 * codes.shape[-1]), {"codes": "E2M1"}
    if scale.dtype in _EXPONENTS:
        return Packed(plain, "MXFP4", shape, parts, facts=facts)
    for ending, inverse in (("_scale_2", {}), ("_global_scale", {"inverse": True})):
        over = tensors.get(plain + ending)
        if over is not None and over.dtype == "F32" and _count(over.shape) == 1 and scale.dtype == "F8_E4M3":
            return Packed(plain, "NVFP4", shape, parts | {"over": over}, facts=facts | inverse)
    return None


def _bitsandbytes(
    name: str, shape: Shape, codes: StoredRange, state: StoredRange, tensors: Mapping[str, StoredRange]
) -> Packed | None:
    parts = {"codes": codes, "state": state}
    for role, ending in (("scale", "absmax"), ("map", "quant_map"), ("nested", "nested_absmax"),
                         ("nested_map", "nested_quant_map")):  # fmt: skip
        if f"{name}.{ending}" in tensors:
            parts[role] = tensors[f"{name}.{ending}"]
    whole = {"scale", "map"} <= set(parts)
    return Packed(name, "4 bits of bitsandbytes", shape, parts) if whole else None
