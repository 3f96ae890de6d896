"""Models whose weights are packed: by bitsandbytes as they are loaded, or in their files by whatever made them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.common.errors import ModelError, listed, shorten
from abliterate.models.packed import packed_in, parts_of
from abliterate.models.placement import sharded
from abliterate.models.shards import DTYPE_BITS, open_checkpoint

# How a model whose weights can't be edited can be edited all the same.
WAY_ROUND = (
    "run on its unquantised original, and use the recipe here as an adapter (abliterate apply RECIPE ORIGINAL --as "
    "adapter), or quantise the edited model"
)
# Names of tensors that say how others are packed.
_PACKING = re.compile(
    r"scale_inv|weight_scale|weight_packed|qweight|qzeros|absmax|quant_(map|state)|zero_point|\.scales$"
)
# Of a checkpoint with values of 8 bits, any that may be what those are to be multiplied with.
_SCALES = re.compile(f"{_PACKING.pattern}|scale|zeros?$|codebook|scb$|quant|scaled_fp8|biases$|g_idx", re.IGNORECASE)
# What these load are modules without weights that can be seen, let alone changed.
_OPAQUE = ("awq", "gptq", "auto-round")


def quantisation_of(config: Any) -> tuple[str, dict[str, Any]] | None:
    """By which method a config says that its weights are packed, and the rest that it says; None for plain weights."""
    packed = getattr(config, "quantization_config", None)
    found = packed if isinstance(packed, dict) else getattr(packed, "__dict__", {})
    mlx = getattr(config, "quantization", None)
    if not found and isinstance(mlx, dict) and "group_size" in mlx:
        found = mlx
    if not found:
        return None
    method = found.get("quant_method")
    if method is None and {"bits", "group_size"} <= set(found):
        return "mlx", found
    if method is None and any(key.startswith("load_in") for key in found):
        return "bitsandbytes", found
    return str(getattr(method, "value", method)), found


def check_method(source: str, folder: Path, config: Any, quantise: str | None) -> tuple[str | None, Path]:
    """See that a model packed in its files can be loaded; have transformers unpack it where it can, else do it.

    Returns:
        The method by which it is packed and comes unpacked, None of a plain one, or one that stays packed; and the
        folder to read.

    Raises:
        ModelError: when it is packed by a method that gives no weights to look at, or that transformers doesn't know.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    found = quantisation_of(config)
    if found is None and (folder / "hf_quant_config.json").is_file():  # where ModelOpt says it, besides or instead
        found = "modelopt", {}
    if found is None:
        return None, folder
    method, settings = found
    if quantise and method != "bitsandbytes":
        raise ModelError(f"model {source} is quantised already ({method}); leave out --quantise {quantise}")
    if method == "mlx":
        raise ModelError(f"model {source} can't be loaded: it is quantised for Apple's MLX; {WAY_ROUND}")
    if method in _OPAQUE:
        raise ModelError(f"model {source} is quantised ({method}), and such weights can't be edited; {WAY_ROUND}")
    if method == "bitsandbytes":
        return None, folder
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    ready = method != "compressed-tensors" or find_spec("compressed_tensors") is not None
    if kind is not None and ready and "dequantize" in inspect.signature(kind).parameters:
        config.quantization_config = {**settings, "quant_method": method, "dequantize": True}
        return method, folder
    if _is_known(folder):
        from abliterate.models.unpacked import unpacked

        config.__dict__.pop("quantization_config", None)
        return method, unpacked(folder)
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelError(
            f"model {source} can't be loaded: it is quantised in a way that transformers doesn't know ({method}); "
            f"{WAY_ROUND}"
        )
    return None, folder


def _is_known(folder: Path) -> bool:
    """Whether a folder's weights are packed in formats that `packed` knows, and none in another."""
    checkpoint = open_checkpoint(folder)
    packed = packed_in(checkpoint)
    parts = parts_of(packed)
    return bool(packed) and not any(_PACKING.search(name) for name in checkpoint.files if name not in parts)


def bitsandbytes(quantise: str) -> Any:
    """How bitsandbytes packs a model as it is loaded."""
    from transformers import BitsAndBytesConfig

    if quantise not in ("4bit", "8bit"):
        raise ModelError(f"unknown quantisation '{quantise}'; choose 4bit or 8bit")
    if find_spec("bitsandbytes") is None:
        raise ModelError(f'--quantise {quantise} needs bitsandbytes: pip install "abliterate[quantised]"')
    if quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip


def keep_gradients(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU: gradients don't pass the kernel for the packed ones.

    It repacks a layer at its first forward without gradients, for good, and gives zeros for gradients from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_plain(parameter: Tensor) -> bool:
    """Whether a parameter is an ordinary one of 16 bits or more, whose values can be changed where they are."""
    kinds = (nn.Parameter, Tensor)
    plain = type(parameter) in kinds and type(parameter.data) is Tensor
    return plain and parameter.is_floating_point() and parameter.dtype.itemsize > 1


def packed_as(model: Any) -> str | None:
    """How the weights of a loaded model are packed, read off its modules: "4bit", "8bit" (bitsandbytes), or another
    method's name; None when all that have two dimensions and more are plain."""
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    for kind, bits in (("Params4bit", "4bit"), ("Int8Params", "8bit")):
        if kind in kinds:
            return bits
    method = getattr(model, "quantization_method", None) if getattr(model, "is_quantized", False) else None
    if method is not None:
        return str(getattr(method, "value", method))
    odd = (p for p in model.parameters() if p.ndim > 1 and not is_plain(p) and not sharded(p))
    return next((shorten(f"{type(p.data).__name__} of {p.dtype}", 60) for p in odd), None)


def check_unread(source: str, model: Any, folder: Path, unread: Sequence[str]) -> None:
    """See that a model's tensors are the weights that its class takes them for.

    Args:
        unread: those of its files that the class doesn't read.

    Raises:
        ModelError: when such a tensor says how others are packed, or a weight is stored as whole numbers.
    """
    kinds = {name: place.dtype for name, place in open_checkpoint(folder).ranges.items()}
    said = quantisation_of(model.config) is not None
    small = not said and any(DTYPE_BITS[kind] <= 8 and kind != "BOOL" for n, kind in kinds.items() if n not in unread)
    if found := [name for name in unread if (_SCALES if small else _PACKING).search(name)]:
        problem = f"which {type(model).__name__} doesn't read: its weights are quantised, and wrong without them"
    elif not said and (found := [name for name, kind in kinds.items() if _is_whole(name, kind, unread)]):
        problem = "whole numbers: its weights are quantised, and config.json doesn't say how"
    else:
        return
    raise ModelError(f"model {source} can't be loaded: its files hold {listed(found)}, {problem}; {WAY_ROUND}")


def _is_whole(name: str, kind: str, unread: Sequence[str]) -> bool:
    return name.endswith(".weight") and kind[0] in "IU" and name not in unread
