"""What outputs make up, with which scalars, and why something doesn't add up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from abliterate.models.sums import as_rows, explain, pieces, why_not
from abliterate.models.trace import Call

TOKENS, WIDTH = 8, 32


def call(output, given=None, module=None):
    return Call(module or nn.Identity(), (given,), {}, given, output)


def drawn(*more, seed=0):
    return torch.randn(1, TOKENS, *more, WIDTH, generator=torch.Generator().manual_seed(seed))


def found(before, after, calls, **options):
    return [calls.index(c) for c in explain(before, after, calls, WIDTH, TOKENS, **options)]


@pytest.fixture
def calls():
    return [call(drawn(seed=seed)) for seed in range(1, 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [1.0, 0.7, 0.005])
def test_the_stream_before_may_be_scaled_with_what_is_added(calls, kept, dtype):
    before = drawn()
    after = (kept * (before + calls[1].output + 0.22 * calls[4].output)).to(dtype)
    calls = [call(c.output.to(dtype)) for c in calls]
    assert found(before.to(dtype), after, calls) == [1, 4]


def test_what_is_added_may_be_far_smaller_than_the_stream(calls):
    before = 30 * drawn()
    assert found(before, before + 0.263 * calls[2].output, calls) == [2]


def test_several_streams_mixed_by_scalars_of_each_token(calls):
    before = drawn().unsqueeze(2).expand(1, TOKENS, 4, WIDTH)  # equal rows, as in front of the first block
    mix, inject = torch.rand(1, TOKENS, 4, 4), torch.rand(1, TOKENS, 4, 1)
    after = mix @ before + inject * calls[3].output.unsqueeze(2)
    assert found(before, after, calls) == [3]
    assert found(before.flatten(2), after.flatten(2), calls) == [3]  # side by side in the last dimension
    assert found(before.movedim(2, 0), after.movedim(2, 0), calls) == [3]  # in front
    assert found(before, after * torch.rand(WIDTH), calls) == []


def test_the_stream_itself_explains_nothing(calls):
    before, after = drawn(), drawn(seed=50)
    assert found(before, after, [call(after.clone())]) == []
    assert found(before, 0.5 * before, calls) == []
    assert found(torch.zeros_like(after), 3 * calls[0].output, calls) == [0]


def test_a_block_of_several_sublayers_is_cut_where_each_reads(calls):
    outputs = [c.output for c in calls[:4]]
    streams = [drawn()]
    for output in outputs:
        streams.append(streams[-1] + output)
    inside = []
    for output, stream in zip(outputs, streams, strict=False):
        inside += [call(drawn(seed=9), stream), call(output)]
    cut = pieces(streams[0], streams[4] + outputs[0], inside, WIDTH, TOKENS)
    assert [p.reader and inside.index(p.reader) for p in cut] == [2, 4, 6, None]
    assert [torch.equal(p.after, stream) for p, stream in zip(cut, streams[1:4], strict=False)] == [True] * 3


def test_what_is_read_but_not_gone_on_with_is_no_cut(calls):
    pre, out, aside = drawn(), calls[0].output, calls[1].output
    inside = [call(aside), call(calls[2].output, pre + aside), call(out)]
    assert [p.reader for p in pieces(pre, pre + out, inside, WIDTH, TOKENS)] == [None]


def test_why_not(calls):
    before, norm = drawn(), nn.LayerNorm(WIDTH)
    norm.weight.data.add_(0.3)
    inner = before + calls[0].output
    behind = [*calls, call(norm(inner).detach(), inner, norm)]
    assert "a norm (LayerNorm) runs on the stream itself" in why_not(before, behind[-1].output, behind, WIDTH, TOKENS)
    scaled = torch.rand(WIDTH) * before + calls[1].output
    assert "every feature of it is scaled" in why_not(before, scaled, calls, WIDTH, TOKENS)
    assert "no sum" in why_not(before, drawn(seed=99), calls, WIDTH, TOKENS)
    assert "4 streams" in why_not(drawn(4), drawn(4, seed=98), calls, WIDTH, TOKENS)


def test_rows_are_those_of_each_token():
    rows = drawn(3)
    for tensor in (rows, rows.flatten(2), rows.movedim(2, 0), rows[0]):
        assert torch.equal(as_rows(tensor, TOKENS, WIDTH), rows[0].double())
    assert as_rows(torch.zeros(1, TOKENS, 33), TOKENS, WIDTH) is None
