"""Every architecture is found, proved, edited, saved, loaded by plain transformers and proved again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from abliterate.apply.proof import check_proof, prove
from abliterate.common.errors import WriterError
from abliterate.edit.edit import Edit, orthonormal
from abliterate.models.writers import find_writers
from models import ARCHITECTURES, FAMILIES, MULTIMODAL, handle_of, tiny_llama, tiny_tokenizer

IDS = torch.tensor([[50, 17, 300, 42, 7, 99, 250, 8, 8, 31], [9, 10, 11, 377, 20, 40, 6, 8, 210, 30]])
FUSED = {  # mixtures whose experts are one 3-D parameter, and the axis of it that runs along d_model
    "mixtral": 1, "qwen2_moe": 1, "qwen3_moe": 1, "olmoe": 1, "deepseek_v3": 1, "gpt_oss": 2, "llama4_text": 2,
    "granitemoe": 1, "jamba": 1, "qwen3_next": 1, "granitemoehybrid": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def logits(handle):
    return handle.model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_found_proved_baked_saved_loaded_and_proved_again(name, tokenizer, tmp_path):
    handle = handle_of(ARCHITECTURES[name](), tokenizer)
    found = find_writers(handle)
    proofs = [prove(handle, seed=seed).component for seed in range(3)]
    assert max(proofs) < 1e-5
    r = torch.randn(handle.d_model)
    assert prove(handle, r).component > 1e-2
    edit = Edit.uniform(found, r)
    original = logits(handle)
    with edit.attached(handle):
        live = logits(handle)
    assert torch.equal(logits(handle), original)
    assert (live - original).abs().max() > 1e-2
    edit.bake(handle)
    torch.testing.assert_close(logits(handle), live, atol=2e-5, rtol=2e-5)
    baked = prove(handle, r).component
    assert baked < 1e-5

    handle.model.save_pretrained(tmp_path)
    auto_class = AutoModelForImageTextToText if name in MULTIMODAL else AutoModelForCausalLM
    again = handle_of(auto_class.from_pretrained(tmp_path), tokenizer)
    assert type(again.model) is type(handle.model)
    reloaded = prove(again, r).component
    assert reloaded < 1e-5
    torch.testing.assert_close(logits(again), live, atol=2e-5, rtol=2e-5)
    assert [w.name for w in find_writers(again)] == [w.name for w in found]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_live_is_baked_for_a_plane_with_strengths_of_its_own_at_each_writer(name, tokenizer):
    handle = handle_of(ARCHITECTURES[name](), tokenizer)
    found = find_writers(handle)
    edit = Edit(tuple(w.name for w in found), orthonormal(torch.randn(2, 32)), torch.rand(len(found), 2) * 1.5 - 0.3)
    with edit.attached(handle):
        live = logits(handle)
    edit.bake(handle)
    # float32's rounding, which recurrent layers pile up, against the size of the logits
    torch.testing.assert_close(logits(handle), live, atol=2e-5 * float(live.abs().max()), rtol=5e-5)


@pytest.mark.parametrize("name", FUSED)
def test_fused_experts_are_one_writer_of_three_dimensions(name, tokenizer):
    handle = handle_of(ARCHITECTURES[name](), tokenizer)
    fused = [w for w in find_writers(handle) if len(w.shape) == 3]
    assert fused
    for writer in fused:
        assert (writer.axis, writer.side) == (FUSED[name], "mlp")
        assert writer.shape[0] == 4 or name == "llama4_text"
        assert writer.shape[writer.axis] == handle.d_model
        assert writer.module == writer.name.rpartition(".")[0]
        assert (writer.bias is not None) == (name == "gpt_oss")
        if writer.bias:
            assert writer.bias_axis == 1
            assert handle.model.get_parameter(writer.bias).shape == (4, 32)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_projector_is_found_when_asked_for_and_else_left_alone(name, tokenizer):
    from abliterate.models.projector import _ImageFeatures, _noise

    handle = handle_of(ARCHITECTURES[name](), tokenizer)
    assert all(w.side != "projector" for w in find_writers(handle))
    whole = find_writers(handle, projector=True)
    projector = [w for w in whole if w.side == "projector"]
    assert len(projector) == 1
    assert projector[0].shape[projector[0].axis] == handle.d_model
    features, images = _ImageFeatures(handle.model.base_model), _noise(handle)
    r = torch.randn(32)
    r /= r.norm()
    before = features(**images)
    assert (before @ r).abs().max() > 1e-2
    with Edit.uniform(find_writers(handle), r).attached(handle):
        assert torch.equal(features(**images), before)
    with Edit.uniform(whole, r).attached(handle):
        live = features(**images)
    assert (live @ r).abs().max() < 1e-5
    Edit.uniform(whole, r).bake(handle)
    torch.testing.assert_close(features(**images), live, atol=1e-5, rtol=1e-5)


def test_a_model_without_images_has_no_projector(tokenizer):
    handle = handle_of(tiny_llama(), tokenizer)
    assert find_writers(handle, projector=True) == find_writers(handle)


def test_a_norm_over_the_embedding_writes_its_bias_and_takes_the_mean_out(tokenizer):
    handle = handle_of(ARCHITECTURES["bloom"](), tokenizer)
    weight, bias = (w for w in find_writers(handle) if w.side == "embedding")
    norm = handle.model.transformer.word_embeddings_layernorm
    assert weight.name == "transformer.word_embeddings.weight"
    assert weight.centred
    assert weight.gain_from == ("transformer.word_embeddings_layernorm.weight", 0.0)
    torch.testing.assert_close(weight.gain, norm.weight.data)
    assert (bias.name, bias.module) == (f"{weight.module}_layernorm.bias", f"{weight.module}_layernorm")
    assert (bias.shape, bias.axis, bias.gain) == ((32,), 0, None)


@pytest.mark.parametrize(("name", "number"), [("gemma2", 1.0), ("gemma3_text", 1.0), ("olmo2", 0.0), ("glm4", 0.0)])
def test_gains_are_traced_to_the_parameter_they_come_from(name, number, tokenizer):
    handle = handle_of(ARCHITECTURES[name](), tokenizer)
    parameters = dict(handle.model.named_parameters())
    behind = [w for w in find_writers(handle) if w.gain is not None]
    assert len(behind) == 8
    for writer in behind:
        source, added = writer.gain_from
        assert added == number
        assert torch.equal(writer.gain, parameters[source] + number)
        assert not writer.centred


# What an architecture of tomorrow may look like: blocks that no library has.


class Mixture(nn.Module):
    """Experts as a list of linear layers, only one of which the router ever picks; a sigmoid-gated shared expert."""

    def __init__(self, mlp, experts=6):
        super().__init__()
        self.shared = mlp
        self.gate = nn.Linear(32, 1)
        self.up = nn.ModuleList(nn.Linear(32, 16) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(16, 32) for _ in range(experts))

    def chosen(self, x):
        return 2

    def forward(self, x):
        chosen = self.chosen(x)
        own = self.down[chosen](torch.relu(self.up[chosen](x)))
        return own * torch.softmax(self.gate(x), 1) + torch.sigmoid(self.gate(x)) * self.shared(x)


class Bare(nn.Module):
    """Uses two parameters itself, one of them transposed, beside a linear layer: no module gives one writer alone."""

    def __init__(self, mlp):
        super().__init__()
        self.shared = mlp
        self.down = nn.Parameter(torch.randn(32, 32) / 6)
        self.down_too = nn.Parameter(torch.randn(3, 32, 32) / 6)

    def forward(self, x):
        return (
            self.shared(x) + torch.tanh(x) @ self.down.T + torch.einsum("...i,eio->...o", torch.sin(x), self.down_too)
        )


class Half(nn.Module):
    """An MLP of which one part is linear in a weight and the other in none."""

    def __init__(self, mlp):
        super().__init__()
        self.inner = mlp
        self.down = nn.Linear(32, 32)

    def forward(self, x):
        return self.down(torch.tanh(x)) + torch.tanh(self.inner(x))


class Sneaky(nn.Module):
    """A block that adds something of its own, but only to long prompts: looking at a few tokens can't show it."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.extra = nn.Linear(32, 32)

    def forward(self, x, *args, **kwargs):
        out = self.block(x, *args, **kwargs)
        return out + self.extra(x) if x.shape[1] > 16 else out


