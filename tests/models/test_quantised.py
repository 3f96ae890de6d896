"""Models loaded in 4 or 8 bits (bitsandbytes, here on the CPU): edited live, fitted, and saved in full precision."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abliterate.apply.proof import check_proof
from abliterate.common.errors import ModelError
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import load_recipe
from abliterate.models import quantised
from abliterate.models.loading import load
from abliterate.models.quantised import packed_as
from abliterate.models.writers import find_writers
from abliterate.run import opening, searching
from abliterate.run.pipeline import run
from abliterate.search.fit import FitSettings
from abliterate.settings.run import RunSettings
from models import handle_of, save_tiny, tiny_llama
from packing import compressed_nvfp4, fp8_blocks, fp8_tensor, nvfp4, packed_folder
from planted import TOPICS

FEW = {"train_prompts": 8, "validation_prompts": 8, "test_prompts": 8}


class RefusesTargets:
    """A random model's answers say nothing: what was asked decides."""

    name = "refuses targets"

    def judge(self, prompts, answers):
        return [prompt.startswith("Q") for prompt in prompts]

    def settled(self, prompt, partial_answer):
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    return save_tiny(tmp_path_factory.mktemp("quantised") / "model", tiny_llama(d_model=128))  # blocks of 64 weights


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_writers_are_found_and_proved(folder, bits):
    plain, packed = load(folder), load(folder, quantise=bits)
    name = next(w.name for w in find_writers(plain) if w.side == "mlp")
    assert packed.model.get_parameter(name).dtype in (torch.uint8, torch.int8)
    assert [w.name for w in find_writers(packed)] == [w.name for w in find_writers(plain)]
    check_proof(packed)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_folder_that_is_packed_already_is_as_one_packed_on_loading(folder, tmp_path, bits):
    first = load(folder, quantise=bits)
    first.model.save_pretrained(tmp_path / "packed")
    first.tokenizer.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert again.quantised == bits
    with pytest.raises(ModelError, match=f"loaded in {bits} and its weights can't be changed"):
        again.bake(Edit.uniform(find_writers(again), np.ones(again.d_model)))


class Scaled(torch.Tensor):
    """A tensor that says it is another: what packed weights are in torchao and others."""


