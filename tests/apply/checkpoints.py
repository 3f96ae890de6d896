"""Hand-made checkpoints and recipes for them: safetensors folders that no transformers model need fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from abliterate.apply.forms import ApplyOptions, apply_recipe
from abliterate.common.reporting import Silent
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe
from abliterate.edit.stored_tensor import StoredGain, StoredTensor

D_MODEL = 16
Shards = dict[str, dict[str, torch.Tensor]]


def write_checkpoint(folder: Path, shards: Shards, config: dict[str, Any] | None = None) -> Path:
    """A folder with these shards (file name -> tensors), an index if there are several, and a config."""
    folder.mkdir(parents=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt", "made": file})
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        total = sum(t.nbytes for tensors in shards.values() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "odd", "_name_or_path": "../me/x"}))
    return folder


def small_shards(dtype: torch.dtype = torch.bfloat16) -> Shards:
    """Two shards: an embedding, a projection with a bias, fused experts both ways, a post-norm in the other shard."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "model-00001-of-00002.safetensors": {
            "embed.weight": draw(50, D_MODEL), "a.weight": draw(D_MODEL, 24), "a.bias": draw(D_MODEL),
            "experts": draw(3, D_MODEL, 8), "rotary.inv_freq": draw(4), "norm.weight": 0.1 * draw(D_MODEL),
        },
        "model-00002-of-00002.safetensors": {
            "turned_experts": draw(3, 8, D_MODEL), "turned_experts_bias": draw(3, D_MODEL),
            "b.weight": draw(D_MODEL, 7), "steps": torch.arange(5),
        },
    }  # fmt: skip


ENTRIES = {
    "embed": (StoredTensor("embed.weight", (50, D_MODEL), 1),),
    "a": (StoredTensor("a.weight", (D_MODEL, 24), 0), StoredTensor("a.bias", (D_MODEL,), 0, bias=True)),
    "experts": (StoredTensor("experts", (3, D_MODEL, 8), 1),),
    "turned": (
        StoredTensor("turned_experts", (3, 8, D_MODEL), 2),
        StoredTensor("turned_experts_bias", (3, D_MODEL), 1, bias=True),
    ),
    "b": (StoredTensor("b.weight", (D_MODEL, 7), 0, gain=StoredGain("norm.weight", 1.0)),),
}


def small_recipe(strength: float = 1.0, directions: int = 1, **model: Any) -> Recipe:
    """A recipe for `small_shards`, without a config hash: no transformers model has this config."""
    generator = torch.Generator().manual_seed(4)
    span = torch.randn(directions, D_MODEL, generator=generator)
    edit = Edit.from_names(dict.fromkeys(ENTRIES, strength), span)
    return Recipe(edit, {"embedding": "embed.weight", "head": None, **model}, {}, ENTRIES)


def apply_to(recipe: Recipe, folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Apply a recipe as a checkpoint."""
    return apply_recipe(recipe, str(folder), out, "checkpoint", ApplyOptions(**options), Silent())