def both_ways(handle, edit):
    with edit.attached(handle):
        live = logits(handle)
    edit.bake(handle)
    return live, logits(handle)


def test_experts_in_a_list_are_all_writers_whether_the_router_picked_them_or_not(tiny_handle):
    tiny_handle.blocks[1].mlp = Mixture(tiny_handle.blocks[1].mlp).requires_grad_(False)
    found = {w.name: w for w in find_writers(tiny_handle) if w.layer == 1 and w.side == "mlp"}
    experts = [f"model.layers.1.mlp.down.{i}.weight" for i in range(6)]
    assert list(found) == ["model.layers.1.mlp.shared.down_proj.weight", *experts]
    assert all(found[name].bias == name.replace("weight", "bias") for name in experts)
    assert check_proof(tiny_handle).component < 1e-5
    live, baked = both_ways(tiny_handle, Edit.uniform(find_writers(tiny_handle), torch.randn(32), 0.6))
    torch.testing.assert_close(baked, live, atol=1e-5, rtol=1e-5)
    tiny_handle.blocks[1].mlp.chosen = lambda x: 5
    tiny_handle.__dict__.pop("_layout")
    assert prove(tiny_handle).component < 1e-5


def test_an_expert_the_probe_never_saw_is_noticed_by_the_proof_when_it_is_missed(tiny_handle, monkeypatch):
    from abliterate.apply import proof

    mixture = tiny_handle.blocks[1].mlp = Mixture(tiny_handle.blocks[1].mlp).requires_grad_(False)
    whole = find_writers(tiny_handle)
    monkeypatch.setattr(proof, "find_writers", lambda _: [w for w in whole if ".mlp.down.5." not in w.name])
    assert prove(tiny_handle).component < 1e-5  # the router doesn't pick it ...
    mixture.chosen = lambda x: 5
    with pytest.raises(WriterError, match=r"block 1, post \(mlp writes it\)"):  # ... until it does
        check_proof(tiny_handle)


