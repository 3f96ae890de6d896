"""Shifts: what is added at a block's output, live and in a bias, is the same."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from abliterate.apply.biases import find_switch
from abliterate.apply.shifts import bias_holder
from abliterate.common.errors import NonFiniteError, WriterError
from abliterate.edit.edit import Edit, Shift, normalised
from abliterate.models.handle import Handle
from abliterate.models.writers import find_writers, watch_sites
from models import FAMILIES, cast, handle_of, save_tiny, tiny, tiny_llama

D, LAYERS = 32, 4
IDS = torch.tensor([[5, 9, 17, 33, 101, 7]])


def direction(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(normalised(torch.randn(D, generator=torch.Generator().manual_seed(seed))))


@torch.no_grad()
def sites(handle: Handle) -> dict[tuple[int, str], torch.Tensor]:
    seen = {}
    with watch_sites(handle, lambda layer, site, stream: seen.__setitem__((layer, site), stream.clone())):
        handle.hidden_states(input_ids=IDS, use_cache=False)
    return seen


@torch.no_grad()
def logits(handle: Handle) -> torch.Tensor:
    return handle.model(input_ids=IDS).logits


# modules that add to the stream with a bias, blocks in a row and parallel ones, multipliers, tuples as outputs
WITH_BIAS = {
    "llama": lambda: tiny_llama(tied=False, biases=True),
    "gpt2": FAMILIES["gpt2"],
    "gpt_neox": FAMILIES["gpt_neox"],
    "starcoder2": FAMILIES["starcoder2"],
    "opt": FAMILIES["opt"],
    "granite": lambda: tiny(
        "granite", num_hidden_layers=LAYERS, hidden_size=D, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, residual_multiplier=0.22, mlp_bias=True, attention_bias=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_live_the_vector_is_added_at_every_token_of_the_blocks_output_and_nowhere_before(family):
    handle = handle_of(FAMILIES[family]())
    before, plain = sites(handle), logits(handle)
    with Edit.shifting(2, direction(), -3.0).attached(handle):
        after = sites(handle)
    for place in [(layer, site) for layer, site in before if layer < 2 or (layer == 2 and site != "post")]:
        assert torch.equal(after[place], before[place])
    moved = after[2, "post"] - before[2, "post"]
    torch.testing.assert_close(moved, (-3.0 * direction()).expand_as(moved), atol=1e-5, rtol=0)
    assert torch.equal(logits(handle), plain)  # gone with the context


@pytest.mark.parametrize("family", WITH_BIAS)
def test_in_the_bias_it_is_what_it_is_live(family):
    handle = handle_of(WITH_BIAS[family]())
    edit = Edit.shifting(1, direction(), 2.0) + Edit.shifting(3, direction(1), -1.5) + Edit.shifting(3, direction(2), 1)
    plain = logits(handle)
    with edit.attached(handle):
        live, stream = logits(handle), sites(handle)
    edit.bake(handle)
    for place, expected in stream.items():
        # inside its own block a shift is live only at the end, in the bias where that is added
        if place[1] == "post" or place[0] not in (1, 3):
            torch.testing.assert_close(sites(handle)[place], expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits(handle), live, atol=2e-4, rtol=1e-4)
    assert (live - plain).abs().max() > 1e-2


def test_with_a_direction_taken_out_of_the_same_bias_both_hold():
    handle = handle_of(WITH_BIAS["llama"]())
    r = direction()
    edit = Edit.uniform(find_writers(handle), r) + Edit.shifting(LAYERS - 1, r, 2.5)  # along what is taken out
    with edit.attached(handle):
        live = sites(handle)
    edit.bake(handle)
    for stream in (live, sites(handle)):
        along = {place: h @ r for place, h in stream.items()}
        torch.testing.assert_close(along[LAYERS - 1, "pre"], torch.zeros(1, 6), atol=1e-4, rtol=0)
        torch.testing.assert_close(along[LAYERS - 1, "post"], torch.full((1, 6), 2.5), atol=1e-4, rtol=0)


def test_the_bias_that_the_mlp_reads_first_is_not_taken():
    handle = handle_of(tiny("llama", num_hidden_layers=2, hidden_size=D, intermediate_size=64, num_attention_heads=4,
                            num_key_value_heads=2, attention_bias=True))  # fmt: skip
    with pytest.raises(WriterError, match="block 1 has no bias that reaches its output"):
        bias_holder(handle, 1)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_class_without_biases_says_so_and_stays_as_it_is(family):
    handle = handle_of(FAMILIES[family]())
    before = {name: p.clone() for name, p in handle.model.named_parameters()}
    config = handle.model.config.to_dict()
    edit = Edit.uniform(find_writers(handle), direction()) + Edit.shifting(1, direction(), 1.0)
    with pytest.raises(WriterError, match=r"ForCausalLM tiny: block 1 has no bias.*lora_bias.*control-vector, hooks"):
        edit.bake(handle)
    assert list(before) == [name for name, _ in handle.model.named_parameters()]
    assert all(torch.equal(p, before[name]) for name, p in handle.model.named_parameters())
    assert handle.model.config.to_dict() == config


# --- biases that the class can have ---

# what in its config gives the class biases, found by trying; a parallel block's attention bias holds a shift too
SWITCHES = {"llama": "mlp_bias", "granite": "mlp_bias", "cohere": "attention_bias"}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((f, torch.float32) for f in SWITCHES), ("llama", torch.bfloat16), ("cohere", torch.bfloat16)],
)
def test_a_class_that_can_have_biases_is_given_them(tmp_path, family, dtype):
    handle = handle_of(cast(FAMILIES[family](), dtype))
    edit = Edit.uniform(find_writers(handle), direction(3), 0.5) + Edit.shifting(2, direction(), 2.0)
    names = {name for name, _ in handle.model.named_parameters()}
    plain = logits(handle)
    with edit.attached(handle):
        live = logits(handle)
    edit.bake(handle)
    assert getattr(handle.model.config, SWITCHES[family]) is True
    new = {n: p for n, p in handle.model.named_parameters() if n not in names and "lm_head" not in n}
    assert new and all(n.endswith("bias") for n in new)
    assert sum(bool(p.any()) for p in new.values()) == 1  # all the others are zero
    save_tiny(tmp_path, handle.model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    rounding = 2e-4 if dtype == torch.float32 else 0.05
    for found in (logits(handle), again(IDS).logits):
        assert (found - live).abs().max() < rounding * live.abs().max()
    assert (live - plain).abs().max() > 4 * rounding * live.abs().max()


def test_a_switch_that_gives_none_at_the_blocks_output_is_not_taken():
    """Qwen's attention bias is read by the MLP behind it, Gemma's lies before a norm."""
    for family in ("qwen3", "gemma3_text", "mistral"):
        assert find_switch(FAMILIES[family]().config, family, [1]) is None


def test_what_was_given_is_taken_back_when_baking_fails():
    handle = handle_of(tiny_llama(tied=False))
    find_writers(handle)
    handle.model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    before, config = list(handle.model.state_dict()), handle.model.config.to_dict()
    edit = Edit.uniform(find_writers(handle), direction()) + Edit.shifting(1, direction(), 1.0)
    with pytest.raises(NonFiniteError):
        edit.bake(handle)
    assert list(handle.model.state_dict()) == before and handle.model.config.to_dict() == config


def test_the_negative_of_a_shift_undoes_it():
    handle = handle_of(tiny_llama(tied=False))
    plain = logits(handle)
    edit = Edit.shifting(1, direction(), 2.0)
    edit.bake(handle)
    assert (logits(handle) - plain).abs().max() > 1e-2
    (-edit).bake(handle)
    torch.testing.assert_close(logits(handle), plain, atol=1e-5, rtol=0)


def test_trying_a_bias_leaves_it_bit_for_bit():
    handle = handle_of(tiny_llama(tied=False, biases=True, dtype=torch.bfloat16))
    before = {name: p.clone() for name, p in handle.model.named_parameters()}
    assert bias_holder(handle, 0).name == "model.layers.0.mlp.down_proj.bias"
    assert all(torch.equal(p, before[name]) for name, p in handle.model.named_parameters())


def test_the_multiplier_between_bias_and_stream_is_found():
    assert bias_holder(handle_of(WITH_BIAS["granite"]()), 1).scale == pytest.approx(0.22, abs=1e-4)
    assert bias_holder(handle_of(WITH_BIAS["llama"]()), 1).scale == 1.0


@pytest.mark.parametrize(
    ("shift", "message"),
    [(Shift(LAYERS, direction(), 1.0), "layers 0 to 3"), (Shift(0, torch.eye(8)[0], 1.0), "d_model 32")],
)
def test_a_shift_for_another_model_is_refused(shift, message):
    handle = handle_of(tiny_llama(tied=False, biases=True))
    width = len(shift.direction)
    edit = Edit((), torch.zeros(0, width), torch.zeros(0, 0), (shift,))
    with pytest.raises(WriterError, match=message):
        edit.bake(handle)
    with pytest.raises(WriterError, match=message), edit.attached(handle):
        pass
