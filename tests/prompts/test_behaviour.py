"""A behaviour's file: the bundled ones, what is asked of one's own, and what errors say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from abliterate.common.errors import AbliterateError, PromptError
from abliterate.prompts.behaviour import BUNDLED, Defaults, load_behaviour
from abliterate.prompts.behaviour_prompts import behaviour_sides
from abliterate.prompts.sets import normalise
from abliterate.settings.run import PromptSettings, RunSettings

FORMAL = Path(__file__).parents[1] / "data" / "formal.toml"


def test_the_bundled_ones():
    kinds = {name: (load_behaviour(name).kind, load_behaviour(name).adds) for name in BUNDLED}
    assert kinds == {"refusal": ("prompts", False), "persona": ("system-prompts", True), "slop": ("answers", False)}
    assert len(load_behaviour("slop").pairs) == 80


@pytest.mark.parametrize("name", ["persona", "slop"])
def test_no_measured_prompt_makes_the_contrast_and_no_two_splits_share_one(name):
    behaviour = load_behaviour(name)
    sides = behaviour_sides(behaviour, PromptSettings(), 0)
    splits = [set(map(normalise, part)) for part in sides.target]
    assert all(splits) and not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])
    own = set(map(normalise, behaviour.own_prompts))
    assert own and not own & (splits[1] | splits[2])
    assert len(splits[2]) >= 60


def test_one_set_of_prompts_is_both_sides():
    sides = behaviour_sides(load_behaviour(FORMAL), PromptSettings(test_prompts=12), 0)
    assert sides.target == sides.baseline and len(sides.target.test) == 12
    with pytest.raises(PromptError, match="--target alone"):
        behaviour_sides(load_behaviour(FORMAL), PromptSettings(baseline="bundled"), 0)


def written(tmp_path, *changes: tuple[str, str], text: str | None = None) -> Path:
    text = text or FORMAL.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "own.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('kind = "answers"', 'kind = "answer"'), "`kind` = 'answer'"),
        (('kind = "answers"', 'kind = "system-prompts"'), r"needs a table \[system_prompts\]"),
        (('kind = "answers"', 'kind = "prompts"'), r"no use for a table \[answers\]"),
        (('sign = "add"', 'sing = "add"'), "knows no key `sing`"),
        (('about = "answers in a formal, stiff voice"', ""), "needs a key `about`"),
        (('shows = "formal"', ""), r"table \[words\]: needs a key `shows`"),
        (("threshold = 4.0", "threshold = 0"), r"table \[judge\]: `threshold` = 0"),
        (("threshold = 4.0", "treshold = 4"), r"table \[judge\]: knows no key `treshold`"),
        (("threshold = 4.0", 'use = "lexical"'), "one or the other"),
        (("patterns = ['\\bI am", "patterns = ['(\\bI am"), "not a regular expression"),
        (('both = "bundled"', 'both = "bundled"\ntarget = "bundled"'), "one set or two"),
        (('both = "bundled"', ""), "needs `target` and `baseline`, or `both`"),
        (('target = "Dinner shall', 'tagret = "Dinner shall'), "answers.pairs.2"),
        (('name = "formal"', 'name = "For Mal"'), "`name` = 'For Mal'"),
        (('name = "formal"', "name = formal"), "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, said):
    with pytest.raises(AbliterateError, match=said) as error:
        load_behaviour(written(tmp_path, change))
    assert "own.toml" in str(error.value) and "\n" not in str(error.value)


def test_a_behaviour_that_is_nowhere():
    for name in ("gloomy", "gloomy.toml"):
        with pytest.raises(AbliterateError, match="bundled: refusal, persona, slop"):
            load_behaviour(name)


def test_pairs_in_a_file(tmp_path):
    text = FORMAL.read_text(encoding="utf-8")
    start, end = text.index("[[answers.pairs]]"), text.index("[judge]")
    path = written(tmp_path, text=text[:start] + '[answers]\nfile = "pairs.jsonl"\n\n' + text[end:])
    with pytest.raises(PromptError, match=r"pairs\.jsonl not found"):
        _ = load_behaviour(path).pairs
    good = '{"prompt": "p%d", "target": "t", "baseline": "b"}\n'
    (tmp_path / "pairs.jsonl").write_text("".join(good % i for i in range(9)))
    assert len(load_behaviour(path).pairs) == 9
    for line, said in (
        ("{", "line 10"),
        ('{"prompt": "p"}', "line 10"),
        (good % 1 * 0 + '{"prompt": "", "target": "t", "baseline": "b"}', "prompt is ''"),
    ):
        (tmp_path / "pairs.jsonl").write_text("".join(good % i for i in range(9)) + line)
        with pytest.raises(PromptError, match=said):
            _ = load_behaviour(path).pairs
    (tmp_path / "pairs.jsonl").write_text(good % 1)
    with pytest.raises(PromptError, match="at least 8"):
        _ = load_behaviour(path).pairs


def test_prompts_in_the_file_itself(tmp_path):
    texts = ", ".join(f'"prompt number {i}"' for i in range(20))
    sides = behaviour_sides(
        load_behaviour(written(tmp_path, ('both = "bundled"', f"both = [{texts}]"))), PromptSettings(), 0
    )
    assert sum(len(part) for part in sides.target) == 20


def test_a_measured_prompt_of_the_contrast_is_an_error(tmp_path):
    texts = ", ".join(f'"prompt number {i}"' for i in range(8)) + ', "what time is dinner"'
    path = written(tmp_path, ('both = "bundled"', f"both = [{texts}]"))
    with pytest.raises(PromptError, match="makes the contrast"):
        for seed in range(8):  # where the prompt lands in the training split it isn't measured
            behaviour_sides(load_behaviour(path), PromptSettings(), seed)


def test_settings_are_resolved_and_said():
    settings, notes = load_behaviour("slop").resolved(RunSettings())
    assert settings.measure.judge == "style:slop" and settings.search.method == "sweep"
    assert settings.search.max_divergence == load_behaviour("slop").definition.defaults.max_divergence
    assert len(notes) == 1 and "sweep instead of fit" in notes[0]
    same, notes = load_behaviour("refusal").resolved(RunSettings())
    assert same == RunSettings() and not notes
    asked = RunSettings.model_validate({"measure": {"judge": "classifier:x"}, "search": {"max_divergence": 0.7}})
    settings, _ = load_behaviour("slop").resolved(asked)
    assert settings.measure.judge == "classifier:x" and settings.search.max_divergence == 0.7


def test_what_was_named_wins_also_where_it_is_the_programs_default():
    slop, refusal = load_behaviour("slop"), load_behaviour("refusal")
    asked = RunSettings.model_validate({"measure": {"judge": "lexical"}})
    assert slop.resolved(asked)[0].measure.judge == "lexical"
    by_article = refusal.definition.model_copy(update={"defaults": Defaults(method="article")})
    refusal = replace(refusal, definition=by_article)
    assert refusal.resolved(RunSettings())[0].search.method == "article"
    asked = RunSettings.model_validate({"search": {"method": "fit"}})
    assert refusal.resolved(asked) == (asked, [])
    with pytest.raises(AbliterateError, match="slop can't be found by --method fit"):
        slop.resolved(asked)


def test_a_style_that_is_added_has_a_fit():
    settings, notes = load_behaviour("persona").resolved(RunSettings())
    assert settings.search.method == "fit" and not notes
    with pytest.raises(AbliterateError, match="or take fit"):
        load_behaviour("persona").resolved(RunSettings.model_validate({"search": {"method": "sweep"}}))
