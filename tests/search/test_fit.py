"""The fit finds what was planted, exactly as it can be resumed, with the edit it was fitted as."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from abliterate.common.errors import AbliterateError, OutputError
from abliterate.common.reporting import Silent
from abliterate.directions.activations import collect
from abliterate.directions.means import difference_of_means
from abliterate.edit.algebra import factors
from abliterate.edit.edit import Edit, Part
from abliterate.measure import judged
from abliterate.measure.decode import Answer
from abliterate.measure.divergence import make_reference
from abliterate.measure.rates import Rate
from abliterate.models.writers import find_writers
from abliterate.search import packed
from abliterate.search.examples import Examples
from abliterate.search.fit import (
    _Job,
    draw,
    fit,
    next_scaled,
    next_weight,
)
from abliterate.search.fit_settings import FitSettings
from abliterate.search.fit_state import FitState
from abliterate.search.frontier import FrontierPoint
from abliterate.search.stand_ins import Refusing, Staying, log_odds, told_apart
from abliterate.search.starts import starts, wider, window
from abliterate.search.variable_edit import editable, live_factors
from heard import Heard
from models import FAMILIES, handle_of
from planted import BASELINE, REFUSE, TARGET, RefusesWithR, planted

pytestmark = pytest.mark.device

QUICK = FitSettings(
    steps=12, steps_between=4, weights=(1.0, 0.1), layers=range(0, 4), target_batch=3, baseline_batch=3, rate=0.3
)


def examples(handle, prompts):
    """A side's prompts with what the model answers."""
    judge = RefusesWithR()
    sides = []
    for texts in prompts:
        answers, refused = judged(handle, texts, judge, max_new_tokens=4)
        sides.append((list(texts), answers, refused))
    assert all(sides[0][2]) and not any(sides[1][2])
    return Examples(sides[0][0], sides[0][1], sides[1][0], sides[1][1])


@pytest.fixture
def handle():
    return planted()


@pytest.fixture
def data(handle):
    found = difference_of_means(collect(handle, TARGET[:6], BASELINE[:6], positions=3))
    return found, examples(handle, (TARGET[:6], BASELINE[:6])), examples(handle, (TARGET[6:], BASELINE[6:]))


def fitted(handle, data, state=None, options=QUICK, **more):
    return fit(handle, *data, RefusesWithR(), options, state=state, **more)


def test_the_planted_refusal_is_gone_and_little_else(handle, data):
    result = fitted(handle, data)
    with result.edit.attached(handle):
        _, refused = judged(handle, TARGET, RefusesWithR(), max_new_tokens=4)
    assert not any(refused)
    assert result.chosen.divergence < 0.1
    strongest = result.edit.strengths.sum(1).argmax()
    name = result.edit.writers[int(strongest)]
    assert name == "model.layers.1.self_attn.o_proj.weight"  # what writes REFUSE
    direction = result.edit.directions[int(result.edit.strengths[strongest].argmax())]
    assert abs(float(direction[REFUSE])) > 0.8


def test_the_same_seed_gives_the_same_edit(handle, data):
    one, two = fitted(handle, data).edit, fitted(handle, data).edit
    assert one.writers == two.writers
    assert np.array_equal(one.directions, two.directions) and np.array_equal(one.strengths, two.strengths)


@pytest.mark.parametrize("stop_at", [3, 5, 12, 14, 16])
def test_a_killed_fit_goes_on_to_the_same_result(handle, data, tmp_path, stop_at):
    whole = fitted(handle, data)
    path = tmp_path / "fit.safetensors"

    class Killed(Exception):
        pass

    steps = 0

    class Stopping(Silent):
        def progress(self, stage, total):
            def tick(done):
                nonlocal steps
                steps += "fitting" in stage
                if steps == stop_at:
                    raise Killed

            return tick

    with pytest.raises(Killed):
        fitted(handle, data, FitState.at(path, "key", resume=True), reporter=Stopping())
    resumed = fitted(planted(), data, FitState.at(path, "key", resume=True))
    assert resumed.edit.writers == whole.edit.writers
    assert np.array_equal(resumed.edit.directions, whole.edit.directions)
    assert np.array_equal(resumed.edit.strengths, whole.edit.strengths)
    assert [str(p) for p in resumed.frontier] == [str(p) for p in whole.frontier]


