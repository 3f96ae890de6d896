"""Small GGUF files for tests, written with the gguf package, and recipes that fit them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from abliterate.apply.forms import ApplyOptions
from abliterate.common.reporting import Silent
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe
from abliterate.models.gguf.file import open_gguf
from abliterate.models.gguf.types import pack, unpack

BLOCKS, WIDTH, INNER, VOCABULARY = 2, 32, 64, 40
SIMPLE = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
OVERWRITE = ApplyOptions(overwrite=True)
SILENT = Silent()


def write_model(
    path: Path,
    kind: str = "F32",
    *,
    architecture: str = "llama",
    width: int = WIDTH,
    inner: int = INNER,
    untied: bool = False,
    biases: bool = False,
    down_biases: bool = False,
    experts: int = 0,
    blocks: int = BLOCKS,
    seed: int = 0,
) -> Path:
    """A Llama's tensors, the matrices of one type, the vectors float32; not one llama.cpp could run."""
    generator = np.random.default_rng(seed)

    def random(*shape: int) -> np.ndarray:
        return (generator.normal(size=shape) / 8).astype(np.float32)

    writer = GGUFWriter(path, architecture)
    writer.add_block_count(blocks)
    writer.add_embedding_length(width)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(VOCABULARY)])
    matrices = {"token_embd.weight": random(VOCABULARY, width)}
    vectors = {"output_norm.weight": random(width)}
    if untied:
        matrices["output.weight"] = random(VOCABULARY, width)
    for block in range(blocks):
        matrices[f"blk.{block}.attn_q.weight"] = random(width, width)
        matrices[f"blk.{block}.attn_output.weight"] = random(width, width)
        vectors[f"blk.{block}.attn_norm.weight"] = random(width)
        if experts:
            matrices[f"blk.{block}.ffn_down_exps.weight"] = random(experts, width, inner)
        else:
            matrices[f"blk.{block}.ffn_down.weight"] = random(width, inner)
        if biases:
            vectors[f"blk.{block}.attn_output.bias"] = random(width)
        if down_biases:
            vectors[f"blk.{block}.ffn_down.bias"] = random(width)
    for name, values in matrices.items():
        writer.add_tensor(name, pack(values, kind), raw_dtype=GGMLQuantizationType[kind])
    for name, values in vectors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def names(*, experts: bool = False, embedding: bool = True) -> list[str]:
    """The writers of such a model, by their names in a checkpoint."""
    down = "mlp.experts.down_proj" if experts else "mlp.down_proj.weight"
    inside = [f"model.layers.{b}.{w}" for b in range(BLOCKS) for w in ("self_attn.o_proj.weight", down)]
    return ["model.embed_tokens.weight", *inside] if embedding else inside


def recipe_of(
    writers: Sequence[str], strength: float = 1.0, *, width: int = WIDTH, directions: int = 1, seed: int = 0,
    **model: Any,
) -> Recipe:  # fmt: skip
    """A recipe that takes random directions out of writers."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.randn(directions, width, generator=generator, dtype=torch.float64)
    return Recipe(Edit.from_names(dict.fromkeys(writers, strength), span), model)


def values_of(path: Path, name: str) -> np.ndarray:
    """A tensor's values, float32."""
    file = open_gguf(path)
    return unpack(np.array(file.raw(file.tensors[name])), file.tensors[name].kind)


def bytes_of(path: Path, name: str) -> bytes:
    file = open_gguf(path)
    return bytes(file.raw(file.tensors[name]))
