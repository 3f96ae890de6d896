"""Streams that aren't one plain sum: scaled, several of them, normed embeddings, blocks of several sublayers, loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from abliterate.apply.hooks import attached
from abliterate.apply.proof import check_proof
from abliterate.apply.weights import bake
from abliterate.common.errors import WriterError
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import load_recipe
from abliterate.models.writers import find_writers, layout, stream_sites, watch_sites
from models import ARCHITECTURES, handle_of, tiny, tiny_llama

IDS = torch.tensor([[50, 17, 300, 42, 7, 99, 250, 8, 8, 31]])


def logits(handle):
    return handle.model(input_ids=IDS).logits


@pytest.mark.parametrize("scalar", [1.0, 0.7, 0.005])
@pytest.mark.parametrize("name", ["gemma4_text", "gemma4_text: mixture"])
def test_a_stream_scaled_by_a_buffer_is_followed(name, scalar):
    handle = handle_of(ARCHITECTURES[name]())
    for block in handle.blocks:
        block.layer_scalar.fill_(scalar)
    assert check_proof(handle).component < 1e-5


def test_gains_of_norms_behind_each_other_multiply():
    handle = handle_of(ARCHITECTURES["gemma4_text: mixture"]())
    block, name = handle.blocks[1], "model.layers.1.post_feedforward_layernorm"
    experts = next(w for w in find_writers(handle) if w.name == "model.layers.1.experts.down_proj")
    assert (experts.gain_from, experts.gain_times) == ((f"{name}_2.weight", 0.0), ((f"{name}.weight", 0.0),))
    product = block.post_feedforward_layernorm_2.weight * block.post_feedforward_layernorm.weight
    torch.testing.assert_close(experts.gain, product)


def test_sites_of_several_streams_are_their_mean_or_every_row():
    handle = handle_of(ARCHITECTURES["deepseek_v4"]())
    assert (layout(handle).rows, layout(handle).rows_first) == (4, False)
    seen = {True: [], False: []}
    for every_row, shown in seen.items():
        with watch_sites(handle, lambda *at, shown=shown: shown.append(at), every_row=every_row):
            handle.hidden_states(input_ids=IDS, use_cache=False)
    assert [at[:2] for at in seen[False]] == [
        (layer, site) for layer in range(handle.layers) for site in ("pre", "mid", "post")
    ]
    for (*_, mean), (*_, rows) in zip(seen[False], seen[True], strict=True):
        assert rows.shape == (1, 10, 4, 32)
        assert torch.equal(mean, rows.mean(2))


class Normed(nn.Embedding):
    """An embedding that norms what it looked up itself, as Inkling's and Muse's do."""

    def __init__(self, weight, gain):
        super().__init__(*weight.shape)
        self.weight, self.norm = weight, nn.RMSNorm(weight.shape[1], elementwise_affine=gain)
        if gain:
            self.norm.weight.data.add_(0.3 * torch.randn(weight.shape[1]))

    def forward(self, ids):
        return self.norm(super().forward(ids))


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_norms_its_rows_is_seen_through_the_norm(tied, gain):
    model = tiny_llama(tied=tied)
    model.model.embed_tokens = Normed(model.model.embed_tokens.weight, gain)
    handle = handle_of(model)
    embedding, *_ = find_writers(handle)
    assert (embedding.name, embedding.module, embedding.gain is None) == ("model.embed_tokens.weight", "", not gain)
    assert check_proof(handle).component < 1e-5
    edit, head = Edit.uniform(find_writers(handle), torch.randn(32), 0.6), model.lm_head.weight.clone()
    with attached(handle, edit):
        live = logits(handle)
        assert torch.equal(model.lm_head.weight, head)
    bake(handle, edit)
    torch.testing.assert_close(logits(handle), live, atol=1e-5, rtol=1e-5)


class Double(nn.Module):
    """A block of two attentions and two MLPs, and an MLP whose output is added at the end (LongCat-Flash)."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second, self.short = first, second, tiny_llama(seed=5).model.layers[0].mlp

    def forward(self, x, **options):
        for block in (self.first, self.second):
            x = x + block.self_attn(hidden_states=block.input_layernorm(x), **options)[0]
            normed = block.post_attention_layernorm(x)
            aside = self.short(normed) if block is self.first else aside
            x = x + block.mlp(normed)
        return x + aside