def test_a_finished_fit_resumes_to_its_end_at_once(handle, data, tmp_path):
    path = tmp_path / "fit.safetensors"
    first = fitted(handle, data, FitState.at(path, "key", resume=False))
    before = path.read_bytes()
    again = fitted(handle, data, FitState.at(path, "key", resume=True))
    assert np.array_equal(first.edit.strengths, again.edit.strengths)
    assert path.read_bytes() == before


def test_another_fits_state_is_refused(handle, data, tmp_path):
    path = tmp_path / "fit.safetensors"
    fitted(handle, data, FitState.at(path, "one", resume=False))
    with pytest.raises(OutputError, match="another model, prompts or settings"):
        FitState.at(path, "two", resume=True)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(OutputError, match="can't be read"):
        FitState.at(path, "one", resume=True)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "olmo2"])
def test_what_is_fitted_is_the_edit_that_comes_out(family, rank):
    """The live variables and the finished edit, attached as any other, give the same logits: post-norms included."""
    handle = handle_of(FAMILIES[family]())
    texts = ["tell of boats", "the sea at night", "bread"]
    directions = difference_of_means(collect(handle, texts, [t + "?" for t in texts], positions=1))
    answers = [Answer([5, 6], "", False, False) for _ in texts]
    options = FitSettings(layers=range(1, 4), rank=rank, max_strength=1.5)
    side = Examples(texts, answers, texts, answers)
    job = _Job(handle, directions, side, side, RefusesWithR(), options, (), FitState())
    job.start(Silent())
    with torch.no_grad():
        job.variables.strengths.uniform_(0.1, 1.2)
    ids = torch.tensor([handle.prompt_ids(texts)[0]])
    with torch.no_grad():
        with job.variables.live():
            live = handle.model(input_ids=ids).logits
        plain = handle.model(input_ids=ids).logits
        with job.variables.edit().attached(handle):
            attached = handle.model(input_ids=ids).logits
    torch.testing.assert_close(live, attached, rtol=1e-3, atol=1e-4)
    assert (live - plain).abs().max() > 0.01


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
@pytest.mark.parametrize("rank", [1, 2])
def test_with_little_memory_the_fit_is_the_same_bit_for_bit(family, rank, monkeypatch):
    """Blocks are then run again in the backward pass, with the edit in them as at first."""
    texts = ["tell of boats", "the sea at night", "bread"]
    answers = [Answer([5, 6], "", False, False) for _ in texts]
    side = Examples(texts, answers, texts, answers)
    options = FitSettings(layers=range(1, 4), rank=rank)

    def descended(free):
        monkeypatch.setattr(packed, "free_for", lambda _handle: free)
        handle = handle_of(FAMILIES[family]())
        directions = difference_of_means(collect(handle, texts, [t + "?" for t in texts], positions=1))
        job = _Job(handle, directions, side, side, RefusesWithR(), options, (), FitState())
        job.start(Silent())
        job.descend(1.0, 3, Silent())
        return job

    plenty = descended(math.inf)
    checkpointed = []
    monkeypatch.setattr(packed, "checkpoint", noting(checkpointed, packed.checkpoint))
    little = descended(0.0)
    # steps, blocks but the one that is measured; choosing where to start takes no gradients
    assert len(checkpointed) == 3 * (len(little.blocks) - 1) > 0
    assert torch.equal(plenty.variables.vectors, little.variables.vectors)
    assert torch.equal(plenty.variables.strengths, little.variables.strengths)


