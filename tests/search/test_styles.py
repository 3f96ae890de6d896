"""Fitting a style on a tiny random model: one token is the style."""

from __future__ import annotations

import pytest
import torch

from abliterate.common.errors import AbliterateError
from abliterate.directions.means import Directions
from abliterate.measure import measurement
from abliterate.measure.judges import StyleJudge
from abliterate.prompts.style import Style
from abliterate.search.styles import StyleSettings, Taught, blocks_of, fit_style, repeats
from abliterate.search.variable_edit import VariableShift
from models import handle_of, tiny_llama

PROMPTS = ["How are you?", "What is rain?", "Tell me of the sea.", "Why do birds sing?"]
QUICK = StyleSettings(steps=6, steps_between=1, rounds=1, batch=4, rate=1.0, prompts=4, tokens=4)


class SaysQ(StyleJudge):
    def __init__(self) -> None:
        super().__init__(Style(patterns=("q",), threshold=1, distinct=1, least_words=1), "says Q")


def planted():
    """A tiny model, a token, and directions half of which, at least, is that token's unembedding."""
    handle = handle_of(tiny_llama(layers=4, tied=False))
    letter = handle.tokenizer.convert_tokens_to_ids("Q")
    noise = torch.randn(handle.d_model, generator=torch.Generator())
    row = handle.model.lm_head.weight[letter].float()
    unit = (row / row.norm() + noise / noise.norm()) / (row / row.norm() + noise / noise.norm()).norm()
    one = torch.ones(4, 3, 1, dtype=torch.float64)
    return handle, letter, Directions(unit.expand(4, 3, 1, -1).clone(), 2 * one, one)


@pytest.fixture(autouse=True)
def coherent(monkeypatch):
    """ "QQQQ" is what is to be said."""
    monkeypatch.setattr(measurement, "is_degenerate", lambda text, finished: False)


def added(handle, letter, directions):
    taught = Taught(handle.prompt_ids(PROMPTS), [[letter] * 3 + [5, 6, 7]] * 4, PROMPTS)
    return fit_style(handle, directions, taught, PROMPTS, SaysQ(), QUICK)


@pytest.mark.slow
def test_a_style_is_added_the_same_each_time():
    handle, letter, directions = planted()
    choice = added(handle, letter, directions)
    assert choice.winner.refusals.count >= 3 and choice.edit.shifts and not choice.edit.writers
    assert len(choice.candidates) == 4 and not choice.frontier
    again = added(handle, letter, directions)
    for one, other in zip(choice.edit.shifts, again.edit.shifts, strict=True):
        assert one.layer == other.layer and (one.vector == other.vector).all()


def test_shifts_are_orthogonal_to_what_is_kept():
    handle, _, directions = planted()
    kept = torch.eye(handle.d_model)[:2]
    shifts = VariableShift(handle, range(1, 3), torch.ones(2), kept)
    shifts.put_values(directions.unit[1:3, 0], torch.ones(2, 1))
    for shift in shifts.edit().shifts:
        assert abs(shift.vector[:2]).max() < 1e-6 and shift.size < 1


def test_answers_that_loop_do_not_count(monkeypatch):
    handle, letter, directions = planted()
    monkeypatch.setattr(measurement, "is_degenerate", lambda text, finished: True)
    with pytest.raises(AbliterateError, match="coherent answer"):
        added(handle, letter, directions)


def test_repetitions_end_runs_that_were_there_before():
    assert repeats([1, 2, 3, 4, 5, 1, 2, 3, 4, 5]) == [8, 9]
    assert repeats([1, 2, 3]) == [] and repeats([1] * 6) == [4, 5]


def test_blocks_leave_out_both_ends():
    _, _, directions = planted()
    assert blocks_of(directions, None) == range(1, 3)
    with pytest.raises(AbliterateError, match="--layers"):
        blocks_of(directions, range(3, 4))
