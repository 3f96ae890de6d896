"""The filter: what the model itself says decides what counts, in words that it taught."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from abliterate.common.errors import AbliterateError
from abliterate.measure import Judged
from abliterate.measure.decode import Answer
from abliterate.measure.verdicts import Panel
from abliterate.prompts.behaviour import load_behaviour
from abliterate.run.opening import judges, open_prompts, second_judge
from abliterate.run.showing import filtered, showing
from abliterate.settings.run import resolve
from heard import Heard
from planted import BASELINE, TARGET, RefusesWithR, planted


def test_a_panel_learns_while_it_filters_once():
    heard, panel = Heard(), Panel(RefusesWithR())
    shown = showing(planted(), TARGET, BASELINE, panel, heard)
    assert panel.learnt and any("refusal wordings learnt" in line for line in heard.lines)
    assert shown.refused.count == len(TARGET) and shown.examples.asked == TARGET
    heard.lines.clear()
    showing(planted(), TARGET, BASELINE, panel, heard)
    assert not heard.lines


def job(refuse, given=None):
    """A job on the planted model whose validation targets are refused where `refuse` says so."""
    prompts = {"validation_prompts": given} if given else {}
    settings = resolve({f"prompts.{k}": v for k, v in prompts.items()}, environment={})
    texts = SimpleNamespace(texts=tuple(f"{'Q' if refuse(i) else 'tell'} of {i}" for i in range(24)))
    baseline = SimpleNamespace(texts=tuple(f"tell me {i}" for i in range(24)))
    sides = SimpleNamespace(
        target=SimpleNamespace(train=texts, validation=texts),
        baseline=SimpleNamespace(train=baseline, validation=baseline),
    )
    return SimpleNamespace(
        handle=planted(), sides=sides, judge=RefusesWithR(), settings=settings, behaviour=load_behaviour("refusal"),
        reporter=Heard(),
    )  # fmt: skip


def test_a_model_that_refuses_only_some_is_judged_on_more_prompts():
    some = job(lambda i: i % 2 == 0, given=8)
    train = filtered(some, "train")
    assert train.refused.rate == 0.5
    seen = filtered(some, "validation", seen=train)
    assert seen.refused.total == 24 and seen.answered.total == 8 and len(seen.examples.judged_on) == 24
    every = job(lambda i: True, given=8)
    assert filtered(every, "validation", seen=filtered(every, "train")).refused.total == 8


def test_where_hardly_anything_is_refused_at_once_whole_answers_are_looked_at(monkeypatch):
    late, tokens = job(lambda i: True), []

    def spied(handle, prompts, judge, *, max_new_tokens, **more):
        tokens.append(max_new_tokens)
        refused = [max_new_tokens > 32 and p.startswith("Q") for p in prompts]
        return Judged([Answer([5], "R", True, False)] * len(prompts), refused)

    monkeypatch.setattr(sys.modules[filtered.__module__], "judged", spied)
    assert filtered(late, "train").refused.count == 24
    assert tokens == [32, 32, 100, 100]
    assert any("whole answers" in line for line in late.reporter.lines)


def test_twice_as_many_are_loaded_unless_their_number_is_given(tmp_path):
    for side in ("a", "b"):
        (tmp_path / side).write_text("".join(f"{side} prompt {i}\n" for i in range(2000)))
    sources = {"prompts.target": str(tmp_path / "a.txt"), "prompts.baseline": str(tmp_path / "b.txt")}
    for side in ("a", "b"):
        (tmp_path / side).rename(tmp_path / f"{side}.txt")
    usual = open_prompts(resolve(sources, environment={}).prompts, 0)
    assert len(usual.target.validation) == 128
    given = open_prompts(resolve({**sources, "prompts.validation_prompts": 64}, environment={}).prompts, 0)
    assert len(given.target.validation) == 64


def test_the_panel_is_for_refusing_and_the_second_judge_another_one():
    settings = resolve({"measure.report_judge": "none"}, environment={})
    assert isinstance(judges(settings, load_behaviour("refusal")), Panel)
    assert second_judge(settings, load_behaviour("refusal")) is None
    persona, _ = load_behaviour("persona").resolved(settings)
    assert not isinstance(judges(persona, load_behaviour("persona")), Panel)
    same = resolve({"measure.report_judge": "lexical"}, environment={})
    with pytest.raises(AbliterateError, match="--report-judge lexical is one that choosing sees"):
        second_judge(same, load_behaviour("refusal"))
    both = resolve({"measure.judge": "lexical + lexical", "measure.report_judge": "none"}, environment={})
    assert judges(both, load_behaviour("refusal")).name == "lexical + lexical"
