"""Removing a style by a sweep, on a tiny random model."""

from __future__ import annotations

import pytest
import torch

from abliterate.directions.means import Directions
from abliterate.measure import measurement
from abliterate.measure.judges import StyleJudge
from abliterate.prompts.style import Style
from abliterate.search.style_sweep import SweepSizes, remove_style, shifted
from models import handle_of, tiny_llama

PROMPTS = ["How are you?", "What is rain?", "Tell me of the sea.", "Why do birds sing?"]


def planted_style():
    """Directions of which one, added anywhere, makes a tiny model say one token: its unembedding."""
    handle = handle_of(tiny_llama(layers=4, tied=False))
    letter = handle.tokenizer.convert_tokens_to_ids("Q")
    row = handle.model.lm_head.weight[letter].float()
    unit = (row / row.norm()).expand(4, 3, 1, -1).clone()
    length = torch.full((4, 3, 1), 40.0, dtype=torch.float64)
    return handle, Directions(unit, length, torch.ones(4, 3, 1, dtype=torch.float64))


class SaysQ(StyleJudge):
    def __init__(self):
        super().__init__(Style(patterns=("q",), threshold=1, distinct=1, least_words=1), "says Q")


def test_removing_undoes_what_was_added(monkeypatch):
    """A model shifted towards a style is shifted back by the search."""
    monkeypatch.setattr(measurement, "is_degenerate", lambda text, finished: False)
    handle, directions = planted_style()
    with shifted(directions, [1], 4.0).attached(handle):
        asked = SweepSizes(sizes=(0.5, 4.0), screen_prompts=4, screen_tokens=4, prompts=4, tokens=4, finalists=4)
        choice = remove_style(handle, directions, PROMPTS, PROMPTS, SaysQ(), asked)
    assert choice.winner.refusals.count == 0


def test_a_shift_is_shared_by_its_blocks():
    _, directions = planted_style()
    edit = shifted(directions, range(1, 3), -2.0)
    assert [shift.layer for shift in edit.shifts] == [1, 2]
    assert all(shift.size == pytest.approx(-40.0) for shift in edit.shifts)
