"""The model as the harness sees it gives what the harness' own backend gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models import FAMILIES, handle_of, tiny, tiny_llama

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM

from abliterate.bench.harness import quiet
from abliterate.bench.scoring import ScoredModel
from abliterate.models.handle import Handle

CONTEXTS = (
    "The quick brown fox",
    "A list of things: one, two, three and",
    "To be",
    "Write a poem about the sea and its waves",
)
CHOICES = (" jumps over the dog", " four", " sleeps", " jumps")


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments, task_name="t")


def pairs() -> list[Any]:
    """Every context with every choice, one context with one choice alone, and one choice of a single letter."""
    found = [asked(context, choice) for context in CONTEXTS for choice in CHOICES]
    return [*found, asked("Alone in the dark", " and cold"), asked("", "No context at all"), asked("Yes or", " n")]


def both(handle: Handle, **options: Any) -> tuple[ScoredModel, HFLM]:
    length = handle.context_length or 512
    return ScoredModel(handle, **options), HFLM(
        pretrained=handle.model, tokenizer=handle.tokenizer, batch_size=4, max_length=length, backend="causal"
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3", "granite", "olmo2", "mamba"])
def test_log_probabilities_are_the_harness_own(family: str) -> None:
    model = (
        tiny("mamba", num_hidden_layers=4, hidden_size=32, state_size=8) if family == "mamba" else FAMILIES[family]()
    )
    with quiet():
        ours, theirs = both(handle_of(model))
        found, expected = ours.loglikelihood(pairs()), theirs.loglikelihood(pairs())
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("rows", [1, 3, None])
def test_the_batch_size_changes_nothing(rows: int | None) -> None:
    handle = handle_of(tiny_llama())
    with quiet():
        whole = ScoredModel(handle, batch_size=64).loglikelihood(pairs())
        found = ScoredModel(handle, batch_size=rows).loglikelihood(pairs())
    assert [value for value, _ in found] == pytest.approx([value for value, _ in whole], abs=1e-4)


def test_a_context_that_is_too_long_is_cut_as_the_harness_cuts() -> None:
    handle = handle_of(tiny_llama(context=32))
    long = " ".join(f"word{i}" for i in range(60))
    requests = [asked(long, " end"), asked(long, " a somewhat longer end")]
    with quiet():
        ours, theirs = both(handle)
        found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_a_shared_context_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, tokens = handle_of(tiny_llama()), []
    plain = Handle.hidden_states

    def counted(self: Handle, **inputs: Any) -> Any:
        tokens.append(int(inputs["input_ids"].numel()))
        return plain(self, **inputs)

    with quiet():
        model = ScoredModel(handle)
        model.loglikelihood([asked("warm", " up"), asked("warm", " the engine up")])  # what is tried out once
        monkeypatch.setattr(Handle, "hidden_states", counted)
        context = " ".join(["word"] * 40)
        model.loglikelihood([asked(context, choice) for choice in CHOICES])
    width = len(handle.tokenizer.encode(context))
    rest = [len(handle.tokenizer.encode(choice)) for choice in CHOICES]
    assert sum(tokens) <= width + len(CHOICES) * max(rest)


def test_answers_are_the_harness_own_greedy_ones() -> None:
    handle = handle_of(tiny_llama(context=256))
    requests = [asked(context, {"until": ["e"], "max_gen_toks": 12, "do_sample": False}) for context in CONTEXTS]
    requests += [asked(context, {"until": ["\n\n"], "max_gen_toks": 7}) for context in CONTEXTS]
    with quiet():
        ours, theirs = both(handle)
        found, expected = ours.generate_until(requests), theirs.generate_until(requests)
    assert found == expected
    assert any(found)


def test_rolling_log_probabilities_are_the_harness_own() -> None:
    handle = handle_of(tiny_llama(context=32))
    requests = [asked(" ".join(f"item{i}" for i in range(n))) for n in (3, 40)]
    with quiet():
        ours, theirs = both(handle)
        assert ours.loglikelihood_rolling(requests) == pytest.approx(theirs.loglikelihood_rolling(requests), abs=1e-3)


def test_what_does_not_fit_the_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = handle_of(tiny_llama())
    plain, tried = ScoredModel._score_shared, []

    def scarce(self: ScoredModel, batch: Any) -> Any:
        tried.append(len(batch))
        if len(batch) > 1:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")
        return plain(self, batch)

    with quiet():
        expected = ScoredModel(handle).loglikelihood(pairs())
        monkeypatch.setattr(ScoredModel, "_score_shared", scarce)
        model = ScoredModel(handle)
        found = model.loglikelihood(pairs())
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert tried[0] > 1 and tried.count(1) == len(tried) - 1 - (tried[0] > 3)  # halved, not tried whole again


def test_other_errors_are_not_taken_for_scarce_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ScoredModel, batch: Any) -> Any:
        raise RuntimeError("shapes don't fit")

    monkeypatch.setattr(ScoredModel, "_score_shared", broken)
    with quiet(), pytest.raises(RuntimeError, match="shapes"):
        ScoredModel(handle_of(tiny_llama())).loglikelihood(pairs())


def test_an_untied_head_stays_untied() -> None:
    from abliterate.apply.weights import untie

    handle = handle_of(tiny_llama(tied=True))
    untie(handle)
    handle.model.config.tie_word_embeddings = True  # as a config may still say
    with torch.no_grad():
        handle.model.get_output_embeddings().weight.add_(1.0)
    ScoredModel(handle)
    assert not handle.tied


def test_a_chat_is_written_by_the_handles_template_with_system_prompt_and_prefill() -> None:
    handle = handle_of(tiny_llama(), system_prompt="Be brief.", prefill="<think></think>")
    with quiet():
        model = ScoredModel(handle)
    turns = [{"role": "user", "content": "Hi"}]
    text = model.apply_chat_template(turns)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "<think></think>"
    )
    assert turns == [{"role": "user", "content": "Hi"}]
    handle.chat_template = "{{ messages[-1]['content'] }} ->"
    assert model.apply_chat_template(turns) == "Hi -><think></think>"
