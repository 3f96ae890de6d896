"""Weights packed as model makers pack them, written by their own rules, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Packed = dict[str, Tensor]  # what is put for a weight, by what is put behind its name less ".weight"
Pack = Callable[[Tensor], tuple[Packed, Tensor]]


def packed_folder(folder: Path, pack: Pack, names: list[str]) -> dict[str, Tensor]:
    """Pack these tensors of a folder; returns their values."""
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name in names:
        made, values[name] = pack(tensors.pop(name).float())
        tensors |= {name.removesuffix(".weight") + ending: tensor.contiguous() for ending, tensor in made.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return values


def fp8_blocks(weight: Tensor, side: int = 32) -> tuple[Packed, Tensor]:
    """DeepSeek's: float8 with a scale for each block."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % side, 0, -rows % side))
    blocks = padded.reshape(len(padded) // side, side, -1, side)
    scales = (blocks.abs().amax((1, 3)) / 448).clamp_min(1e-8)
    spread = scales.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :columns]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale_inv": scales}, codes.float() * spread


def fp8_tensor(weight: Tensor) -> tuple[Packed, Tensor]:
    """ModelOpt's: float8 with one scale, and one for what goes in."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scale, ".input_scale": torch.tensor(0.5)}, codes.float() * scale


def fp8_rows(weight: Tensor) -> tuple[Packed, Tensor]:
    """compressed-tensors': float8 with a scale for each row, in bfloat16."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scale}, codes.float() * scale.float()


def _fp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest numbers of 4 bits, and they packed, the first of two in the lower half of a byte."""
    index = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    codes = (index + 8 * (values < 0)).to(torch.uint8)
    return E2M1[index] * values.sign(), codes[..., ::2] | codes[..., 1::2] << 4


def nvfp4(weight: Tensor, *, compressed: bool = False) -> tuple[Packed, Tensor]:
    """ModelOpt's, or compressed-tensors': 4 bits with float8 scales of 16 values, and one for all."""
    blocks = weight.reshape(len(weight), -1, 16)
    over = weight.abs().max() / (6 * 448)
    scales = (blocks.abs().amax(-1) / 6 / over).to(torch.float8_e4m3fn)
    whole = (scales.float() * over)[..., None]
    numbers, codes = _fp4((blocks / whole.clamp_min(1e-30)).reshape(weight.shape))
    values = (numbers.reshape(blocks.shape) * whole).reshape(weight.shape)
    if compressed:
        return {".weight_packed": codes, ".weight_scale": scales, ".weight_global_scale": (1 / over)[None]}, values
    return {".weight": codes, ".weight_scale": scales, ".weight_scale_2": over}, values


def compressed_nvfp4(weight: Tensor) -> tuple[Packed, Tensor]:
    return nvfp4(weight, compressed=True)


def mxfp4(weight: Tensor) -> tuple[Packed, Tensor]:
    """4 bits with a power of two for 32 values, as DeepSeek lays it out."""
    blocks = weight.reshape(*weight.shape[:-1], -1, 32)
    power = blocks.abs().amax(-1).clamp_min(1e-30).log2().floor() - 2
    numbers, codes = _fp4((blocks / power.exp2()[..., None]).reshape(weight.shape))
    values = (numbers.reshape(blocks.shape) * power.exp2()[..., None]).reshape(weight.shape)
    return {
        ".weight": codes.view(torch.int8),
        ".scale": (power + 127).to(torch.uint8).view(torch.float8_e8m0fnu),
    }, values


def gpt_oss(weight: Tensor) -> tuple[Packed, Tensor]:
    """The same of stacked experts [expert, in, out], as gpt-oss lays it out: turned, in `_blocks` and `_scales`."""
    packed, values = mxfp4(weight.transpose(1, 2).contiguous())
    experts, rows, columns = values.shape
    codes = packed[".weight"].view(torch.uint8).reshape(experts, rows, columns // 32, 16)
    return {"_blocks": codes, "_scales": packed[".scale"].view(torch.uint8)}, values.transpose(1, 2)


def bits8(weight: Tensor) -> tuple[Packed, Tensor]:
    """bitsandbytes' 8 bits."""
    scale = weight.abs().amax(1)
    codes = (weight * 127 / scale[:, None]).round().to(torch.int8)
    return {".weight": codes, ".SCB": scale}, codes.float() * scale[:, None] / 127


def bits4(kind: str, nested: bool) -> Callable[[Tensor], tuple[Packed, Tensor]]:
    """bitsandbytes' own 4 bits."""

    def pack(weight: Tensor) -> tuple[Packed, Tensor]:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(weight.contiguous(), quant_type=kind, compress_statistics=nested)
        beside = {f".weight.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
        return {".weight": codes, **beside}, dequantize_4bit(codes, state).float()

    return pack


# Of each: how it packs, and what its numbers are off by, relative to a weight's size, when it is packed at random.
FORMATS: dict[str, tuple[Callable[[Tensor], tuple[Packed, Tensor]], float]] = {
    "fp8 in blocks": (fp8_blocks, 0.03), "fp8 per tensor": (fp8_tensor, 0.03), "fp8 per row": (fp8_rows, 0.03),
    "nvfp4": (nvfp4, 0.13), "nvfp4 compressed": (compressed_nvfp4, 0.13), "mxfp4": (mxfp4, 0.16),
    "8 bits": (bits8, 0.01), "nf4": (bits4("nf4", False), 0.11), "nf4 nested": (bits4("nf4", True), 0.11),
    "fp4": (bits4("fp4", False), 0.16),
}  # fmt: skip
