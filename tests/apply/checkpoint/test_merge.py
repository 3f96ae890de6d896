"""A LoRA merged into a checkpoint on disk is the one that PEFT merges in memory."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import abliterate as ab
from abliterate.common.errors import WriterError
from abliterate.common.reporting import Silent
from abliterate.run.saving import save_merged
from command import listing
from models import FAMILIES, cast, save_tiny

IDS = torch.tensor([[5, 17, 300, 42, 7, 99, 250, 8]])


def trained(folder, out, **options):
    """An adapter for the model in a folder, its factors random."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=3, lora_alpha=7, **options),
        autocast_adapter_dtype=True,
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "modules"), [
    ("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_proj"]),
    ("llama_untied_biases", ["embed_tokens", "up_proj"]),
])  # fmt: skip
def test_the_same_weights_as_in_memory(tmp_path, family, modules, dtype):
    folder = save_tiny(tmp_path / "model", cast(FAMILIES[family](), dtype))
    tuned = trained(folder, tmp_path / "adapter", target_modules=modules)
    handle = ab.load(folder, dtype="float32")
    save_merged(handle, tmp_path / "adapter", tmp_path / "out", "card", Silent())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    bound = 1e-4 if dtype == torch.float32 else 0.2
    assert (again(IDS).logits - tuned(IDS).logits).abs().max() < bound * tuned(IDS).logits.abs().max()
    old, new = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if any(f"{module}.weight" in name for module in modules)}
    before, after = listing(folder), listing(tmp_path / "out")
    assert {n for n in before if before[n] != after[n]} == {"model.safetensors"}


def test_what_is_no_lora_of_layers_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "model", FAMILIES["llama"]())
    trained(folder, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["up_proj"])
    with pytest.raises(WriterError, match=r"up_proj.*no LoRA"):
        save_merged(ab.load(folder), tmp_path / "adapter", tmp_path / "out", "", Silent())
