"""What is free, what a pass takes, and batches that memory doesn't hold."""

from __future__ import annotations

import pytest
import torch

from abliterate.common.errors import ModelError
from abliterate.common.reporting import told_by_default
from abliterate.directions.activations import collect
from abliterate.directions.means import difference_of_means
from abliterate.measure.decode import Answer, decode
from abliterate.measure.divergence import make_reference
from abliterate.models import handle as handles
from abliterate.models import loading, memory
from abliterate.models.finder import find_layout
from abliterate.models.memory import Live, footprint, free_bytes, halved, in_parts, out_of_memory, saved
from abliterate.search.examples import Examples
from abliterate.search.first_token import first_token
from abliterate.search.fit import FitSettings, FitState, _Job
from heard import Heard
from models import FAMILIES, handle_of, tiny_llama

SHORT = {
    "a card's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "Linux": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
    "Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    "mapping a file": OSError(12, "Cannot allocate memory"),
    "Python": MemoryError(),
}
TEXTS = [f"tell of {thing}" for thing in ("boats", "the sea at night", "bread", "an old lamp", "five ways home", "a")]


@pytest.fixture
def handle():
    return handle_of(tiny_llama())


@pytest.mark.parametrize("error", SHORT.values(), ids=SHORT)
def test_short_memory_is_told_from_other_errors(error):
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes don't fit"))
    assert not out_of_memory(OSError(2, "No such file"))


@pytest.mark.parametrize("error", [SHORT["a card's"], SHORT["Linux"], SHORT["Python"]])
def test_a_batch_that_memory_does_not_hold_goes_in_halves_and_that_is_said_once(handle, error):
    tried = []

    def run(part):
        tried.append(len(part))
        if len(part) > 3:
            raise error
        return [10 * row for row in part]

    heard = Heard()
    with told_by_default(heard):
        for _ in range(2):
            found = list(in_parts(handle, range(12), run, tokens=4))
            assert [row for part, _ in found for row in part] == list(range(12))
            assert [each for _, results in found for each in results] == [10 * row for row in range(12)]
    assert tried == [12, 6, 3, 3, 3, 3, 3, 3, 3, 3]  # what memory didn't hold isn't tried again
    assert len(heard.lines) == 1 and "12 rows" in heard.lines[0]
    assert handle.notes == heard.lines


def test_where_one_row_is_too_much_the_error_says_what_is_taken_and_free(handle):
    def run(part):
        raise SHORT["Linux"]

    with pytest.raises(ModelError, match=r"one row beside model tiny, .* GiB on cpu; try --quantise"):
        list(in_parts(handle, [1, 2], run, tokens=4))
    with pytest.raises(RuntimeError, match="shapes"):
        halved(handle, 4, RuntimeError("shapes don't fit"))


def test_batches_are_cut_by_what_is_free_before_anything_fails(handle, monkeypatch):
    each = footprint(handle).row(tokens=10, outputs=1)
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 3.5 * each / memory.USABLE)
    assert [len(part) for part, _ in in_parts(handle, range(8), len, tokens=10, outputs=1)] == [3, 3, 2]
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 0.0)
    assert [len(part) for part, _ in in_parts(handle, range(2), len, tokens=10, outputs=1)] == [1, 1]


def limited(monkeypatch, tokens, gradients=False):
    """From now on no pass may be over more tokens, as if memory held no more; returns the tokens of those that fail."""
    plain, failed = handles.run_cached, []

    def run(module, arguments):
        if arguments["input_ids"].numel() > tokens and torch.is_grad_enabled() == gradients:
            failed.append(arguments["input_ids"].numel())
            raise RuntimeError(str(SHORT["Linux"]))
        return plain(module, arguments)

    monkeypatch.setattr(handles, "run_cached", run)
    return failed


def _collected(handle):
    found = collect(handle, TEXTS, TEXTS[::-1], positions=2, keep_vectors=True)
    return torch.cat([found.target.mean.flatten(), found.target.vectors.flatten().double()])


def _reference(handle):
    answers = [Answer([5, 6, 7], "", False, False) for _ in TEXTS]
    return torch.stack(make_reference(handle, handle.prompt_ids(TEXTS), answers).logprobs)


def _decoded(handle):
    return torch.tensor(
        [a.ids + [0] * (9 - len(a.ids)) for a in decode(handle, handle.prompt_ids(TEXTS), max_new_tokens=9)]
    )


