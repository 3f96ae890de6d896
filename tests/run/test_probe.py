"""What the probe measures, and that it leaves the model as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from abliterate.measure.decode import decode
from abliterate.models.handle import Handle
from abliterate.run import probe
from abliterate.run.plan import plan_run
from abliterate.run.probe import Line, fitted
from models import handle_of, tiny_llama
from plans import COSTS, settings


def test_a_line_is_fitted_and_never_slopes_down_or_starts_below_zero():
    assert fitted([1, 2, 3], [3.0, 5.0, 7.0]) == Line(1.0, 2.0)
    assert fitted([1, 2, 3], [5.0, 4.0, 3.0]) == Line(4.0, 0.0)
    assert fitted([1, 2], [0.5, 2.0]).fixed == 0.0
    assert fitted([8, 8], [2.0, 4.0]) == Line(0.0, 3.0 / 8)
    assert fitted([], []) == Line(0.0, 0.0)


def test_decoding_is_played_through_as_it_runs(monkeypatch):
    """Steps and rows of the played-through batch are those of the real one, waiting prompts among them."""
    handle = handle_of(tiny_llama())
    ids = handle.prompt_ids([f"Say {word}" for word in range(10)])
    lengths = [4 + 4 * (i % 3) for i in range(len(ids))]
    decode(handle, ids[:2], max_new_tokens=2)
    passes = []
    plain = Handle.last_logits

    def noted(self, keep=1, **inputs):
        passes.append(tuple(inputs["input_ids"].shape))
        return plain(self, keep, **inputs)

    monkeypatch.setattr(Handle, "last_logits", noted)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    answers = decode(
        handle, ids, max_new_tokens=20, batch_size=4,
        settled=lambda i, text: len(handle.tokenizer(text)["input_ids"]) >= 0 and counted(i) >= lengths[i] // 4,
    )  # fmt: skip
    steps = [rows for rows, width in passes if width == 1]
    played = [len(answers[i].ids) for i in order]
    counting = replace(COSTS, step=Line(0.0, 1.0))
    assert counting.decoding(played, len(ids), 20, 4) == sum(steps)
    assert replace(COSTS, step=Line(1.0, 0.0)).decoding(played, len(ids), 20, 4) == len(steps)


LOOKS: dict[int, int] = {}


def counted(index):
    """How often a verdict on this prompt has been asked for."""
    LOOKS[index] = LOOKS.get(index, 0) + 1
    return LOOKS[index]


def test_prompts_and_tokens_cost_what_they_are():
    prefill = replace(COSTS, prefill=Line(1.0, 0.1))
    # eight prompts of ten tokens, four at a time, one answer token each: two passes
    assert prefill.decoding([1], 8, 100, 4) == pytest.approx(2 * 1.0 + 8 * 10 * 0.1)
    assert replace(COSTS, per_token=1.0).decoding([3, math.inf], 4, 10, 4) == 2 * 3 + 2 * 10


def test_probing_a_fit_leaves_no_gradients_behind(tiny_folder):
    chosen = settings(
        {"method": "fit"}, prompts={"target": "bundled", "baseline": "bundled"}, measure={"max_new_tokens": 8}
    )
    found = plan_run(str(tiny_folder), chosen)
    assert found.costs.gradient > 0
    handle = handle_of(tiny_llama())
    before = [p.requires_grad for p in handle.model.parameters()]
    probe.gradient(handle, handle.prompt_ids(["Hi", "Why?"]))
    assert [p.requires_grad for p in handle.model.parameters()] == before
    assert all(p.grad is None for p in handle.model.parameters())
    assert not handle.blocks[0]._forward_hooks


def test_the_handle_is_left_as_it_was(tiny_folder):
    handle = handle_of(tiny_llama())
    with probe.watched(handle) as passes:
        decode(handle, handle.prompt_ids(["Hi", "Why?"]), max_new_tokens=3)
    assert [p.width for p in passes][-2:] == [1, 1]
    assert "last_logits" not in handle.__dict__
