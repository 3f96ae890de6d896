"""The adapter form: attached, merged and taken off again by plain PEFT, it does what baking does."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from abliterate.apply.adapter.form import apply_adapter, merged
from abliterate.apply.adapter.low_rank import low_rank, truncated
from abliterate.apply.forms import ApplyOptions
from abliterate.apply.removal import removed
from abliterate.apply.weights import bake
from abliterate.common.errors import AbliterateError, OutputError, RecipeError, WriterError
from abliterate.common.reporting import Silent
from abliterate.edit.algebra import factors
from abliterate.edit.edit import Edit, Part, orthonormal
from abliterate.edit.recipe import Recipe
from abliterate.models.recipes import recipe_for
from abliterate.models.writers import find_writers
from models import FAMILIES, _sizes, handle_of, save_tiny, tiny, tiny_llama

MIXTURES = {
    "mixtral": lambda: tiny("mixtral", **_sizes(tied=False), num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: tiny(
        "qwen3_moe", **_sizes(tied=False), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        decoder_sparse_step=2,
    ),
    "gpt_oss": lambda: tiny(
        "gpt_oss", **_sizes(tied=False), num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
    ),
}  # fmt: skip
ALL = {
    **{name: FAMILIES[name] for name in (
        "llama", "llama_untied_biases", "gpt2", "gemma3_text", "qwen2", "olmo2", "gpt_neox", "cohere", "opt", "granite",
        "starcoder2",
    )},
    **MIXTURES,
    "opt_without_biases": lambda: tiny(
        "opt", num_hidden_layers=4, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=512, enable_bias=False,
    ),
}  # fmt: skip
IDS = torch.tensor([[3, 17, 99, 250, 7, 42]])


@pytest.fixture(params=ALL)
def family(request):
    return request.param


@pytest.fixture
def saved(family, tmp_path):
    """(folder, handle on the same model)."""
    model = ALL[family]()
    return save_tiny(tmp_path / "base", model), handle_of(model)


def load_plain(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.double()


def everywhere(handle, strength: float = 1.0, seed: int = 0, count: int = 1) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(count, handle.d_model, generator=generator)
    return Edit.uniform(find_writers(handle), directions if count > 1 else directions[0], strength)


def applied(edit: Edit, folder: Path, out: Path, **options) -> dict:
    return apply_adapter(Recipe(edit, {"source": "org/fox"}), str(folder), out, ApplyOptions(**options), Silent())


def attach(base, folder: Path) -> PeftModel:
    """Plain PEFT; every tensor of the file has to find its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message=".*did not match.*")
        return PeftModel.from_pretrained(base, str(folder))


def close(left: torch.Tensor, right: torch.Tensor, bound: float) -> bool:
    return bool((left - right).norm() <= bound * right.norm())


def test_attached_merged_and_taken_off(saved, tmp_path):
    folder, handle = saved
    before = logits(load_plain(folder))
    edit = everywhere(handle, 0.7)
    summary = applied(edit, folder, tmp_path / "adapter")
    bake(handle, edit)
    after = logits(handle.model)
    assert not close(after, before, 0.01)
    assert summary["writers"] == len(edit.writers)
    assert summary["skipped"] == []
    adapted = attach(load_plain(folder), tmp_path / "adapter")
    assert close(logits(adapted), after, 2e-6)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    assert close(logits(adapted), after, 2e-6)
    if copies(tmp_path):
        adapted.delete_adapter("default")  # unload alone would leave PEFT's copies in place
    assert torch.equal(logits(adapted.unload()), before)


def copies(folder: Path) -> list[str]:
    """The modules that the adapter holds edited copies of."""
    return json.loads((folder / "adapter" / "adapter_config.json").read_text())["modules_to_save"] or []


def test_merges_to_the_weights_that_baking_gives(saved, tmp_path):
    folder, handle = saved
    edit = everywhere(handle)
    applied(edit, folder, tmp_path / "adapter")
    bake(handle, edit)
    baked = dict(handle.model.named_parameters())
    model = merged(load_plain(folder), tmp_path / "adapter")
    found = dict(model.named_parameters())
    assert found.keys() == baked.keys()
    for name, weight in baked.items():
        assert (found[name] - weight).norm() <= 1e-6 * weight.norm() + 1e-30, name
    assert close(logits(model), logits(handle.model), 2e-6)