def test_parameters_that_a_module_uses_itself_are_writers_and_live_is_baked(tiny_handle):
    tiny_handle.blocks[2].mlp = Bare(tiny_handle.blocks[2].mlp).requires_grad_(False)
    found = {w.name.removeprefix("model.layers.2.mlp."): w for w in find_writers(tiny_handle) if w.layer == 2}
    assert (found["down"].axis, found["down"].module) == (0, "")
    assert (found["down_too"].axis, found["down_too"].module) == (2, "")
    assert found["shared.down_proj.weight"].module == "model.layers.2.mlp.shared.down_proj"
    assert check_proof(tiny_handle).component < 1e-5
    before = {name: p.clone() for name, p in tiny_handle.model.named_parameters()}
    edit = Edit(tuple(w.name for w in find_writers(tiny_handle)), orthonormal(torch.randn(2, 32)), torch.rand(11, 2))
    with edit.attached(tiny_handle):
        live = logits(tiny_handle)
    assert all(torch.equal(p, before[name]) for name, p in tiny_handle.model.named_parameters())
    edit.bake(tiny_handle)
    torch.testing.assert_close(logits(tiny_handle), live, atol=1e-5, rtol=1e-5)


def test_a_module_only_part_of_which_is_linear_is_an_error_that_names_it(tiny_handle):
    tiny_handle.blocks[1].mlp = Half(tiny_handle.blocks[1].mlp).requires_grad_(False)
    with pytest.raises(WriterError, match=r"block 1, mlp.*model.layers.1.mlp \(Half\)"):
        find_writers(tiny_handle)


def test_a_mixture_behind_a_norm_is_seen_through_it(tokenizer):
    handle = handle_of(FAMILIES["gemma3_text"](), tokenizer)
    handle.blocks[1].mlp = Mixture(handle.blocks[1].mlp).requires_grad_(False)
    behind = [w for w in find_writers(handle) if w.layer == 1 and w.side == "mlp"]
    assert len(behind) == 7
    assert all(torch.equal(w.gain, 1 + handle.blocks[1].post_feedforward_layernorm.weight) for w in behind)
    assert check_proof(handle).component < 1e-5


def test_layer_norms_behind_a_block_take_the_mean_out_and_write_their_bias(tokenizer):
    handle = handle_of(FAMILIES["olmo2"](), tokenizer)
    for block in handle.blocks:
        norm = block.post_feedforward_layernorm = nn.LayerNorm(32)
        norm.weight.data.add_(0.3 * torch.randn(32))
        norm.bias.data.add_(0.3 * torch.randn(32))
    handle.model.requires_grad_(False)
    mlps = [w for w in find_writers(handle) if w.side == "mlp"]
    assert [(w.centred, len(w.shape)) for w in mlps] == [(True, 2), (False, 1)] * 4
    assert check_proof(handle).component < 1e-5
    live, baked = both_ways(handle, Edit.uniform(find_writers(handle), torch.randn(32), 0.7))
    torch.testing.assert_close(baked, live, atol=1e-5, rtol=1e-5)


def test_a_block_that_sneaks_in_an_addition_is_named(tiny_handle):
    tiny_handle.blocks[2] = Sneaky(tiny_handle.blocks[2]).requires_grad_(False)
    with pytest.raises(WriterError, match=r"left at block 2, post \(mlp writes it\); a writer was missed there"):
        check_proof(tiny_handle)


def test_lists_of_experts_are_not_taken_for_the_blocks(tiny_handle):
    tiny_handle.blocks[0].mlp = Mixture(tiny_handle.blocks[0].mlp, experts=9)
    again = handle_of(tiny_handle.model, tiny_handle.tokenizer)
    assert again.layers == 4


def test_in_half_precision_the_same_is_found(tokenizer):
    for name in ("mixtral", "gpt_oss", "qwen2_moe", "gemma4_text", "deepseek_v4"):
        wide = handle_of(ARCHITECTURES[name](), tokenizer)
        names = [w.name for w in find_writers(wide)]
        half = handle_of(ARCHITECTURES[name]().bfloat16(), tokenizer)
        assert [w.name for w in find_writers(half)] == names
        check_proof(half)