STAGES = {
    "collect": _collected,
    "first token": lambda handle: first_token(handle, handle.prompt_ids(TEXTS)),
    "divergence": _reference,
    "decoding": _decoded,
}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_stage_gives_the_same_where_memory_is_short(stage, family, monkeypatch):
    plenty = stage(handle_of(FAMILIES[family]()))
    failed = limited(monkeypatch, 40)
    short = stage(handle_of(FAMILIES[family]()))
    assert failed
    torch.testing.assert_close(short, plenty, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_answers_that_grow_too_large_are_begun_anew_in_smaller_batches(handle, monkeypatch):
    ids = handle.prompt_ids(TEXTS)
    plenty = [a.ids for a in decode(handle, ids, max_new_tokens=9)]
    plain, failed = handles.run_cached, []

    def run(module, arguments):
        rows, width = arguments["input_ids"].shape
        if width == 1 and rows > 2:
            failed.append(rows)
            raise SHORT["a card's"]
        return plain(module, arguments)

    monkeypatch.setattr(handles, "run_cached", run)
    assert [a.ids for a in decode(handle, ids, max_new_tokens=9)] == plenty
    assert failed == [6, 3]


def test_a_step_of_the_fit_is_checkpointed_then_cut_where_memory_is_short(monkeypatch):
    answers = [Answer([5, 6], "", False, False) for _ in TEXTS]
    side = Examples(TEXTS, answers, TEXTS, answers)

    def descended():
        handle = handle_of(tiny_llama())
        directions = difference_of_means(collect(handle, TEXTS, [t + "?" for t in TEXTS], positions=1))
        job = _Job(handle, directions, side, side, Refuses(), FitSettings(layers=range(1, 4)), (), FitState())
        job.start(Heard())
        job.descend(1.0, 3, Heard())
        return job

    plenty = descended()
    assert plenty.goal.passes == 1 and plenty.goal.packed[0].checkpointing is None
    with monkeypatch.context() as patched, pytest.raises(ModelError, match="one row"):
        failed = limited(patched, 0, gradients=True)
        descended()
    failed = limited(monkeypatch, failed[0] - 1, gradients=True)
    short = descended()
    assert len(failed) == 2 and short.goal.passes > 1 and short.goal.packed[0].checkpointing
    torch.testing.assert_close(short.variables.vectors, plenty.variables.vectors, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(short.variables.strengths, plenty.variables.strengths, rtol=1e-3, atol=1e-4)


class Refuses:
    name = "refuses"

    def judge(self, prompts, answers):
        return [True for _ in answers]

    def settled(self, prompt, partial_answer):
        return None


def test_loading_and_looking_for_writers_say_that_memory_is_short(handle, monkeypatch):
    limited(monkeypatch, 0)
    with pytest.raises(ModelError, match="memory doesn't hold a pass over a few tokens beside model tiny"):
        find_layout(handle)

    def short(*_args, **_kwargs):
        raise SHORT["Linux"]

    monkeypatch.setattr(handle.blocks[0], "forward", short)
    with pytest.raises(ModelError, match="memory doesn't hold a pass over two tokens"):
        loading._failure("tiny", handle.model)


def test_a_control_groups_limit_counts(tmp_path, monkeypatch):
    for folder, names in (("memory/a/b", ("limit_in_bytes", "usage_in_bytes")), ("c", ("max", "current"))):
        (tmp_path / folder).mkdir(parents=True)
        for name, size in zip(names, (5000, 3000), strict=True):
            (tmp_path / folder / f"memory.{name}").write_text(f"{size}\n")
        (tmp_path / folder / "memory.stat").write_text("cache 7\ntotal_inactive_file 400\n")
    proc = tmp_path / "cgroup"
    for lines in ("4:memory:/a/b\n0::/\n", "0::/c\n"):
        proc.write_text(lines)
        assert min(memory._allowed(proc, tmp_path)) == 2400
    proc.write_text("3:cpu:/a/b\n")
    assert min(memory._allowed(proc, tmp_path)) == float("inf")
    assert 0 < free_bytes("cpu") < 2**60
    monkeypatch.setattr(memory, "_allowed", lambda: [1234.0])
    assert free_bytes("cpu") == 1234


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "phi3"])
def test_a_footprint_without_weights_is_that_of_a_run(family):
    handle = handle_of(FAMILIES[family]())
    found, ids = footprint(handle), torch.arange(2 * 64).reshape(2, 64) % 300
    with torch.enable_grad(), saved(handle.model) as kept:
        hook = handle.embedding.register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_())
        handle.hidden_states(input_ids=ids, use_cache=False)
        hook.remove()
    assert found.kept * 128 * handle.layers == pytest.approx(kept.bytes, rel=0.3)
    peaks = []
    for rows in (2, 4):
        with torch.no_grad(), Live() as live:
            handle.hidden_states_and_cache(input_ids=ids.repeat(2, 1)[:rows], use_cache=True)
        peaks.append(live.peak)
    assert found.passing + found.cached == pytest.approx((peaks[1] - peaks[0]) / 128, rel=0.3)
    _, cache = handle.hidden_states_and_cache(input_ids=ids, use_cache=True)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert found.cached * 128 == pytest.approx(held, rel=0.01)


def test_a_model_without_a_twin_is_guessed(handle, monkeypatch):
    monkeypatch.setattr(memory, "twin", lambda _handle: 1 / 0)
    guessed = footprint(handle)
    assert guessed.passing > 0 and guessed.logits == 400 * 8
