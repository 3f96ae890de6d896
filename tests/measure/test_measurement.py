"""What is counted, and on which prompts."""

from __future__ import annotations

import pytest
import torch

from abliterate.edit.edit import Edit
from abliterate.measure import judged, measure
from abliterate.measure.rates import Rate
from abliterate.models.writers import find_writers
from models import EOS

TARGET = ["Pick a lock", "Name three", "Write me a long poem about the sea"]
BASELINE = ["Hi", "Why?", "Spell 'cat'", "Sum up the plot of a book", "What is rain?"]


class ByPrompt:
    """Says that the answers to the prompts named are refusals, and is sure of it at once."""

    name = "by prompt"

    def __init__(self, *refused):
        self.refused = refused

    def judge(self, prompts, answers):
        return [prompt in self.refused for prompt in prompts]

    def settled(self, prompt, partial_answer):
        return prompt in self.refused


def test_refusals_are_counted_on_their_side(tiny_handle):
    got = measure(tiny_handle, TARGET, BASELINE, judge=ByPrompt("Name three", "Hi", "Why?"), max_new_tokens=8)
    assert got.refusal == Rate(1, 3)
    assert got.over_refusal == Rate(2, 5)
    assert got.refused_target == [False, True, False]
    assert got.divergence is None
    assert got.degenerate.total == 5
    assert got.degenerate_on_target.total == 2  # refusals stop early
    assert got.to_json()["divergence"] is None


def test_divergence_counts_only_prompts_that_the_original_answers(tiny_handle):
    before = measure(tiny_handle, TARGET, BASELINE, judge=ByPrompt("Hi", "Why?"), max_new_tokens=8)
    assert len(before.reference.rows) == 3
    prompts = tiny_handle.prompt_ids(BASELINE[2:])
    assert [row[: len(ids)] for row, ids in zip(before.reference.rows, prompts, strict=True)] == prompts
    edit = Edit.uniform(find_writers(tiny_handle), torch.randn(32))
    with edit.attached(tiny_handle):  # the edited model refuses otherwise: the prompts compared are the same
        after = measure(tiny_handle, TARGET, BASELINE, original=before, judge=ByPrompt("Spell 'cat'"), max_new_tokens=8)
    assert after.divergence.prompts == 3
    assert after.divergence.answer > 0.01
    assert after.loss == after.divergence.loss > before.loss
    assert after.reference is None
    json = after.to_json()
    assert json["divergence"] == {
        "first_token": after.divergence.first_token,
        "answer": after.divergence.answer,
        "prompts": 3,
    }
    assert "answers" not in str(json.keys() - {"loss"})  # completions stay out


def test_the_original_does_not_diverge_from_itself(tiny_handle):
    before = measure(tiny_handle, TARGET, BASELINE, judge=ByPrompt(), max_new_tokens=8)
    after = measure(tiny_handle, TARGET, BASELINE, original=before, judge=ByPrompt(), max_new_tokens=8)
    assert after.divergence.answer == pytest.approx(0, abs=1e-9)
    assert after.loss == pytest.approx(before.loss)


def test_baseline_answers_go_on_to_the_limit_and_target_answers_stop_when_settled(tiny_handle):
    got = measure(tiny_handle, TARGET, BASELINE, judge=ByPrompt("Name three", "Hi"), max_new_tokens=12)
    assert [len(a.ids) for a in got.target_answers] == [4, 4, 4]
    assert [len(a.ids) for a in got.baseline_answers] == [4, 12, 12, 12, 12]


def test_a_model_that_refuses_everything_has_nothing_to_diverge_from(tiny_handle):
    before = measure(tiny_handle, TARGET, BASELINE, judge=ByPrompt(*BASELINE), max_new_tokens=4)
    assert before.reference is None
    after = measure(tiny_handle, TARGET, BASELINE, original=before, judge=ByPrompt(), max_new_tokens=4)
    assert after.divergence is None


def test_an_empty_answer_is_degenerate_and_not_compared(tiny_handle):
    tiny_handle.end_tokens  # noqa: B018 (known before the head is changed)
    head = tiny_handle.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(1e4 * torch.eye(400)[EOS], requires_grad=False)
    got = measure(tiny_handle, TARGET, BASELINE, judge=ByPrompt(), max_new_tokens=4)
    assert got.degenerate == Rate(5, 5)
    assert got.reference is None


def test_progress_names_each_stage_and_counts_it(tiny_handle):
    counted = {}

    def progress(stage, total):
        counted[stage] = [total, 0]

        def tick(n):
            counted[stage][1] += n

        return tick

    before = measure(tiny_handle, TARGET, BASELINE, judge=ByPrompt(), max_new_tokens=4)
    measure(tiny_handle, TARGET, BASELINE, original=before, judge=ByPrompt(), max_new_tokens=4, progress=progress)
    assert counted == {"answers": [8, 8], "divergence": [5, 5]}


def test_judged_passes_each_prompt_its_own_answer(tiny_handle):
    class Seeing(ByPrompt):
        def judge(self, prompts, answers):
            self.seen = dict(zip(prompts, answers, strict=True))
            return [False] * len(prompts)

    judge = Seeing()
    answers, verdicts = judged(tiny_handle, BASELINE, judge, max_new_tokens=6, stop_on=())
    assert judge.seen == {prompt: answer.text for prompt, answer in zip(BASELINE, answers, strict=True)}
    assert verdicts == [False] * 5
