"""An edit baked into the weights gives the model that it gives live."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abliterate.apply import removal
from abliterate.apply.removal import removed, weight_factors
from abliterate.apply.weights import bake, untie
from abliterate.common.errors import ModelError, NonFiniteError, WriterError
from abliterate.edit.edit import Edit, orthonormal
from abliterate.models.writers import find_writers
from models import FAMILIES, cast, handle_of, save_tiny, tiny_llama
from peaks import peak_of

IDS = torch.tensor([[5, 17, 300, 42, 7, 99, 250, 8, 8, 31], [9, 1, 1, 377, 20, 4, 6, 8, 210, 30]])


def logits(handle):
    return handle.model(IDS).logits


def both_ways(handle, edit, **options):
    with edit.attached(handle):
        live = logits(handle)
    edit.bake(handle, **options)
    return live, logits(handle)


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_baked_gives_the_logits_of_live(family, strength):
    handle = handle_of(FAMILIES[family]())
    original = logits(handle)
    live, baked = both_ways(handle, Edit.uniform(find_writers(handle), torch.randn(handle.d_model), strength))
    assert (live - original).abs().max() > 1e-2
    torch.testing.assert_close(baked, live, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "granite"])
def test_baked_gives_the_logits_of_live_for_a_plane_and_a_strength_a_writer(family):
    handle = handle_of(FAMILIES[family]())
    found = find_writers(handle)
    edit = Edit(tuple(w.name for w in found), orthonormal(torch.randn(2, 32)), torch.rand(len(found), 2))
    live, baked = both_ways(handle, edit)
    torch.testing.assert_close(baked, live, atol=1e-5, rtol=1e-5)


def test_each_weight_is_exactly_one_minus_r_rt_of_what_it_was():
    handle = handle_of(tiny_llama(tied=False, biases=True))
    before = {name: p.double() for name, p in handle.model.named_parameters()}
    r = torch.randn(32, dtype=torch.float64)
    r /= r.norm()
    found = find_writers(handle)
    Edit.uniform(found, r).bake(handle)
    left = torch.eye(32, dtype=torch.float64) - torch.outer(r, r)
    expected = dict(before)
    for writer in found:
        expected[writer.name] = left @ before[writer.name] if writer.axis == 0 else before[writer.name] @ left
        if writer.bias:
            expected[writer.bias] = left @ before[writer.bias]
    assert sum(w.bias is not None for w in found) == 8
    for name, parameter in handle.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], atol=1e-6, rtol=0, msg=name)
        if expected[name] is before[name]:
            assert torch.equal(parameter.double(), before[name]), f"{name} is no writer and was changed"


def test_a_tied_embedding_is_untied_so_that_the_head_stays():
    handle = handle_of(tiny_llama(tied=True))
    assert handle.tied
    embedding = handle.embedding.weight.clone()
    live, baked = both_ways(handle, Edit.uniform(find_writers(handle), torch.randn(32)))
    torch.testing.assert_close(baked, live, atol=1e-5, rtol=1e-5)
    assert not handle.tied
    assert handle.model.config.tie_word_embeddings is False
    assert torch.equal(handle.model.get_output_embeddings().weight, embedding)
    assert not torch.equal(handle.embedding.weight, embedding)


def test_a_tied_embedding_that_the_edit_leaves_alone_stays_tied():
    handle = handle_of(tiny_llama(tied=True))
    live, baked = both_ways(handle, Edit.uniform(find_writers(handle, range(4)), torch.randn(32)))
    torch.testing.assert_close(baked, live, atol=1e-5, rtol=1e-5)
    assert handle.tied
    assert handle.model.config.tie_word_embeddings is True


def test_keep_tied_edits_embedding_and_head_together():
    handle = handle_of(tiny_llama(tied=True))
    r = torch.randn(32)
    live, baked = both_ways(handle, Edit.uniform(find_writers(handle), r), keep_tied=True)
    assert handle.tied
    head = handle.model.get_output_embeddings().weight
    assert head is handle.embedding.weight
    torch.testing.assert_close(head @ (r / r.norm()), torch.zeros(len(head)), atol=1e-5, rtol=0)
    # nothing along r reaches the head but what the final norm's gain turns into it
    assert (baked - live).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama_untied_biases", "gpt2", "gemma3_text"])
def test_a_saved_folder_is_loaded_by_plain_transformers(tmp_path, family, dtype):
    handle = handle_of(cast(FAMILIES[family](), dtype))
    Edit.uniform(find_writers(handle), torch.randn(32)).bake(handle)
    save_tiny(tmp_path, handle.model, handle.tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert torch.equal(again(IDS).logits, logits(handle))
    assert again.generation_config.eos_token_id == handle.model.generation_config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("Grüße ☃")["input_ids"] == handle.tokenizer("Grüße ☃")["input_ids"]
    assert tokenizer.chat_template == handle.tokenizer.chat_template


def test_untying_alone_changes_no_logit():
    handle = handle_of(tiny_llama(tied=True))
    before = logits(handle)
    untie(handle)
    assert torch.equal(logits(handle), before)
    assert not handle.tied


def test_half_precision_is_computed_in_float32_and_rounded_once():
    handle = handle_of(tiny_llama(tied=False, dtype=torch.bfloat16))
    before = {name: p.float() for name, p in handle.model.named_parameters()}
    r = torch.randn(32)
    found = find_writers(handle)
    Edit.uniform(found, r).bake(handle)
    r /= r.norm()
    for writer in found[1:]:
        expected = (before[writer.name] - torch.outer(r, r @ before[writer.name])).bfloat16()
        now = handle.model.get_parameter(writer.name)
        assert now.dtype == torch.bfloat16
        assert ((now != expected).float().mean()) < 0.01  # at a tie float32 may round either way


def test_all_or_nothing_when_half_precision_overflows():
    handle = handle_of(tiny_llama(tied=False, dtype=torch.float16))
    found = find_writers(handle)
    handle.model.get_parameter(found[-1].name).fill_(60000)
    before = {name: p.clone() for name, p in handle.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=found[-1].name):
        Edit.uniform(found, torch.ones(32), -1.0).bake(handle)
    assert all(torch.equal(p, before[name]) for name, p in handle.model.named_parameters())


@pytest.mark.parametrize("norm_preserving", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_some_rows_of_one_writer(monkeypatch, dtype, norm_preserving):
    model = tiny_llama(tied=False, dtype=dtype)
    model.resize_token_embeddings(60_000, mean_resizing=False)
    handle = handle_of(model)
    edit = Edit.uniform(find_writers(handle), torch.randn(32))
    monkeypatch.setattr(removal, "BLOCK", 2**14)
    wanted = {}
    for writer, change in weight_factors(handle, edit.parts):
        weight = handle.model.get_parameter(writer.name)
        wanted[writer.name] = removed(weight, change, writer.axis, keep_norms=norm_preserving)
    block, embedding = 4 * removal.BLOCK, 4 * handle.embedding.weight.numel()
    peak = peak_of(lambda: bake(handle, edit, norm_preserving=norm_preserving))
    assert peak < 6 * block < embedding / 10
    assert all(torch.equal(handle.model.get_parameter(name), values) for name, values in wanted.items())


def test_an_edit_for_another_model_changes_nothing(tiny_handle):
    before = logits(tiny_handle)
    with pytest.raises(WriterError, match="is it for another model"):
        Edit.uniform(["lm_head.weight"], torch.randn(32)).bake(tiny_handle)
    assert torch.equal(logits(tiny_handle), before)


def test_a_quantised_model_is_refused():
    handle = handle_of(tiny_llama(), quantised="4bit")
    with pytest.raises(ModelError, match=r"4bit.*--quantise"):
        Edit.uniform(find_writers(handle), torch.randn(32)).bake(handle)
