"""The activations of a contrast: along answers, under system prompts, and at the prompts' last positions."""

from __future__ import annotations

import pytest
import torch

from abliterate.common.errors import PromptError
from abliterate.directions.activations import collect, collect_rows
from abliterate.directions.contrast import contrast, pair_rows, split_pairs, under
from abliterate.measure.judges import StyleJudge
from abliterate.models.writers import SITES, watch_sites
from abliterate.prompts.behaviour import load_behaviour
from abliterate.prompts.style import Style

ANY = StyleJudge(Style(patterns=(r"\w",), threshold=0.1, distinct=1))


def means_by_hand(handle, row, length):
    read = torch.zeros(handle.layers, len(SITES), handle.d_model, dtype=torch.float64)

    def look(layer, site, stream):
        read[layer, SITES.index(site)] = stream[0, -length:].double().mean(0)

    with torch.inference_mode(), watch_sites(handle, look):
        handle.hidden_states(input_ids=torch.tensor([row]), use_cache=False)
    return read


def test_means_along_answers_of_every_length_are_those_of_one_row_at_a_time(tiny_handle):
    rows = pair_rows(tiny_handle, load_behaviour("slop").pairs[:10])
    assert len(set(rows.answers[0])) > 3
    found = collect_rows(tiny_handle, rows.target, rows.baseline, answers=rows.answers, batch_size=4)
    for side, ids, lengths in (
        (found.target, rows.target, rows.answers[0]),
        (found.baseline, rows.baseline, rows.answers[1]),
    ):
        by_hand = torch.stack([means_by_hand(tiny_handle, row, n) for row, n in zip(ids, lengths, strict=True)])
        assert torch.allclose(side.mean[:, :, 0], by_hand.mean(0), atol=1e-5)
        variance = (by_hand - by_hand.mean(0)).square().mean(0).sum(-1)
        assert torch.allclose(side.variance[:, :, 0], variance, rtol=1e-3)


def test_last_positions_are_those_of_collect(tiny_handle):
    target, baseline = ["How are you today?", "What is rain?"], ["Tell me of the sea.", "Why do birds sing?"]
    prompts = collect(tiny_handle, target, baseline, positions=3)
    rows = collect_rows(tiny_handle, tiny_handle.prompt_ids(target), tiny_handle.prompt_ids(baseline), positions=3)
    assert torch.allclose(rows.target.mean, prompts.target.mean, atol=1e-5)
    assert torch.allclose(rows.baseline.mean, prompts.baseline.mean, atol=1e-5)


def test_an_answer_longer_than_its_row_is_an_error(tiny_handle):
    with pytest.raises(PromptError, match="shorter"):
        collect_rows(tiny_handle, [[1, 2]], [[1, 2]], answers=([3], [1]))


def test_under_two_system_prompts(tiny_handle):
    behaviour = load_behaviour("persona")
    systems = behaviour.definition.system_prompts
    rows = contrast(tiny_handle, behaviour, [], ANY, filter=False)
    texts = [[tiny_handle.tokenizer.decode(row) for row in side] for side in (rows.target, rows.baseline)]
    assert len(texts[0]) == len(texts[1]) >= 8
    assert all(systems.target in text for text in texts[0]) and all(systems.baseline in text for text in texts[1])
    assert tiny_handle.system_prompt is None
    for row, length in zip(rows.target, rows.answers[0], strict=True):
        asked = tiny_handle.tokenizer.decode(row[:-length])
        assert asked.endswith("assistant\n")  # the answer, and nothing of the prompt, is averaged


def test_the_system_prompt_comes_back_after_an_error(tiny_handle):
    tiny_handle.system_prompt = "before"
    with pytest.raises(RuntimeError), under(tiny_handle, "other"):
        raise RuntimeError
    assert tiny_handle.system_prompt == "before"


def test_pairs_held_out():
    pairs = load_behaviour("slop").pairs
    train, held_out = split_pairs(pairs)
    assert (len(train), len(held_out)) == (60, 20) and not set(train) & set(held_out)
    assert split_pairs(pairs) == (train, held_out)
