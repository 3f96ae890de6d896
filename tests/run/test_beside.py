"""What jobs measure besides the given sets: in results.json as typed, bounded, and off where it is turned off."""

from __future__ import annotations

import json

import pytest

from abliterate.common.errors import AbliterateError, PromptError
from abliterate.measure import measurement
from abliterate.measure.also import verdicts_on
from abliterate.measure.judges import LexicalJudge
from abliterate.models.handle import behind
from abliterate.prompts.further import INNOCENT, Further, further_sets
from abliterate.prompts.sets import load_sides
from abliterate.run.facts import provenance
from abliterate.run.measuring import measure_models
from abliterate.run.pipeline import run
from abliterate.settings.run import RunSettings
from documents import check_document
from heard import Heard

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
        ("second-turn", "target", 6),
    ]  # fmt: skip
    for one in found["also"]:
        assert one["original"]["refusal"]["total"] == one["edited"]["refusal"]["total"] == 6
        assert one["paired"] == {"only_original": 0, "only_edited": 0, "p": 1.0}  # they are one model
    assert found["obligations"]["prompts"] == found["obligations"]["edited"]["total"] == 4
    assert found["thinking"]["edited"]["target"]["reasoned"]["total"] == 6
    (tmp_path / "results.json").write_text(json.dumps(found))
    check_document(tmp_path / "results.json")
    assert own not in json.dumps(provenance({**found, "prompts": {}}, {}))  # a recipe is for others


def test_a_second_turn_is_asked_behind_an_innocent_first_one(tiny_handle):
    """The same prompts, with the turns before them in what the model reads, and nothing left of them afterwards."""
    (one,) = further_sets(load_sides("bundled", "bundled", limit_test=4), most=0, second_turn=3)
    assert len(one.prompts) == 3 and one.before == INNOCENT
    plain = tiny_handle.prompt_ids(one.prompts.texts)
    with behind(tiny_handle, one.before):
        later = tiny_handle.prompt_ids(one.prompts.texts)
    assert tiny_handle.prompt_ids(one.prompts.texts) == plain
    for long, short in zip(later, plain, strict=True):
        said = tiny_handle.tokenizer.decode(long)
        assert len(long) > len(short) + 10 and all(turn["content"] in said for turn in INNOCENT)
    seen = []
    decode = measurement.decode
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measurement, "decode", lambda h, ids, **more: seen.append(ids) or decode(h, ids, **more))
        verdicts_on(tiny_handle, [Further("target", one.prompts), one], LexicalJudge(), max_new_tokens=2)
    assert seen == [plain, later]


def test_a_template_that_takes_one_turn_only_is_no_reason_to_stop(tiny_folder):
    template = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0]['content'] }}"
    given = settings(obligations=0)
    given = given.model_copy(update={"load": given.load.model_copy(update={"chat_template": template})})
    heard = Heard()
    found = measure_models(str(tiny_folder), None, given, reporter=heard)
    assert [one["source"] for one in found["also"]] == ["bundled-varied", "bundled-xstest"]
    assert any(line.startswith("second-turn isn't measured: ") for line in heard.lines)


def test_one_model_is_the_original(tiny_folder):
    found = measure_models(str(tiny_folder), None, settings(also_prompts=3, obligations=0, second_turn=0))
    assert [set(one) & {"original", "edited", "paired"} for one in found["also"]] == [{"original"}] * 2
    assert found["also"][0]["prompts"] == 3 and "obligations" not in found


def test_nothing_is_measured_where_all_is_off(tiny_folder):
    found = measure_models(str(tiny_folder), None, settings(also_prompts=0, obligations=0, second_turn=0))
    assert not {"also", "obligations", "thinking"} & set(found)


def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PromptError, match=r"gone\.txt was not found"):
        run("nowhere", out, settings(also_target=str(tmp_path / "gone.txt")))
    prefilled = settings(think=True).model_copy(update={"load": settings().load.model_copy(update={"prefill": "A"})})
    with pytest.raises(AbliterateError, match=r"--think .* --prefill"):
        measure_models("nowhere", None, prefilled)