def test_merged_model_saves_and_loads(saved, tmp_path):
    folder, handle = saved
    edit = everywhere(handle)
    applied(edit, folder, tmp_path / "adapter")
    bake(handle, edit)
    model = merged(load_plain(folder), tmp_path / "adapter")
    model.save_pretrained(tmp_path / "merged")
    assert close(logits(load_plain(tmp_path / "merged")), logits(handle.model), 2e-6)


def test_unmerging_gives_the_base_back(tmp_path):
    folder = save_tiny(tmp_path / "base", tiny_llama(tied=False))
    edit = everywhere(handle_of(load_plain(folder)))
    applied(edit, folder, tmp_path / "adapter")
    adapted = attach(load_plain(folder), tmp_path / "adapter")
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert close(logits(adapted.unload()), logits(load_plain(folder)), 1e-6)


def test_half_precision_is_within_its_rounding(tmp_path):
    folder = save_tiny(tmp_path / "base", tiny_llama(dtype=torch.bfloat16))
    handle = handle_of(load_plain(folder, torch.bfloat16))
    edit = everywhere(handle)
    applied(edit, folder, tmp_path / "adapter")
    model = merged(load_plain(folder, torch.bfloat16), tmp_path / "adapter")
    bake(handle, edit)
    for name, weight in handle.model.named_parameters():
        found = model.get_parameter(name)
        assert found.dtype == torch.bfloat16
        assert (found.float() - weight.float()).abs().max() <= 2**-7 * weight.float().abs().max(), name


def test_head_tied_to_the_embedding(tmp_path):
    """Attached, only the embedding loses the direction; merged by plain PEFT both do, and `merged` keeps the head."""
    folder = save_tiny(tmp_path / "base", tiny_llama(tied=True))
    base = load_plain(folder)
    head = base.lm_head.weight.clone()
    applied(everywhere(handle_of(copy.deepcopy(base))), folder, tmp_path / "adapter")
    adapted = attach(load_plain(folder), tmp_path / "adapter")
    assert torch.equal(adapted.get_base_model().lm_head.weight, head)
    kept = merged(load_plain(folder), tmp_path / "adapter")
    assert torch.equal(kept.lm_head.weight, head)
    assert not torch.equal(kept.get_input_embeddings().weight, head)
    assert kept.config.tie_word_embeddings is False
    assert "untie first" in (tmp_path / "adapter" / "README.md").read_text()


def test_several_directions_and_strengths_that_differ(tmp_path):
    folder = save_tiny(tmp_path / "base", tiny_llama(tied=False))
    handle = handle_of(load_plain(folder))
    writers = [w.name for w in find_writers(handle)]
    directions = orthonormal(torch.randn(3, handle.d_model))
    strengths = torch.zeros(len(writers), 3)
    for index in range(len(writers)):
        strengths[index, : 3 - index % 3] = torch.tensor([1.0, -0.5, 0.25])[: 3 - index % 3]
    edit = Edit(tuple(writers), directions, strengths)
    summary = applied(edit, folder, tmp_path / "adapter")
    assert summary["rank"] == 3
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 3  # the most common one, whose scale is not 1 by itself
    assert set(config["rank_pattern"].values()) == {1, 2}
    adapted = attach(load_plain(folder), tmp_path / "adapter")
    bake(handle, edit)
    assert close(logits(adapted), logits(handle.model), 2e-6)


