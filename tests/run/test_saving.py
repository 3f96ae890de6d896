"""What a run saves: the folder it read, byte for byte, but for the weights that its edit changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import abliterate as ab
from abliterate.common.errors import ModelError
from abliterate.common.reporting import Silent
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import load_recipe
from abliterate.models.writers import find_writers
from abliterate.run.facts import recipe_of
from abliterate.run.pipeline import run
from abliterate.run.saving import save_edited
from abliterate.settings.run import RunSettings
from command import listing
from models import ARCHITECTURES, FAMILIES, handle_of, save_tiny, tiny_llama

SETTINGS = RunSettings.model_validate(
    {
        "prompts": {"train_prompts": 8, "validation_prompts": 8, "test_prompts": 8},
        "search": {"method": "article", "candidates": 1}, "collect": {"filter": False},
        "measure": {"max_new_tokens": 8},
    }
)  # fmt: skip
BESIDE = {
    "tokenizer.model": b"\x0a\x05piece", "merges.txt": b"#version: 0.2\n", "LICENSE": b"licence", "NOTICE": b"notice",
    "preprocessor_config.json": b"{}", "processor_config.json": b'{"a": 1}', "special_tokens_map.json": b"{}",
    "additional_chat_templates/tools.jinja": b"{{ messages }}",
}  # fmt: skip
EXTRA = {
    "mtp.fc.weight": torch.randn(32, 64), "model.layers.9.mlp.down_proj.weight": torch.randn(32, 64),
    "vision.patch.weight": torch.randn(3, 5).bfloat16(), "steps": torch.arange(7),
}  # fmt: skip


def dressed(folder: Path) -> Path:
    """A tiny model as people publish them: more files, and tensors that its class doesn't read."""
    save_tiny(folder, tiny_llama(tied=False))
    for name, data in BESIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    save_file(
        load_file(folder / "model.safetensors") | EXTRA, folder / "model.safetensors", {"format": "pt", "by": "me"}
    )
    return folder


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def check_saved(source: Path, out: Path) -> None:
    """All is as it was but for the card and the bytes of the edit's writers."""
    before, after = listing(source), listing(out / "model")
    assert set(after) == set(before) | {"README.md"}
    assert [name for name in before if after[name] != before[name]] == ["model.safetensors"]
    old, new = (load_file(folder / "model.safetensors") for folder in (source, out / "model"))
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert set(changed) == set(load_recipe(out / "recipe.safetensors").edit.parts)
    assert all(new[name].dtype == old[name].dtype for name in old)


def test_tensors_and_files_that_nobody_reads_stay(tmp_path):
    source, log = dressed(tmp_path / "model"), Lines()
    run(str(source), tmp_path / "out", SETTINGS, reporter=log)
    check_saved(source, tmp_path / "out")
    assert any("doesn't read" in line and "model.layers.9" in line for line in log.said)


def test_a_hub_id_is_saved_from_its_snapshot(tmp_path, monkeypatch):
    import huggingface_hub.constants as hub

    commit, home = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub"
    cached = home / "models--org--name"
    plain, snapshot = dressed(tmp_path / "plain"), cached / "snapshots" / commit
    for number, file in enumerate(p for p in plain.rglob("*") if p.is_file()):  # blobs, and links to them
        blob, link = cached / "blobs" / f"{number:040}", snapshot / file.relative_to(plain)
        blob.parent.mkdir(exist_ok=True, parents=True)
        link.parent.mkdir(exist_ok=True, parents=True)
        blob.write_bytes(file.read_bytes())
        link.symlink_to(blob)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    result = run("org/name", tmp_path / "out", SETTINGS)
    check_saved(plain, tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))
    assert (result.document["model"]["source"], result.document["model"]["revision"]) == ("org/name", commit)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma3_text", "llama"])
