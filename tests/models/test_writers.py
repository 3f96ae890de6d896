"""Writers are found in every family, and a missed one is caught and named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from abliterate.apply import proof as module
from abliterate.apply.proof import check_proof, prove, tolerance
from abliterate.common.errors import NonFiniteError, WriterError
from abliterate.models.writers import SITES, find_writers, layout, watch_sites
from models import FAMILIES, handle_of, tiny, tiny_llama, tiny_tokenizer

PARALLEL = {"gpt_neox", "cohere"}
POST_NORM = {"gemma2", "gemma3_text", "olmo2"}
LEARNT_POSITIONS = {"gpt2", "opt"}


@pytest.fixture(scope="module")
def handles():
    tokenizer = tiny_tokenizer()
    built = {}

    def handle(family):
        if family not in built:
            built[family] = handle_of(FAMILIES[family](), tokenizer)
        return built[family]

    return handle


@pytest.mark.parametrize("family", FAMILIES)
def test_every_writer_is_found_and_proved(handles, family):
    handle = handles(family)
    found = find_writers(handle)
    embeddings = [w for w in found if w.side == "embedding"]
    assert len(embeddings) == (2 if family in LEARNT_POSITIONS else 1)
    assert [(w.layer, w.side) for w in found if w.layer is not None] == [
        (layer, side) for layer in range(4) for side in ("attention", "mlp")
    ]
    assert check_proof(handle).component < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_writer_says_of_its_parameters_is_true(handles, family):
    handle = handles(family)
    parameters = dict(handle.model.named_parameters())
    for writer in find_writers(handle):
        weight = parameters[writer.name]
        assert tuple(weight.shape) == writer.shape
        assert writer.shape[writer.axis] == handle.d_model
        module = handle.model.get_submodule(writer.module)
        assert module.weight is weight
        assert (writer.bias is None) == (getattr(module, "bias", None) is None)
        if writer.bias:
            assert parameters[writer.bias] is module.bias
        assert (writer.gain is not None) == (family in POST_NORM and writer.layer is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_blocks_have_no_mid(handles, family):
    assert all((reader is None) == (family in PARALLEL) for reader in layout(handles(family)).mid_readers)


def test_biases_and_transposed_weights_are_seen(handles):
    attention = next(w for w in find_writers(handles("gpt2")) if w.side == "attention")
    assert attention.name == "transformer.h.0.attn.c_proj.weight"
    assert attention.axis == 1  # Conv1D keeps its weight transposed
    assert attention.bias == "transformer.h.0.attn.c_proj.bias"


def test_the_gain_is_what_the_norm_multiplies_by(handles):
    handle = handles("gemma3_text")
    mlp = next(w for w in find_writers(handle) if w.side == "mlp")
    norm = handle.blocks[0].post_feedforward_layernorm
    torch.testing.assert_close(mlp.gain, 1 + norm.weight)  # Gemma adds one
    handle = handles("olmo2")
    mlp = next(w for w in find_writers(handle) if w.side == "mlp")
    torch.testing.assert_close(mlp.gain, handle.blocks[0].post_feedforward_layernorm.weight)


def test_layers_limit_what_is_found(handles):
    found = find_writers(handles("llama"), [1, 3])
    assert [w.layer for w in found] == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("dropped", "place"),
    [
        (("embedding", None), "block 0, pre"),
        (("attention", 2), "block 2, mid (attention writes it)"),
        (("mlp", 1), "block 1, post (mlp writes it)"),
    ],
)
def test_a_missed_writer_is_named_by_block_and_side(monkeypatch, tiny_handle, dropped, place):
    whole = find_writers(tiny_handle)
    monkeypatch.setattr(module, "find_writers", lambda _: [w for w in whole if (w.side, w.layer) != dropped])
    proof = prove(tiny_handle)
    assert proof.component > 1e-2
    assert proof.where.startswith(place)
    with pytest.raises(WriterError) as caught:
        check_proof(tiny_handle)
    assert place in str(caught.value)


@pytest.mark.parametrize("family", sorted(POST_NORM))
def test_behind_a_norm_the_direction_itself_is_the_wrong_one(family):
    handle = handle_of(FAMILIES[family]())
    assert prove(handle).component < 1e-5
    found = layout(handle)
    without_gain = tuple(dataclasses.replace(w, gain=None) for w in found.writers)
    handle.__dict__["_layout"] = found._replace(writers=without_gain)
    assert prove(handle).component > 1e-2


def test_a_baked_direction_is_proved_gone(tiny_handle):
    r = torch.randn(32)
    assert prove(tiny_handle, r).component > 1e-2
    from abliterate.edit.edit import Edit

    Edit.uniform(find_writers(tiny_handle), r).bake(tiny_handle)
    assert prove(tiny_handle, r).component < 1e-5
    assert prove(tiny_handle, torch.randn(32)).component > 1e-2  # that direction only


def test_the_model_is_as_it_was_after_a_proof(tiny_handle):
    before = {name: p.clone() for name, p in tiny_handle.model.named_parameters()}
    ids = torch.arange(5)[None]
    logits = tiny_handle.model(ids).logits
    prove(tiny_handle)
    assert all(torch.equal(p, before[name]) for name, p in tiny_handle.model.named_parameters())
    assert torch.equal(tiny_handle.model(ids).logits, logits)


class Squashed(nn.Module):
    """An MLP whose output is not linear in any weight."""

    def __init__(self, mlp):
        super().__init__()
        self.inner = mlp

    def forward(self, x):
        return torch.tanh(self.inner(x))


class Hidden(nn.Module):
    """A block that adds what no module of it gives."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.shift = nn.Parameter(torch.randn(32))

    def forward(self, x, *args, **kwargs):
        return self.block(x, *args, **kwargs) + torch.sin(self.shift * x)


