"""Statistics of the stream equal those of plain forward passes."""

from __future__ import annotations

import pytest
import torch

from abliterate.common.errors import AbliterateError, NonFiniteError, PromptError
from abliterate.directions.activations import collect, default_positions, sites_with_stream, winsorised
from abliterate.directions.activations_file import load_activations, save_activations
from abliterate.models import batches
from models import FAMILIES, handle_of, tiny_llama

TARGET = [
    "Hi",
    "Explain how a lock is picked, step by step",
    "Name three",
    "Write me a long poem about the sea at night",
]
BASELINE = ["Why?", "Sum up the plot of a book that you like", "Spell 'cat'"]


def plain_streams(handle, text, positions):
    """[layer, site, position, d_model] of one prompt, by a plain forward pass and arithmetic."""
    attention, last = [], []
    hooks = [
        block.self_attn.register_forward_hook(lambda _m, _a, out: attention.append(out[0][0]))
        for block in handle.blocks
    ]
    hooks.append(handle.blocks[-1].register_forward_hook(lambda _m, _a, out: last.append(out[0])))
    out = handle.model.model(torch.tensor(handle.prompt_ids([text])), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    pre = [h[0] for h in out.hidden_states[:-1]]
    post = [*pre[1:], last[0]]
    mid = [x + a for x, a in zip(pre, attention, strict=True)]
    return torch.stack([torch.stack(sites)[:, -positions:] for sites in zip(pre, mid, post, strict=True)])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_prompts_stream_is_that_of_a_plain_forward(monkeypatch, share, batch_size):
    if not share:
        monkeypatch.setattr(batches, "continues_from_cache", lambda _: False)
    handle = handle_of(tiny_llama())
    got = collect(handle, TARGET, BASELINE, positions=3, batch_size=batch_size, keep_vectors=True)
    for texts, side in ((TARGET, got.target), (BASELINE, got.baseline)):
        expected = torch.stack([plain_streams(handle, text, 3) for text in texts])
        assert side.count == len(texts)
        torch.testing.assert_close(side.vectors, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(side.mean, expected.double().mean(0), atol=1e-5, rtol=1e-5)
        variance = expected.double().var(0, correction=0).sum(-1)
        torch.testing.assert_close(side.variance, variance, atol=1e-4, rtol=1e-4)
    assert (got.layers, got.positions, got.d_model) == (4, 3, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_vectors_in_every_family(family):
    handle = handle_of(FAMILIES[family]())
    got = collect(handle, TARGET, BASELINE, batch_size=2, keep_vectors=True).target
    vectors = got.vectors.double()
    has_mid = family not in ("gpt_neox", "cohere")
    assert sites_with_stream(handle) == (["pre", "mid", "post"] if has_mid else ["pre", "post"])
    assert got.mean[:, ::2].isfinite().all()
    assert got.mean[:, 1].isfinite().all() if has_mid else got.mean[:, 1].isnan().all()
    torch.testing.assert_close(got.mean, vectors.mean(0), equal_nan=True)
    torch.testing.assert_close(got.variance, vectors.var(0, correction=0).sum(-1), equal_nan=True)
    alone = collect(handle, TARGET[1:2], BASELINE, keep_vectors=True).target.vectors[0]
    torch.testing.assert_close(got.vectors[1], alone, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_variance_survives_a_mean_far_from_zero():
    handle = handle_of(tiny_llama())
    handle.embedding.weight.add_(1e3)
    got = collect(handle, TARGET, BASELINE, keep_vectors=True).target
    exact = got.vectors.double().var(0, correction=0).sum(-1)
    torch.testing.assert_close(got.variance, exact, rtol=1e-6, atol=1e-9)


def test_the_order_and_number_of_prompts_done_are_kept():
    done = []
    handle = handle_of(tiny_llama())
    collect(handle, TARGET, BASELINE, batch_size=2, tick=done.append)
    assert sum(done) == len(TARGET) + len(BASELINE)


def test_vectors_are_not_kept_unasked(tiny_handle):
    assert collect(tiny_handle, TARGET, BASELINE).target.vectors is None


def test_positions_default_to_the_templates_suffix_and_at_most_five(tiny_handle):
    assert default_positions(tiny_handle) == 5
    plain = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert default_positions(handle_of(tiny_llama(), chat_template=plain)) == 1


@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.down_proj"])
def test_nan_is_named_by_its_layer(module):
    handle = handle_of(tiny_llama())
    collect(handle, TARGET, BASELINE)
    handle.blocks[2].get_submodule(module).weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 2"):
        collect(handle, TARGET, BASELINE)


def test_a_side_without_prompts_or_with_too_short_ones(tiny_handle):
    with pytest.raises(PromptError, match="one side is empty"):
        collect(tiny_handle, TARGET, [])
    with pytest.raises(PromptError, match="fewer than the 400 positions"):
        collect(tiny_handle, TARGET, BASELINE, positions=400)


def test_winsorising_clamps_each_vector_at_its_quantile(tiny_handle):
    vectors = torch.randn(5, 2, 100)
    out = winsorised(vectors, 0.9)
    limit = vectors.abs().quantile(0.9, dim=-1, keepdim=True)
    outside = vectors.abs() > limit
    assert outside.sum(-1).eq(10).all()
    assert torch.equal(out[~outside], vectors[~outside])
    assert torch.equal(out[outside], (limit * vectors.sign())[outside])
    plain = collect(tiny_handle, TARGET, BASELINE, keep_vectors=True).target.vectors
    clamped = collect(tiny_handle, TARGET, BASELINE, winsorise=0.9, keep_vectors=True).target
    torch.testing.assert_close(clamped.vectors, winsorised(plain, 0.9))
    torch.testing.assert_close(clamped.mean, winsorised(plain, 0.9).double().mean(0))


def test_a_file_gives_back_the_activations(tmp_path, tiny_handle):
    activations = collect(tiny_handle, TARGET, BASELINE, keep_vectors=True)
    activations.provenance["seed"] = 3
    save_activations(activations, tmp_path / "a.safetensors", tiny_handle)
    again = load_activations(tmp_path / "a.safetensors", tiny_handle)
    assert again.provenance == {"seed": 3}
    for mine, theirs in ((again.target, activations.target), (again.baseline, activations.baseline)):
        assert mine.count == theirs.count
        for name in ("mean", "variance", "vectors"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))


def test_files_that_are_missing_damaged_or_for_another_model(tmp_path, tiny_handle):
    path = tmp_path / "a.safetensors"
    with pytest.raises(AbliterateError, match="not found"):
        load_activations(path)
    save_activations(collect(tiny_handle, TARGET, BASELINE), path, tiny_handle)
    with pytest.raises(AbliterateError, match="another config"):
        load_activations(path, handle_of(tiny_llama(layers=3)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AbliterateError, match="damaged"):
        load_activations(path)