@pytest.mark.parametrize("packed", [lambda w: w.to(torch.int8), lambda w: w.to(torch.float8_e4m3fn), Scaled])
def test_baking_takes_plain_float_weights_only(packed):
    handle = handle_of(tiny_llama())
    writer = next(w for w in find_writers(handle) if w.side == "mlp")
    edit, weight = Edit.uniform([writer], np.ones(handle.d_model)), handle.model.get_parameter(writer.name)
    module = handle.model.get_submodule(writer.module)
    assert packed_as(handle.model) is None
    module.weight = torch.nn.Parameter(packed(weight.data), requires_grad=False)
    before = module.weight.data.clone()
    assert packed_as(handle.model) is not None
    with pytest.raises(ModelError, match=f"{writer.name} is no plain float weight.*--as checkpoint"):
        handle.bake(edit)
    assert bool((before.float() == module.weight.data.float()).all())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq.*can't be edited.*original.*adapter"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq.*can't be edited.*original.*adapter"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantised for Apple's MLX.*original"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "quantised for Apple's MLX.*original"),
        ({"quantization_config": {"quant_method": "zork"}}, r"doesn't know \(zork\).*original"),
    ],
)
def test_weights_that_cannot_be_edited_are_said_so_with_the_way_round(folder, tmp_path, said, words):
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | said))
    with pytest.raises(ModelError, match=words):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("dtype", "more", "words"),
    [
        (torch.int8, {}, "hold model.layers.1.mlp.down_proj.weight, whole numbers.*config.json doesn't say how"),
        (torch.float8_e4m3fn, {"scaled_fp8": (1,)}, "hold scaled_fp8, which LlamaForCausalLM doesn't read.*quantised"),
        (torch.float8_e4m3fn, {"model.layers.1.mlp.down_proj.scale_weight": (1,)}, "scale_weight, which .* wrong"),
        (torch.float8_e4m3fn, {"model.layers.1.mlp.down_proj.weight_scale_2": ()}, "weight_scale_2, which .* wrong"),
    ],
)
def test_packed_weights_that_the_config_says_nothing_of_stop(tiny_folder, tmp_path, dtype, more, words):
    shutil.copytree(tiny_folder, tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = (50 * tensors[name]).to(dtype)
    save_file(tensors | {n: torch.ones(s) for n, s in more.items()}, tmp_path / "m/model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=words):
        load(tmp_path / "m")


def test_a_packed_folder_isnt_packed_once_more(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    packed = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "m/config.json").write_text(json.dumps(config | packed))
    with pytest.raises(ModelError, match=r"quantised already \(fp8\); leave out --quantise 4bit"):
        load(tmp_path / "m", quantise="4bit")


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": ["lm_head"]}),
        (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
        (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        (compressed_nvfp4, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
    ],
)
def test_packed_folders_are_unpacked_for_the_search(tmp_path, monkeypatch, pack, said):
    """And the folder that the handle names, from which models are saved, is the packed one."""
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))
    folder = save_tiny(tmp_path / "m", tiny_llama(tied=False, d_model=64, heads=2, kv_heads=2))
    names = [n for n in load(folder).model.state_dict() if n.endswith("proj.weight")]
    values = packed_folder(folder, pack, names)
    config = json.loads((folder / "config.json").read_text())
    if pack is nvfp4:  # older ModelOpt says it in a file of its own
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    else:
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    handle = load(folder)
    assert handle.quantised is None and handle.folder == folder
    for name in names:
        torch.testing.assert_close(handle.model.get_parameter(name).float(), values[name], rtol=0.01, atol=1e-3)
    assert any("dequantised to" in note and said["quant_method"] in note for note in handle.notes)
    check_proof(handle)


def test_gradients_pass(folder):
    """As through a plain model with the same weights; bitsandbytes' own CPU kernel lets none pass."""
    import bitsandbytes

    packed, plain = load(folder, quantise="4bit"), load(folder, dtype="float32")
    for name, module in packed.model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.model.get_submodule(name).weight.data = weight.float()
    found = []
    for handle in (packed, plain):
        stream = handle.model.get_input_embeddings()(torch.tensor([[5, 6, 7, 8]])).detach().requires_grad_(True)
        handle.model(inputs_embeds=stream).logits[0, -1].log_softmax(-1)[7].backward()
        found.append(stream.grad.float())
    assert found[1].norm() > 0
    assert (found[0] - found[1]).norm() < 0.1 * found[1].norm()  # bfloat16 against float32


@pytest.mark.slow
def test_a_run_fits_it_live_and_saves_the_edit_in_full_precision(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "make_judge", lambda *args, **kwargs: RefusesTargets())
    short = partial(FitSettings, weights=(1.0,), lighter=(0.5,), steps_between=2)
    monkeypatch.setattr(searching, "FitSettings", short)  # one point and a lighter one: the CPU's 4-bit kernel is slow
    sides = {"target": tmp_path / "target.txt", "baseline": tmp_path / "baseline.txt"}
    for path, begins in zip(sides.values(), ("Q about", "tell of"), strict=True):
        path.write_text("".join(f"{begins} {topic} {n}\n" for n in range(4) for topic in TOPICS))
    settings = RunSettings.model_validate(
        {
            "prompts": {**FEW, **{side: str(path) for side, path in sides.items()}},
            "load": {"quantise": "4bit"},
            "search": {"method": "fit", "steps": 4},
            "collect": {"filter": False},
            "measure": {"max_new_tokens": 8},
        }
    )
    result = run(str(folder), tmp_path / "out", settings)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    whole = load(folder, dtype="float32")
    assert saved.dtype == whole.dtype
    load_recipe(tmp_path / "out" / "recipe.safetensors").edit.bake(whole)
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(parameter, saved.get_parameter(name), atol=1e-6, rtol=1e-6, msg=name)
    assert result.edit.writers


def test_without_bitsandbytes(folder, monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"--quantise 4bit needs bitsandbytes: pip install .abliterate\[quantised\]"):
        load(folder, quantise="4bit")


def test_another_kind(folder):
    with pytest.raises(ModelError, match="unknown quantisation '3bit'; choose 4bit or 8bit"):
        load(folder, quantise="3bit")