def test_a_writer_that_is_not_linear_is_an_error_that_names_it(tiny_handle):
    block = tiny_handle.blocks[1]
    block.mlp = Squashed(block.mlp)
    with pytest.raises(WriterError, match=r"block 1, mlp.*model.layers.1.mlp \(Squashed\)"):
        find_writers(tiny_handle)


def test_an_addition_without_a_module_is_an_error_that_names_block_and_side(tiny_handle):
    tiny_handle.blocks[2] = Hidden(tiny_handle.blocks[2])
    with pytest.raises(WriterError, match="block 2, mlp"):
        find_writers(tiny_handle)


def test_without_its_centring_a_layer_norm_fails_the_proof():
    handle = handle_of(tiny("bloom", n_layer=2, hidden_size=32, n_head=4))
    assert check_proof(handle).component < 1e-5
    found = layout(handle)
    handle.__dict__["_layout"] = found._replace(
        writers=tuple(dataclasses.replace(w, centred=False) for w in found.writers)
    )
    with pytest.raises(WriterError, match="block 0, pre"):
        check_proof(handle)


def test_half_precision_is_proved_within_its_rounding():
    handle = handle_of(tiny_llama(dtype=torch.bfloat16, d_model=256))
    assert 1e-5 < check_proof(handle).component < tolerance(handle) < 256**-0.5
    whole = find_writers(handle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find_writers", lambda _: whole[:-1])
        with pytest.raises(WriterError, match="block 3, post"):
            check_proof(handle)


def test_a_stream_that_is_not_finite_is_named(tiny_handle):
    find_writers(tiny_handle)
    tiny_handle.blocks[2].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="block 2, mid"):
        prove(tiny_handle)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_the_stream_in_order(handles, family):
    handle = handles(family)
    seen = []
    ids = torch.randint(0, 400, (2, 6))
    with watch_sites(handle, lambda layer, site, stream: seen.append((layer, site, stream))):
        handle.hidden_states(input_ids=ids, use_cache=False)
    sites = [s for s in SITES if s != "mid" or family not in PARALLEL]
    assert [(layer, site) for layer, site, _ in seen] == [(layer, site) for layer in range(4) for site in sites]
    assert {tuple(stream.shape) for *_, stream in seen} == {(2, 6, 32)}
    streams = {(layer, site): stream for layer, site, stream in seen}
    for layer in range(3):
        assert torch.equal(streams[layer, "post"], streams[layer + 1, "pre"])