def test_only_the_modules_named_are_touched(tmp_path):
    """Layer 1 and not layer 11: PEFT takes names in a list for the ends of names as well."""
    folder = save_tiny(tmp_path / "base", tiny_llama(layers=12))
    handle = handle_of(load_plain(folder))
    names = [w.name for w in find_writers(handle, layers=[1])]
    edit = Edit.uniform(names, torch.randn(handle.d_model))
    applied(edit, folder, tmp_path / "adapter")
    before = dict(load_plain(folder).named_parameters())
    model = merged(load_plain(folder), tmp_path / "adapter")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(names)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_norm_preserving_is_the_nearest_of_its_rank(family, tmp_path):
    model = ALL[family]()
    folder, handle = save_tiny(tmp_path / "base", model), handle_of(model)
    edit = everywhere(handle)
    summary = applied(edit, folder, tmp_path / "adapter", norm_preserving=True)
    before = {name: p.clone() for name, p in handle.model.named_parameters()}
    bake(handle, edit, norm_preserving=True)
    adapted = merged(load_plain(folder), tmp_path / "adapter")
    errors = []
    for writer in find_writers(handle):
        wanted = handle.model.get_parameter(writer.name) - before[writer.name]
        got = adapted.get_parameter(writer.name) - before[writer.name]
        errors.append(float((got - wanted).norm() / wanted.norm()))
        if writer.module in copies(tmp_path):
            assert errors[-1] < 1e-5
            continue
        tail = torch.linalg.svdvals(wanted)[..., 1:].norm() / wanted.norm()
        assert errors[-1] == pytest.approx(float(tail), abs=1e-4)
    assert summary["approximation"]["worst_error"] == pytest.approx(max(errors), abs=1e-4)
    assert 0.01 < max(errors) < 1
    assert "relative Frobenius error" in (tmp_path / "adapter" / "README.md").read_text()


def test_truncated_is_exact_where_the_change_has_its_rank():
    weight = torch.randn(16, 1)  # one column: keeping its norm is a change of rank 1
    change = factors(Part(torch.eye(16)[:1], torch.ones(1)))
    low, error = truncated(weight, change, 0)
    assert error < 1e-7
    assert torch.allclose(weight + low.left @ low.right, removed(weight, change, 0, keep_norms=True), atol=1e-6)


@pytest.mark.parametrize(("shape", "axis"), [((8, 5), 0), ((5, 8), 1), ((3, 8, 5), 1), ((3, 5, 8), 2)])
def test_low_rank_of_any_layout(shape, axis):
    weight = torch.randn(shape, dtype=torch.float64)
    directions = orthonormal(torch.randn(2, 8))
    change = factors(Part(directions, torch.tensor([1.0, 0.3])), gain=torch.rand(8) + 0.5)
    low = low_rank(weight, change, axis)
    turned = weight.movedim(axis, -1)
    left, right = (torch.from_numpy(factor).double() for factor in change)
    wanted = -((turned @ right.T) @ left).movedim(-1, axis)
    assert torch.allclose(low.left.double() @ low.right.double(), wanted, atol=1e-6)
    assert low.rank == 2


@pytest.mark.parametrize("family", ["llama_untied_biases", "gpt2", "cohere", "llama", "granite"])
def test_shifts(family, tmp_path):
    """Added at a block's output: attached everywhere; merged where the layer has a bias to hold it."""
    model = ALL[family]()
    folder, handle = save_tiny(tmp_path / "base", model), handle_of(model)
    edit = everywhere(handle) + Edit.shifting(1, torch.randn(handle.d_model), 3.0)
    summary = applied(edit, folder, tmp_path / "adapter")
    with handle.attached(edit):
        wanted = logits(handle.model)
    with handle.attached(everywhere(handle)):
        assert not close(logits(handle.model), wanted, 0.01)
    assert close(logits(attach(load_plain(folder), tmp_path / "adapter")), wanted, 5e-6)
    if family in ("llama_untied_biases", "gpt2"):
        assert close(logits(merged(load_plain(folder), tmp_path / "adapter")), wanted, 5e-6)
    else:
        assert any("attached, not merged" in note for note in summary["notes"])


