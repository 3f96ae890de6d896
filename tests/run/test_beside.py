"""What jobs measure besides the given sets: in results.json as typed, bounded, and off where it is turned off."""

from __future__ import annotations

import json

import pytest

from abliterate.common.errors import AbliterateError, PromptError
from abliterate.run.facts import provenance
from abliterate.run.measuring import measure_models
from abliterate.run.pipeline import run
from abliterate.settings.run import RunSettings
from documents import check_document

FEW = {"target": "bundled", "baseline": "bundled", "test_prompts": 6}
LOAD = {"dtype": "float32"}


def settings(**beside) -> RunSettings:
    return RunSettings.model_validate(
        {"prompts": FEW, "load": LOAD, "measure": {"max_new_tokens": 8}, "beside": beside}
    )  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "own.txt"
    file.write_text("\n".join(f"Do wrong number {n}" for n in range(9)))
    return str(file)


def test_a_measuring_says_it_of_both_models(tiny_folder, tmp_path, own):
    found = measure_models(str(tiny_folder), str(tiny_folder), settings(also_target=own, obligations=4, think=True))
    assert [(one["source"], one["side"], one["prompts"]) for one in found["also"]] == [
        ("bundled-varied", "target", 6), ("bundled-xstest", "baseline", 6), (own, "target", 6),
    ]  # fmt: skip
    for one in found["also"]:
        assert one["original"]["refusal"]["total"] == one["edited"]["refusal"]["total"] == 6
        assert one["paired"] == {"only_original": 0, "only_edited": 0, "p": 1.0}  # they are one model
    assert found["obligations"]["prompts"] == found["obligations"]["edited"]["total"] == 4
    assert found["thinking"]["edited"]["target"]["reasoned"]["total"] == 6
    (tmp_path / "results.json").write_text(json.dumps(found))
    check_document(tmp_path / "results.json")
    assert own not in json.dumps(provenance({**found, "prompts": {}}, {}))  # a recipe is for others


def test_one_model_is_the_original(tiny_folder):
    found = measure_models(str(tiny_folder), None, settings(also_prompts=3, obligations=0))
    assert [set(one) & {"original", "edited", "paired"} for one in found["also"]] == [{"original"}] * 2
    assert found["also"][0]["prompts"] == 3 and "obligations" not in found


def test_nothing_is_measured_where_all_is_off(tiny_folder):
    found = measure_models(str(tiny_folder), None, settings(also_prompts=0, obligations=0))
    assert not {"also", "obligations", "thinking"} & set(found)


def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PromptError, match=r"gone\.txt was not found"):
        run("nowhere", out, settings(also_target=str(tmp_path / "gone.txt")))
    prefilled = settings(think=True).model_copy(update={"load": settings().load.model_copy(update={"prefill": "A"})})
    with pytest.raises(AbliterateError, match=r"--think .* --prefill"):
        measure_models("nowhere", None, prefilled)
