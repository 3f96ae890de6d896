"""Loading, and the handle."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from abliterate.common.errors import ModelError, NonFiniteError, PromptError
from abliterate.models import loading
from abliterate.models.devices import largest_block
from abliterate.models.handle import check_finite, common_prefix, config_hash
from abliterate.models.loading import load
from models import EOS, FAMILIES, handle_of, save_tiny, tiny_llama, tiny_tokenizer

IDS = torch.tensor([[5, 17, 300, 42, 7]])


def test_a_folder_is_loaded_ready_to_use(tiny_folder):
    handle = load(tiny_folder, dtype="float32")
    assert (handle.layers, handle.d_model, handle.context_length, handle.tied) == (4, 32, 512, True)
    assert handle.dtype == handle.source_dtype == torch.float32
    assert not handle.model.training
    assert not any(p.requires_grad for p in handle.model.parameters())
    assert handle.tokenizer.padding_side == "left"
    assert handle.end_tokens == {EOS}
    torch.testing.assert_close(handle.model(IDS).logits, tiny_llama()(IDS).logits)


def test_auto_takes_the_first_dtype_that_runs_and_remembers_that_of_the_file(tiny_folder, monkeypatch):
    monkeypatch.setattr(loading, "_multiplies_bfloat16", lambda: True)
    handle = load(tiny_folder)
    assert handle.dtype == torch.bfloat16
    assert handle.source_dtype == torch.float32


def test_a_cpu_without_instructions_for_bfloat16_takes_float32_where_there_is_room(tiny_folder, monkeypatch):
    monkeypatch.setattr(loading, "_multiplies_bfloat16", lambda: False)
    assert load(tiny_folder).dtype == torch.float32
    assert load(tiny_folder, dtype="bfloat16").dtype == torch.bfloat16
    little = 4 * (tiny_folder / "model.safetensors").stat().st_size - 1
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: SimpleNamespace(total=little))
    assert load(tiny_folder).dtype == torch.bfloat16
    largest = largest_block(tiny_folder, 4)[1]  # in float32, which is what must fit where weights come from disk
    assert load(tiny_folder, max_memory=f"cpu={largest}B").dtype == torch.float32
    assert load(tiny_folder, max_memory=f"cpu={largest - 1}B").dtype == torch.bfloat16


def test_what_overflows_in_float16_says_where_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_multiplies_bfloat16", lambda: True)
    model = tiny_llama()
    for projection in (model.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.down_proj):
        projection.weight.mul_(2e4)
    save_tiny(tmp_path, model)
    assert load(tmp_path).dtype == torch.bfloat16
    with pytest.raises(NonFiniteError, match=r"float16: the activation after layer 1 is NaN.*--dtype float32"):
        load(tmp_path, dtype="float16")


def test_a_nan_weight_is_named(tmp_path):
    model = tiny_llama()
    model.model.layers[2].mlp.up_proj.weight[3, 4] = float("inf")
    save_tiny(tmp_path, model)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load(tmp_path, dtype="float32")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "architecture"), [("t5", "T5ForConditionalGeneration"), ("bert", "BertForMaskedLM")]
)
def test_what_is_no_decoder_is_refused(tmp_path, model_type, architecture):
    CONFIG_MAPPING[model_type](architectures=[architecture]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=f"is {architecture}, not a causal language model"):
        load(tmp_path)


def test_pickles_are_never_read(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickles \(pytorch_model\.bin\)"):
        load(tmp_path)


def test_code_of_the_models_own_is_not_run_unasked(tmp_path):
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load(tmp_path)


@pytest.mark.parametrize("source", ["./nothing-here", "/nothing/here", "nothing.gguf", "a/b/c"])
def test_a_path_that_is_not_there(source):
    with pytest.raises(ModelError, match=f"{source} not found"):
        load(source)


def test_a_weight_that_is_not_there_is_named_and_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack weight model\.layers\.1\.mlp\.down_proj\.weight"):
        load(tmp_path)


def test_a_cut_off_file_is_called_damaged(tmp_path):
    save_tiny(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged"):
        load(tmp_path)


def test_the_dtype_on_disk_counts_and_not_what_the_config_says(tmp_path):
    save_tiny(tmp_path, tiny_llama(dtype=torch.bfloat16))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("bfloat16", "float32"))
    assert load(tmp_path, dtype="float32").source_dtype == torch.bfloat16


def test_a_hub_name_that_cannot_be_reached():
    with pytest.raises(ModelError, match=r"nobody/nothing not found.*Hub"):
        load("nobody/nothing")


def test_files_and_folders_that_are_no_model(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError, match=r"not a \.gguf"):
        load(tmp_path / "weights.bin")
    with pytest.raises(ModelError, match=r"there is no config\.json"):
        load(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"a\.gguf, b\.gguf"):
        load(tmp_path)


def test_options_that_cannot_be_met(tiny_folder):
    with pytest.raises(ModelError, match="unknown dtype 'int8'; choose auto, bfloat16"):
        load(tiny_folder, dtype="int8")


def test_a_tokenizer_without_pad_gets_one(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    save_tiny(tmp_path, tokenizer=tokenizer)
    handle = load(tmp_path, dtype="float32")
    assert handle.tokenizer.pad_token_id == handle.tokenizer.eos_token_id == EOS
    assert handle.tokenizer.padding_side == "left"


def test_prompts_become_conversations_that_end_where_the_answer_begins(tiny_handle):
    (ids,) = tiny_handle.prompt_ids(["Hi"])
    assert tiny_handle.tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    told = handle_of(tiny_llama(), system_prompt="Be brief.", prefill="Sure:")
    (ids,) = told.prompt_ids(["Hi"])
    text = told.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert text.endswith("<|im_start|>assistant\nSure:")


def test_a_prompt_longer_than_the_context_is_refused():
    handle = handle_of(tiny_llama(context=64))
    with pytest.raises(PromptError):
        handle.prompt_ids(["word " * 100])


def test_end_tokens_are_those_of_the_generation_config_and_the_tokenizer():
    model = tiny_llama()
    model.generation_config.eos_token_id = [7, 9]
    assert handle_of(model).end_tokens == {7, 9, EOS}


@pytest.mark.parametrize("family", FAMILIES)
def test_last_logits_are_the_models_own(family):
    handle = handle_of(FAMILIES[family]())
    logits, cache = handle.last_logits(2, input_ids=IDS, use_cache=True)
    torch.testing.assert_close(logits, handle.model(IDS).logits[:, -2:], atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_handle_finds_its_parts(family):
    handle = handle_of(FAMILIES[family]())
    assert handle.layers == 4
    assert handle.d_model == 32
    assert handle.decoder is not handle.model
    assert handle.embedding.weight.shape == (400, 32)
    assert handle.tied == handle.model.config.tie_word_embeddings


def test_the_config_hash_is_of_the_shape_alone(tiny_folder, tmp_path):
    first, second = load(tiny_folder, dtype="float32"), load(save_tiny(tmp_path, tiny_llama(tied=True, seed=1)))
    assert first.config_hash == second.config_hash == handle_of(tiny_llama(tied=False)).config_hash
    assert handle_of(tiny_llama(layers=3)).config_hash != first.config_hash
    assert len(config_hash({})) == 64


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 9]]) == 2
    assert common_prefix([[1, 2], [1, 2, 3]]) == 2
    assert common_prefix([[4], [5]]) == 0
    assert common_prefix([[1, 2, 3]]) == 3


def test_the_first_layer_that_is_not_finite_is_named():
    activations = torch.zeros(4, 2, 3)
    check_finite(activations, "x")
    activations[2, 1, 0], activations[3, 0, 0] = float("nan"), float("inf")
    with pytest.raises(NonFiniteError, match=r"x: activation at layer 2.*--dtype float32"):
        check_finite(activations, "x")


def test_a_token_that_the_embedding_has_no_row_for(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    handle = handle_of(tiny_llama(), tokenizer)
    assert handle.prompt_ids(["tell me"])  # unused extra tokens do no harm
    with pytest.raises(ModelError, match=r"gives '<b>' the id 401, and the embedding has 400 rows"):
        handle.prompt_ids(["tell me", "tell <b>"])
