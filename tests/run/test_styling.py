"""A run of a style end to end on a tiny model: what it writes, and that the files hold what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from abliterate.common.errors import AbliterateError, NothingToDoError
from abliterate.edit.recipe import load_recipe
from abliterate.models.loading import load
from abliterate.prompts.behaviour import load_behaviour
from abliterate.run import styling
from abliterate.run.measuring import measure_models
from abliterate.run.pipeline import collect_to_file, run
from abliterate.search.style_sweep import SweepSizes
from abliterate.search.styles import StyleSettings
from abliterate.settings.run import RunSettings
from documents import check_document
from models import save_tiny, tiny_llama

FORMAL = Path(__file__).parents[1] / "data" / "formal.toml"
FEW = {"train_prompts": 8, "validation_prompts": 8, "test_prompts": 8}


def settings(behaviour: str, **more) -> RunSettings:
    return RunSettings.model_validate(
        {
            "behaviour": behaviour,
            "prompts": FEW,
            "measure": {"max_new_tokens": 10},
            "load": {"dtype": "float32"},
            **more,
        }
    )


@pytest.fixture
def loose(tmp_path) -> Path:
    """The documented example with a judge that a random model meets: any letters."""
    text = FORMAL.read_text(encoding="utf-8")
    start = text.index("words = [\n")
    end = text.index("[defaults]")
    path = tmp_path / "loose.toml"
    path.write_text(text[:start] + "patterns = ['[a-z]']\n\n" + text[end:], encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A fit of a few steps, a sweep of a few candidates."""
    quick = StyleSettings(steps=2, steps_between=1, rounds=1, factors=(1.15,), batch=4, answer_tokens=8, prompts=8)
    monkeypatch.setattr(styling, "MOST_ASKED", 8)
    monkeypatch.setattr(styling, "MOST_LEARNT", 8)
    monkeypatch.setattr(styling, "StyleSettings", lambda **named: type(quick)(**{**vars(quick), **named}))
    few = SweepSizes(most_layers=2, sizes=(1.0, 2.0), screen_prompts=4, screen_tokens=6, prompts=8, finalists=2)
    monkeypatch.setattr(styling, "SweepSizes", lambda **named: type(few)(**{**vars(few), **named}))


def test_the_documented_file_added_to_a_llama(loose, tmp_path):
    folder = save_tiny(tmp_path / "model", tiny_llama(tied=False))
    result = run(str(folder), tmp_path / "out", settings(str(loose), force=True))
    check_document(tmp_path / "out" / "results.json")
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document == json.loads(json.dumps(result.document))
    assert (document["behaviour"]["name"], document["behaviour"]["sign"]) == ("formal", "add")
    assert document["recipe"]["switch"] == "mlp_bias" and document["recipe"]["writers"] == 0
    for state in ("original", "edited"):
        assert document[state]["refusal"] == document[state]["over_refusal"]  # one set of prompts, decoded once
        assert document[state]["coherent"]["refused"] <= document[state]["refusal"]["refused"]
        assert document[state]["score"]["target"] > 0
    # plain transformers gives what the recipe gives live
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    handle = load(folder, dtype="float32")
    with load_recipe(tmp_path / "out" / "recipe.safetensors").edit.attached(handle):
        live = handle.model(input_ids=ids).logits
    assert torch.allclose(plain(input_ids=ids).logits, live, atol=1e-4)
    assert not torch.allclose(handle.model(input_ids=ids).logits, live, atol=1e-3)
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "formal answers" in card and "refusals" not in card and "guardrail" not in card
    for file in ("recipe.safetensors", "model/README.md"):
        assert str(tmp_path).encode() not in (tmp_path / "out" / file).read_bytes()
    measured = measure_models(str(tmp_path / "out" / "model"), str(folder), settings(str(loose)))
    assert measured["edited"]["refusal"] == document["edited"]["refusal"]


def test_slop_removed_from_a_llama(tmp_path, tiny_folder):
    result = run(str(tiny_folder), tmp_path / "out", settings("slop", force=True))
    check_document(tmp_path / "out" / "results.json")
    assert result.document["behaviour"]["pairs"] == 80
    assert result.document["frontier"] and sum(p["chosen"] for p in result.document["frontier"]) == 1
    assert result.document["edited"]["divergence"]["answer"] > 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    report = (tmp_path / "out" / "report.html").read_text()
    assert "slop removed" in report and "a style or an induced behaviour has none" in report
    assert "model refuses" not in report


def test_a_model_that_does_not_show_it_writes_nothing(tmp_path, tiny_folder):
    with pytest.raises(NothingToDoError, match="hardly flowery: 0 of 8"):
        run(str(tiny_folder), tmp_path / "out", settings("slop"))
    assert list(tmp_path.iterdir()) == []


def test_what_such_a_run_has_no_use_for_is_refused(tmp_path, tiny_folder):
    with pytest.raises(AbliterateError, match="a search of its own"):
        run(str(tiny_folder), tmp_path / "out", settings("slop"), show_completions=True)


def test_a_behaviour_of_two_prompt_sets_runs_as_refusal_does(tmp_path, tiny_folder):
    path = tmp_path / "letters.toml"
    path.write_text(
        'name = "letters"\nabout = "uses letters"\nkind = "prompts"\n'
        '[words]\nshows = "lettered"\nrate = "lettered answers"\n'
        'over = "others"\n[prompts]\ntarget = "bundled"\nbaseline = "bundled"\n'
        "[judge]\npatterns = ['[a-z]']\nthreshold = 100000\n[defaults]\nmethod = \"article\"\n"
    )
    asked = settings(str(path), collect={"filter": False}, search={"candidates": 1}, force=True)
    document = run(str(tiny_folder), tmp_path / "out", asked).document
    assert document["recipe"]["method"] == "article"  # as its file says
    assert document["behaviour"]["words"]["shows"] == "lettered"
    assert document["settings"]["measure"]["judge"] == f"style:{path}"
    assert "lettered answers" in (tmp_path / "out" / "model" / "README.md").read_text()


def test_collect_along_answers(tmp_path, tiny_folder):
    found = collect_to_file(str(tiny_folder), tmp_path / "acts.safetensors", settings("slop"))
    assert (found["positions"], found["target"], found["baseline"]) == (1, 60, 60)


def test_the_bundled_persona_asks_its_own_prompts():
    assert len(load_behaviour("persona").own_prompts) == 48
