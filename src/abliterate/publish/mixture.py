"""Which type each tensor of a GGUF gets: llama-quantize's names, and the mixtures of types that they stand for.

After llama.cpp's `llama_tensor_get_type_impl` (llama-quant.cpp), without an importance matrix.
"""

from __future__ import annotations

import re

from abliterate.apply.gguf.names import EMBEDDING, HEAD
from abliterate.models.gguf.file import GgufFile, GgufTensor
from abliterate.models.gguf.types import layout_of

# The name: llama.h's llama_ftype, and the type that most tensors get.
MIXTURES = {
    "Q4_0": (2, "Q4_0"), "Q4_1": (3, "Q4_1"), "Q5_0": (8, "Q5_0"), "Q5_1": (9, "Q5_1"), "Q2_K": (10, "Q2_K"),
    "Q3_K_S": (11, "Q3_K"), "Q3_K_M": (12, "Q3_K"), "Q3_K_L": (13, "Q3_K"), "Q4_K_S": (14, "Q4_K"),
    "Q4_K_M": (15, "Q4_K"), "Q5_K_S": (16, "Q5_K"), "Q5_K_M": (17, "Q5_K"), "Q6_K": (18, "Q6_K"),
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# For rows that don't divide into blocks of 256.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")


def kinds(file: GgufFile, name: str) -> dict[str, str]:
    """The type of every tensor of a 16-bit file in a mixture; what the converter leaves in float32 stays.

    Args:
        file: the converter's.
        name: one of `MIXTURES`.
    """
    values = sorted((t for t in file.tensors if t.endswith(_VALUES)), key=_layer)
    return {tensor.name: _kind(tensor, name, file, values) for tensor in file.tensors.values()}


def _kind(tensor: GgufTensor, name: str, file: GgufFile, values: list[str]) -> str:
    if tensor.kind not in ("F16", "BF16") or len(tensor.shape) < 2:
        return tensor.kind
    kind, width = MIXTURES[name][1], tensor.shape[-1]
    if tensor.name == (HEAD if HEAD in file.tensors else EMBEDDING):
        kind = "Q8_0" if width % layout_of(kind).block or file.architecture == "falcon" else "Q6_K"
    elif tensor.name != EMBEDDING:
        kind = _in_block(tensor.name, name, file, values) or kind
    if width % layout_of(kind).block:
        kind = _FALLBACK.get(kind, tensor.kind)
    return tensor.kind if width % layout_of(kind).block else kind


def _in_block(tensor: str, name: str, file: GgufFile, values: list[str]) -> str | None:
    """The type of one of a block's matrices where it isn't the mixture's own."""
    layers, experts = file.number("block_count") or 1, file.number("expert_count") or 0
    if tensor.endswith(_VALUES):
        return _of_values(name, file, values.index(tensor), len(values), layers, experts)
    if tensor.endswith("attn_k.weight"):
        return "Q8_0" if experts == 8 else None
    if "ffn_down" in tensor:
        at = _layer(tensor)
        early = {"Q3_K_M": ("Q5_K" if at < layers // 16 else "Q4_K"), "Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}
        if name in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if _more_bits(at, layers) else None
        return early.get(name) or ("Q5_K" if name == "Q4_K_S" and at < layers // 8 else None)
    if tensor.endswith("attn_output.weight"):
        if experts == 8:
            return "Q5_K" if name in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M") else None
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(name)
    return None


def _of_values(name: str, file: GgufFile, at: int, count: int, layers: int, experts: int) -> str | None:
    """Of the attention's values, which suffer most."""
    if experts == 8:
        return "Q8_0"
    kind = None
    if name == "Q2_K":
        shared = (file.number("attention.head_count") or 1) // (file.number("attention.head_count_kv") or 1)
        kind = "Q4_K" if shared >= 4 else "Q3_K"
    elif name == "Q3_K_M":
        kind = "Q5_K" if at < 2 else "Q4_K"
    elif name == "Q3_K_L" or (name == "Q4_K_S" and at < 4):
        kind = "Q5_K"
    elif name in ("Q4_K_M", "Q5_K_M") and _more_bits(at, count):
        kind = "Q6_K"
    small = layers == 80 and (kind or MIXTURES[name][1]) in ("Q3_K", "Q4_K")  # a 70B: few values for many queries
    return "Q5_K" if small else kind


def _more_bits(at: int, count: int) -> bool:
    """The first and last eighth of the layers, and each third between."""
    return at < count // 8 or at >= 7 * count // 8 or (at - count // 8) % 3 == 2


def _layer(tensor: str) -> int:
    found = re.match(r"blk\.(\d+)\.", tensor)
    return int(found[1]) if found else 0