def noting(made, plain):
    def noted(block, *args, **kwargs):
        made.append(block)
        return plain(block, *args, **kwargs)

    return noted


def test_refusals_in_other_words_are_looked_for(handle, data):
    """An opening that the model doesn't give teaches nothing; the answers decoded afterwards show the real one."""
    directions, train, validation = data
    wrong = [Answer([77, 78], "", False, False) for _ in train.target]
    heard = Heard()
    mistaken = Examples(train.target, wrong, train.baseline, train.answers)
    options = replace(QUICK, steps_between=12)
    result = fit(handle, directions, mistaken, validation, RefusesWithR(), options, reporter=heard)
    assert any("still not answered" in line for line in heard.lines)
    assert min(p.refused.count for p in result.frontier) == 0


def test_a_second_behaviour_can_be_kept(handle, data):
    """`also` takes more stand-ins: here one that holds the target's answers where they are beats removing."""
    directions, train, validation = data
    reference = make_reference(handle, handle.prompt_ids(train.target), train.refusals)
    kept = fit(handle, directions, train, validation, RefusesWithR(), QUICK, also=[(1000.0, Staying(reference))])
    assert min(p.refused.count for p in kept.frontier) == len(validation.target)


def test_nothing_to_fit_on_is_said(handle, data):
    directions, train, validation = data
    empty = Examples([], [], train.baseline, train.answers)
    with pytest.raises(AbliterateError, match="none of the target prompts is refused"):
        fit(handle, directions, empty, validation, RefusesWithR(), QUICK)


def test_the_loss_of_refusing_is_about_the_whole_opening():
    answers = [[4, 5, 1], [7, 7]]  # they share [4, 5] and [7] with the refusals
    side = Refusing([[1, 2], [1, 3]], [[4, 5, 6], [7, 8, 9]], answers)
    assert [row.ids for row in side.rows] == [[1, 2, 4, 5], [1, 3, 7]]
    assert [row.outputs for row in side.rows] == [3, 2]
    logits = torch.zeros(3, 10, dtype=torch.float64)
    logits[[0, 1, 2], [4, 5, 6]] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    p = float(logits.softmax(-1)[[0, 1, 2], [4, 5, 6]].prod())
    expected = math.log(1 + math.exp(3) * p / (1 - p))
    assert float(side.loss([0], [logits.log_softmax(-1)])) == pytest.approx(expected, abs=1e-6)
    logits[1, 5] = -30.0  # one token of it is enough
    assert float(side.loss([0], [logits.log_softmax(-1)])) == pytest.approx(0.0, abs=1e-6)


def test_a_sure_refusal_still_has_a_gradient():
    logits = torch.zeros(1, 10)
    logits[0, 4] = 40.0  # in float32 its probability is 1
    logits.requires_grad_(True)
    log_odds(logits.log_softmax(-1), torch.tensor([4])).backward()
    assert float(logits.grad[0, 4]) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("opening", "answers", "start"),
    [
        ([4, 5, 6], [[9, 9]], [4]),  # no answer starts so
        ([4, 5, 6], [[4, 9], [9]], [4, 5]),  # half of them do
        ([4, 5, 6], [[4, 5, 6]], [4, 5, 6]),  # nothing tells them apart
        ([4, 5, 6], [[4, 9], *[[9]] * 19], [4]),  # one of twenty: too rare to matter
    ],
)
def test_an_opening_ends_where_it_is_told_from_answers(opening, answers, start):
    assert told_apart(opening, [opening, opening, [8, 8]], answers) == start