def test_a_block_of_several_sublayers_is_explained_piece_by_piece():
    model, other = tiny_llama(), tiny_llama(seed=3)
    pairs = zip(model.model.layers[:2], other.model.layers[2:], strict=True)
    model.model.layers = nn.ModuleList(Double(*pair) for pair in pairs)
    handle = handle_of(model)
    assert check_proof(handle).component < 1e-5
    sides = [w.side for w in find_writers(handle, [0])]
    assert sides == ["attention", "mlp", "attention", "mlp", "mlp"]


class Twice(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args, **options):
        return self.block(self.block(x, *args, **options), *args, **options)


def test_a_block_that_runs_twice_inside_is_proved():
    model = tiny_llama()
    model.model.layers = nn.ModuleList(map(Twice, model.model.layers))
    assert check_proof(handle_of(model)).component < 1e-5


def test_a_stack_that_runs_twice_is_proved():
    model = tiny_llama()
    run, norm = model.model.forward, model.model.norm

    def twice(input_ids=None, inputs_embeds=None, **options):
        model.model.norm = nn.Identity()
        first = run(input_ids=input_ids, inputs_embeds=inputs_embeds, **options).last_hidden_state
        model.model.norm = norm
        return run(inputs_embeds=first, **options)

    model.model.forward = twice
    assert check_proof(handle_of(model)).component < 1e-5


def test_a_head_called_decoder_is_not_the_decoder():
    handle = handle_of(ARCHITECTURES["modernbert-decoder"]())
    assert handle.layers == 4
    assert check_proof(handle).component < 1e-5


# Where no weights can hold the edit: live, at the stream itself.


def post_norm(**options):
    return handle_of(tiny("openai-gpt", n_layer=3, n_embd=32, n_head=4, n_positions=64), **options)


def test_what_weights_cannot_hold_stops_with_the_reason_and_the_way_round():
    reason = r"a norm \(LayerNorm\) runs on the stream itself.*nothing was changed; the stream itself .* --at-stream"
    with pytest.raises(WriterError, match=reason):
        find_writers(post_norm())


@pytest.mark.parametrize("name", ["post-norm", "deepseek_v4", "gemma3n_text", "qwen4_exp_text"])
def test_at_the_stream_a_direction_is_out_of_every_site_live(name):
    handle = post_norm() if name == "post-norm" else handle_of(ARCHITECTURES.get(name, altup)())
    handle.at_stream = True
    sites = stream_sites(handle)
    assert [w.name for w in find_writers(handle)] == list(sites)
    assert list(sites) == ["stream.0.pre", *(f"stream.{layer}.post" for layer in range(handle.layers))]
    assert check_proof(handle).component < 1e-5
    before, edit = logits(handle), Edit.uniform(sites, torch.randn(32))
    with attached(handle, edit):
        live = logits(handle)
        seen = []
        with watch_sites(handle, lambda _layer, _site, stream: seen.append(stream), every_row=True):
            handle.hidden_states(input_ids=IDS, use_cache=False)
    assert torch.equal(logits(handle), before)
    assert (live - before).abs().max() > 1e-3
    assert len(seen) == 2 * handle.layers
    direction = torch.from_numpy(edit.directions[0])
    assert max(float((h @ direction).abs().max() / h.norm(dim=-1).max()) for h in seen) < 1e-5


def altup():
    return tiny(
        "gemma3n_text", num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=400,
        laurel_rank=4, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["full_attention"] * 4, max_position_embeddings=512,
    )  # fmt: skip


def test_a_recipe_of_the_stream_attaches_to_any_handle_and_bakes_into_none(tmp_path):
    handle = post_norm(at_stream=True)
    edit = Edit.uniform(find_writers(handle), torch.randn(32), 0.5)
    Edit.save(edit, tmp_path / "recipe.safetensors")
    stored = load_recipe(tmp_path / "recipe.safetensors").edit
    with attached(handle, edit):
        expected = logits(handle)
    plain = post_norm()
    with attached(plain, stored):
        assert torch.equal(logits(plain), expected)
    with pytest.raises(WriterError, match=r"stream\.0\.pre is the stream itself, which no weight holds"):
        bake(plain, stored)
