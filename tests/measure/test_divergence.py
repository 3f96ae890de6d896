"""Divergence is the KL that one would work out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from abliterate.common.errors import NonFiniteError
from abliterate.edit.edit import Edit
from abliterate.measure import divergence as module
from abliterate.measure.decode import Answer, decode
from abliterate.measure.divergence import compare, make_reference
from abliterate.models.writers import find_writers
from models import handle_of, tiny_llama

PROMPTS = ["Hi", "Explain how a lock is picked, step by step", "Name three", "Why?", "Spell 'cat'"]


@pytest.fixture
def setting(tiny_handle):
    """(handle, prompt ids, answers, an edit)."""
    ids = tiny_handle.prompt_ids(PROMPTS)
    answers = decode(tiny_handle, ids, max_new_tokens=10)
    answers[1] = Answer(answers[1].ids[:4], "", True, False, 2)  # one that the model ended
    edit = Edit.uniform(find_writers(tiny_handle), torch.randn(32), 0.5)
    return tiny_handle, ids, answers, edit


def by_hand(handle, ids, answers, tokens):
    """Log-probabilities [token, vocab] at each answer token, one plain forward pass a prompt, float64."""
    out = []
    for prompt, answer in zip(ids, answers, strict=True):
        wanted = [*answer.ids, *([] if answer.end is None else [answer.end])][:tokens]
        row = torch.tensor([[*prompt, *wanted]])
        logits = handle.model(row).logits[0, len(prompt) - 1 : -1].double()
        out.append((logits.log_softmax(-1), wanted))
    return out


@pytest.mark.parametrize("tokens", [1, 4, 24])
def test_it_is_the_kl_over_the_whole_vocabulary(setting, tokens):
    handle, ids, answers, edit = setting
    reference = make_reference(handle, ids, answers, answer_tokens=tokens)
    originals = by_hand(handle, ids, answers, tokens)
    with edit.attached(handle):
        got = compare(handle, reference)
        edited = by_hand(handle, ids, answers, tokens)
    kls = [(p.exp() * (p - q)).sum(-1) for (p, _), (q, _) in zip(originals, edited, strict=True)]
    loss = [-q.gather(-1, torch.tensor(wanted)[:, None]).squeeze(-1) for q, wanted in edited]
    own = [-p.gather(-1, torch.tensor(wanted)[:, None]).squeeze(-1) for p, wanted in originals]
    assert got.first_token == pytest.approx(float(torch.stack([k[0] for k in kls]).mean()), rel=1e-4)
    assert got.answer == pytest.approx(float(torch.stack([k.mean() for k in kls]).mean()), rel=1e-4)
    assert got.loss == pytest.approx(float(torch.cat(loss).mean()), rel=1e-4)
    assert reference.loss == pytest.approx(float(torch.cat(own).mean()), rel=1e-4)
    assert got.prompts == len(PROMPTS)
    assert got.first_token > 0.01


def test_a_model_does_not_diverge_from_itself(setting):
    handle, ids, answers, _ = setting
    reference = make_reference(handle, ids, answers)
    got = compare(handle, reference)
    assert got.first_token == pytest.approx(0, abs=1e-9)
    assert got.answer == pytest.approx(0, abs=1e-9)
    assert got.loss == pytest.approx(reference.loss)


def test_the_end_token_is_the_one_the_answer_ended_with(setting):
    handle, ids, answers, _ = setting
    answers[1] = Answer(answers[1].ids, "", True, False, 7)
    assert make_reference(handle, ids, answers).answers[1] == [*answers[1].ids, 7]
    assert make_reference(handle, ids, answers, answer_tokens=4).answers[1] == answers[1].ids  # no room for it


def test_keeping_few_tokens_gives_a_lower_bound(setting):
    handle, ids, answers, edit = setting
    bounds = []
    for kept in (1, 8, 64, 399, 400):
        reference = make_reference(handle, ids, answers, kept=kept)
        assert reference.tokens[0].shape[1] == kept
        torch.testing.assert_close(reference.logprobs[0].exp().sum(-1), torch.ones(len(reference.answers[0])))
        with edit.attached(handle):
            bounds.append(compare(handle, reference).answer)
    assert bounds[0] > 0
    assert all(low <= high + 1e-6 for low, high in itertools.pairwise(bounds))
    assert bounds[-2] == pytest.approx(bounds[-1], rel=1e-4)


def test_batching_changes_nothing(setting, monkeypatch):
    handle, ids, answers, edit = setting
    reference = make_reference(handle, ids, answers)
    with edit.attached(handle):
        batched = compare(handle, reference)
        monkeypatch.setattr(module, "BATCH", 1)
        done = []
        assert compare(handle, reference, done.append) == pytest.approx(batched, rel=1e-4)
    assert sum(done) == len(PROMPTS)


def test_nothing_to_compare_is_no_divergence(tiny_handle):
    assert compare(tiny_handle, make_reference(tiny_handle, [], [])) == (0.0, 0.0, 0.0, 0)


def test_logits_that_are_not_finite_are_an_error(setting):
    handle, ids, answers, _ = setting
    reference = make_reference(handle, ids, answers)
    broken = handle_of(tiny_llama())
    broken.model.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="logits"):
        compare(broken, reference)