@pytest.mark.parametrize("family", ["gemma3_text", "mixtral"])
def test_shifts_that_no_layer_can_hold(family, tmp_path):
    model = ALL[family]()
    folder, handle = save_tiny(tmp_path / "base", model), handle_of(model)
    edit = everywhere(handle) + Edit.shifting(1, torch.randn(handle.d_model), 3.0)
    with pytest.raises(WriterError, match=r"can't hold all of this edit: shift at .*--skip-unsupported"):
        applied(edit, folder, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    summary = applied(edit, folder, tmp_path / "adapter", skip_unsupported=True)
    assert len(summary["skipped"]) == 1
    assert "left out: shift at" in (tmp_path / "adapter" / "README.md").read_text()
    bake(handle, everywhere(handle))
    assert close(logits(attach(load_plain(folder), tmp_path / "adapter")), logits(handle.model), 2e-6)


def test_mamba_is_refused_by_name(tmp_path):
    model = tiny("mamba", num_hidden_layers=2, hidden_size=32, state_size=4, intermediate_size=64)
    folder, handle = save_tiny(tmp_path / "base", model), handle_of(model)
    edit = everywhere(handle)
    with pytest.raises(WriterError, match=r"layers\.0\.mixer\.out_proj\.weight \(PEFT refuses it"):
        applied(edit, folder, tmp_path / "adapter")
    summary = applied(edit, folder, tmp_path / "adapter", skip_unsupported=True)
    assert {entry["writer"] for entry in summary["skipped"]} == {n for n in edit.writers if "out_proj" in n}


def test_card_and_config_name_no_path(tmp_path):
    folder = save_tiny(tmp_path / "secret-place", tiny_llama())
    handle = handle_of(load_plain(folder))
    applied(everywhere(handle), folder, tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/fox"
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["base_model"], head["base_model_relation"], head["library_name"]) == ("org/fox", "adapter", "peft")
    assert str(tmp_path) not in text + json.dumps(config)
    apply_adapter(Recipe(everywhere(handle)), str(folder), tmp_path / "other", ApplyOptions(), Silent())
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "secret-place"


def test_plan_writes_nothing_and_knows_the_size(tmp_path):
    folder = save_tiny(tmp_path / "base", tiny_llama())
    edit = everywhere(handle_of(load_plain(folder)))
    planned = applied(edit, folder, tmp_path / "adapter", plan=True)
    assert not (tmp_path / "adapter").exists()
    applied(edit, folder, tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    header = 8 + int.from_bytes((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()[:8], "little")
    assert planned["bytes"] == size - header


def test_dtype_of_the_factors(tmp_path):
    from safetensors.torch import load_file

    folder = save_tiny(tmp_path / "base", tiny_llama())
    edit = everywhere(handle_of(load_plain(folder)))
    applied(edit, folder, tmp_path / "adapter", dtype="bfloat16")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "says"),
    [({"in_place": True}, "--in-place"), ({"keep_tied": True}, "--keep-tied"), ({"dtype": "int8"}, "unknown dtype")],
)
def test_options_that_mean_nothing_here(tmp_path, tiny_folder, options, says):
    edit = Edit.uniform(["model.layers.0.mlp.down_proj.weight"], torch.ones(32))
    with pytest.raises(AbliterateError, match=says):
        applied(edit, tiny_folder, tmp_path / "adapter", **options)


def test_wrong_recipes(tmp_path, tiny_folder):
    direction = torch.ones(32)
    with pytest.raises((WriterError, RecipeError), match=r"q_proj\.weight doesn't write to the stream"):
        applied(Edit.uniform(["model.layers.0.self_attn.q_proj.weight"], direction), tiny_folder, tmp_path / "a")
    with pytest.raises(WriterError, match="have 16 entries"):
        applied(Edit.uniform(["model.layers.0.mlp.down_proj.weight"], torch.ones(16)), tiny_folder, tmp_path / "a")
    edit = Edit.uniform(["model.layers.0.mlp.down_proj.weight"], direction)
    other = Recipe(edit, {**recipe_for(edit, tiny_folder).model, "config_hash": "0" * 64})
    with pytest.raises(RecipeError, match="config hash"):
        apply_adapter(other, str(tiny_folder), tmp_path / "a", ApplyOptions(), Silent())
    apply_adapter(other, str(tiny_folder), tmp_path / "a", ApplyOptions(force=True), Silent())
    with pytest.raises(OutputError, match="is not empty"):
        applied(edit, tiny_folder, tmp_path / "a")
    applied(edit, tiny_folder, tmp_path / "a", overwrite=True)


def test_weights_that_are_not_finite_stop_it(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "base", tiny_llama())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AbliterateError, match=rf"{name} holds NaN"):
        applied(Edit.uniform([name], torch.ones(32)), folder, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