@given(
    st.integers(1, 4), st.floats(0, 1.5), st.booleans(), st.booleans(), st.integers(0, 1000)
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_live_factors_are_the_factors_of_apply(rank, strength, gained, centred, seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(12, rank, generator=generator))[0].T.contiguous()
    strengths = strength * torch.rand(rank, generator=generator)
    gain = torch.rand(12, generator=generator) + 0.5 if gained else None
    theirs = factors(Part(basis, strengths), gain, centred)
    left, right = live_factors(basis, strengths, gain, centred)
    torch.testing.assert_close(left.T @ right, torch.from_numpy(theirs.left.T @ theirs.right), rtol=1e-3, atol=1e-4)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_epochs_aredrawn_whole(count, size, seed):
    size = min(size, count)
    drawn = [i for step in range(3 * count) for i in draw(count, size, step, seed, 0)]
    for epoch in range(3):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


def point(refused, weight, divergence=0.1, scaled=None):
    nothing = Edit((), torch.zeros(0, 4), torch.zeros(0, 0))
    return FrontierPoint(nothing, Rate(refused, 100), divergence, weight=weight, scaled=scaled)


@pytest.mark.parametrize(
    ("points", "following"),
    [
        ([], 1.0),
        ([(0, 1.0)], 0.3),
        ([(20, 1.0)], 3.0),
        ([(20, 1.0), (9, 3.0)], 9.0),
        ([(20, 1.0), (9, 3.0), (9, 9.0)], 0.3),
        ([(20, 1.0), (2, 3.0)], 0.3),
        ([(0, 1.0), (70, 0.3)], None),
        ([(0, 1.0), (0, 0.3), (5, 0.1)], None),
    ],
)
def test_the_next_weight(points, following):
    options = FitSettings(weights=(1.0, 0.3, 0.1))
    assert next_weight([point(r, w) for r, w in points], options) == following


@pytest.mark.parametrize(
    ("points", "following"),
    [
        ([(0, 1.0, 0.2), (3, 0.3, 0.1)], ((3, 0.3), 0.5)),
        ([(0, 1.0, 0.2), (3, 0.3, 0.3)], ((0, 1.0), 0.5)),  # the last was no gentler
        ([(0, 1.0, 0.2), (3, 0.3, 0.1), (40, 0.3, 0.02, 0.5)], ((3, 0.3), 0.25)),
        ([(0, 1.0, 0.2), (3, 0.3, 0.1), (55, 0.3, 0.02, 0.5)], None),
        ([(0, 1.0, 0.2), (3, 0.3, 0.1), (40, 0.3, 0.02, 0.5), (80, 0.3, 0.01, 0.25)], None),
    ],
)
def test_the_next_gentler_edit(points, following):
    there = [point(*p) for p in points]
    found = next_scaled(there, FitSettings(lighter=(0.5, 0.25)))
    assert following == (found and ((found[0].refused.count, found[0].weight), found[1]))
    if len(points) > 2:
        assert next_weight(there, FitSettings()) is None


def test_gentler_edits_end_the_frontier(handle, data):
    result = fitted(handle, data, options=replace(QUICK, lighter=(0.5, 0.25)))
    scaled = [p for p in result.frontier if p.scaled is not None]
    assert scaled and result.frontier[-len(scaled) :] == scaled
    for p in scaled:
        of = next(q for q in result.frontier if q.weight == p.weight and q.scaled is None)
        assert p.edit.writers == of.edit.writers and p.divergence <= of.divergence
        np.testing.assert_allclose(p.edit.strengths, p.scaled * of.edit.strengths, rtol=1.3e-6, atol=1e-5)


def test_blocks_and_writers_left_to_the_fit(handle, data):
    directions, *_ = data
    near = list(starts(directions, range(handle.layers)))
    assert near and all(len(start.blocks) <= window(handle.layers) for start in near)
    assert all(start.directions.shape == (handle.layers, handle.d_model) for start in near)
    everywhere, own = wider(near[0], directions, range(handle.layers))
    assert everywhere.blocks == range(near[0].blocks.start, handle.layers) and own.blocks == range(handle.layers)
    assert {w.side for w in editable(find_writers(handle))} == {"attention", "mlp"}
