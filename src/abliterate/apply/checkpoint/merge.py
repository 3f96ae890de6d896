"""A LoRA merged into a checkpoint on disk: W <- W + scale B A, in float32 and rounded once, a tensor at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abliterate.apply.checkpoint.pieces import Change
from abliterate.common.errors import WriterError
from abliterate.edit.algebra import Factors
from abliterate.models.handle import Handle
from abliterate.models.shards import Checkpoint
from abliterate.models.stored import names_in

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LowRank:
    """B A, of which rows are made when they are asked for; float32 [rows, rank] and [rank, width]."""

    b: Array
    a: Array

    def __getitem__(self, rows: slice) -> Array:
        product: Array = self.b[rows] @ self.a
        return product


def merged(adapter: Path, handle: Handle, checkpoint: Checkpoint) -> dict[str, Change]:
    """What merging a PEFT LoRA does to each stored tensor.

    Args:
        adapter: its folder, of one rank and alpha.
        handle: the model it was trained on, merged or not.
        checkpoint: where that model's weights are.

    Raises:
        WriterError: when the adapter changes what isn't one tensor of the checkpoint.
    """
    from safetensors.torch import load_file
    from transformers.pytorch_utils import Conv1D

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    found = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): tensor.float().numpy()
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    owners = {id(parameter): name for name, parameter in handle.model.named_parameters()}
    sources, changes = names_in(handle.model, checkpoint.files), {}
    modules = {
        handle.module_names.get(m, "")
        for m in (handle.embedding, handle.model.get_output_embeddings())
        if m is not None
    }
    for name, a in found.items():
        module, dot, kind = name.rpartition(".")
        if not dot or kind not in ("lora_A", "lora_embedding_A"):
            continue
        b = found[f"{module}.{kind[:-1]}B"]
        layer: Any = handle.model.get_submodule(module)
        if kind == "lora_embedding_A" or isinstance(layer, Conv1D):
            a, b = b.T, a.T
        stored = sources.get(owners[id(layer.weight)], [])
        if len(stored) != 1 or checkpoint.tensor(stored[0]).shape != (len(b), a.shape[1]):
            raise WriterError(
                f"the adapter's {module} is no single tensor of {checkpoint.folder}, so it can't be merged there"
            )
        delta = LowRank(np.ascontiguousarray(scale * b, np.float32), np.ascontiguousarray(a, np.float32))
        nothing = np.zeros((0, len(b)), np.float32)
        changes[stored[0]] = Change(0, Factors(nothing, nothing), addition=delta)
    # PEFT keeps copies of embedding and head, as they are, beside a LoRA of one of them
    others = [name for name in found if "lora_" not in name and name.removesuffix(".base_layer") not in modules]
    if others:
        raise WriterError(f"the adapter {adapter} holds {others[0]}, which is no LoRA, so it can't be merged on disk")
    return changes