def test_the_saved_folder_is_the_model_with_the_edit_attached(tmp_path, family):
    save_tiny(tmp_path / "model", (FAMILIES | ARCHITECTURES)[family]())
    handle = ab.load(tmp_path / "model", dtype="float32")
    edit = Edit.uniform(find_writers(handle), torch.randn(32), 0.7)
    save_edited(handle, recipe_of(handle, edit), tmp_path / "out", "card", Silent())
    ids = torch.tensor([[5, 17, 300, 42, 7, 99, 250, 8]])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with edit.attached(handle):
        torch.testing.assert_close(again(ids).logits, handle.model(ids).logits, atol=2e-5, rtol=1e-5)
    assert (tmp_path / "out" / "README.md").read_text() == "card"


def test_a_model_made_in_memory_has_no_files_to_save_from(tmp_path):
    handle = handle_of(tiny_llama())
    edit = Edit.uniform(find_writers(handle), torch.randn(32))
    with pytest.raises(ModelError, match="made in memory"):
        save_edited(handle, recipe_of(handle, edit), tmp_path / "out", "", Silent())


def test_packed_weights_are_refused_before_the_search(tmp_path):
    source = save_tiny(tmp_path / "model", tiny_llama(tied=False))
    config = json.loads((source / "config.json").read_text())
    for method, said in (
        ("a-way-of-tomorrow", "quantised in a way that transformers doesn't know .a-way-of-tomorrow"),
        ("mlx", "quantised for Apple's MLX"),
    ):
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        with pytest.raises(ModelError, match=said):
            run(str(source), tmp_path / "out", SETTINGS)


def test_scales_that_the_class_does_not_read_stop_loading(tmp_path):
    source = save_tiny(tmp_path / "model", tiny_llama(tied=False))
    tensors, name = load_file(source / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.01)
    tensors[name] = (tensors[name] / 0.01).to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name}_scale_inv, which LlamaForCausalLM doesn't read.*quantised"):
        ab.load(source)


def test_another_head_than_the_tied_embedding_stays_and_is_named(tmp_path):
    source, log = save_tiny(tmp_path / "model", tiny_llama(tied=True)), Lines()
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    handle = ab.load(source)
    edit = Edit.uniform(find_writers(handle), torch.randn(32))
    save_edited(handle, recipe_of(handle, edit), tmp_path / "out", "", log)
    assert any("the files hold another head, lm_head.weight: it stays" in line for line in log.said)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], tensors["lm_head.weight"])


MEMORY = """
import json, resource, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from abliterate.common.reporting import Silent
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe
from abliterate.edit.stored_tensor import StoredTensor
from abliterate.run.saving import save_edited
folder, out = map(Path, sys.argv[1:])
names = {f"model.layers.{n}.mlp.down_proj.weight": ((1024, 8192), 0) for n in range(8)}
names["model.embed_tokens.weight"] = ((65536, 1024), 1)
edit = Edit.from_names(dict.fromkeys(names, 1.0), np.random.default_rng(0).standard_normal((2, 1024)))
tensors = {name: (StoredTensor(name, shape, axis),) for name, (shape, axis) in names.items()}
model = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}
handle = SimpleNamespace(folder=folder, source="big")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_edited(handle, Recipe(edit, model, {}, tensors), out, "", Silent())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_saving_takes_under_100_mb_whatever_the_size(tmp_path):
    """400 MB of random bfloat16, tied, so that the head is written too."""
    folder, random = save_tiny(tmp_path / "model"), torch.randn(65536, 1024).bfloat16()
    tensors = {"model.embed_tokens.weight": random}
    tensors |= {
        f"model.layers.{n}.mlp.down_proj.weight": random[8192 * n :][:8192].T.clone(
            memory_format=torch.contiguous_format
        )
        for n in range(8)
    }
    tensors |= {f"model.layers.{n}.mlp.up_proj.weight": random[8192 * n :][:8192].clone() for n in range(8)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    command = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(new["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert not torch.equal(new["model.layers.7.mlp.down_proj.weight"], tensors["model.layers.7.mlp.down_proj.weight"])
