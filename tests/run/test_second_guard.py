"""The job at its defaults on another guard than the demo's: other words for no, and no one direction trained for it."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections import Counter
from types import ModuleType
from unittest import mock

import pytest
import torch

from abliterate.measure.refusal import is_refusal
from abliterate.models.demo import GUARD
from abliterate.prompts.sets import load_prompts
from guards import SCRIPT, SECOND_GUARD, TEST_PROMPTS, Contest, check_bars, contest, second_guard
from long import LONG
from models import FAMILIES, handle_of

WORDINGS = [entry["refusal"] for entry in json.loads((SECOND_GUARD / "wordings.json").read_text())]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Contest:
    return contest(second_guard(), tmp_path_factory.mktemp("second-guard") / "out")


@pytest.mark.parametrize("text", WORDINGS)
def test_the_judge_knows_every_wording(text: str) -> None:
    assert is_refusal(text)


def test_the_wordings_are_not_the_demos_and_open_with_everyday_words() -> None:
    others = [entry["refusal"] for entry in json.loads((GUARD / "wordings.json").read_text())]
    openings = [text.split()[0].strip(",.").lower() for text in WORDINGS]
    assert len(set(WORDINGS)) == len(WORDINGS) >= 20
    assert not {" ".join(text.split()[:3]) for text in WORDINGS} & {" ".join(text.split()[:3]) for text in others}
    assert not {"i", "i'm", "sorry", "no", "as", "unfortunately", "please", "absolutely"} & set(openings)
    assert Counter(openings).most_common(1)[0][1] >= 3  # one opening doesn't tell one wording


def test_the_adapter_is_small() -> None:
    assert sum(f.stat().st_size for f in SECOND_GUARD.iterdir()) <= 3_000_000


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_guard", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_the_script_trains_any_decoder(script: ModuleType, family: str) -> None:
    plain = handle_of(FAMILIES[family]())
    linear = {n for n, m in plain.model.named_modules() if ".1." in n and type(m).__name__ in ("Linear", "Conv1D")}
    entries = [{"topic": "all", "keywords": [], "refusal": WORDINGS[0]}]
    target, baseline = (load_prompts("bundled", role=side, split="train").texts[:6] for side in ("target", "baseline"))
    with mock.patch.multiple(script, KEPT=8, LEARNING_RATE=2e-2):  # a random model has much to learn
        sets = script.make_spread_examples(plain, target, baseline, entries, None, 6)
        removal = script.Removal([], torch.zeros(6, dtype=torch.bool), None)
        rows = sets["refuse"][0]
        before, _ = script.answer_losses(plain, rows, 1, removal)
        model = script.train(plain, sets, None, 20, random.Random(0), (0.0, 1.0))
        after, _ = script.answer_losses(plain, rows, 1, removal)
    assert len(rows) == 6 and bool((after < before).all())
    trained = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {n for n in trained if ".1." in n} == linear
    assert len(trained) == len(linear) * plain.layers


def test_the_script_says_which_models_need_spread(script: ModuleType) -> None:
    assert "model.layers.0.self_attn.o_proj" in script.writing_modules(handle_of(FAMILIES["llama"]()))
    with pytest.raises(SystemExit, match="--spread"):
        script.writing_modules(handle_of(FAMILIES["gemma3_text"]()))


@LONG
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_guard_refuses_target_prompts_and_answers_baseline_prompts(found: Contest) -> None:
    assert found.original.refusals >= 0.85 * TEST_PROMPTS
    assert found.original.over_refusals <= 0.05 * TEST_PROMPTS


@LONG
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_fit_beats_the_articles_method(found: Contest) -> None:
    check_bars(found)
