"""Options of healing: the article's defaults, a preset's own, and where they come from."""

from __future__ import annotations

import json

import pytest

from abliterate.common.errors import AbliterateError
from abliterate.heal.training import Job
from abliterate.settings.heal import PRESET_DEFAULTS, HealRunSettings, HealSettings
from abliterate.settings.options import options_of
from abliterate.settings.run import resolve

# Labonne 2024, "Uncensor any LLM with abliteration"; 100 warm-up steps of about 4,900
ARTICLE = {
    "preset": "dpo", "data": "mlabonne/orpo-dpo-mix-40k", "rank": 64, "alpha": 32, "dropout": 0.05,
    "target_modules": "all-linear", "max_length": 2048, "micro_batch": 1, "accumulation": 8, "epochs": 1,
    "scheduler": "cosine", "learning_rate": 5e-6, "gradient_checkpointing": True, "weight_decay": 0,
}  # fmt: skip


def test_the_defaults_are_the_articles():
    settings = HealSettings()
    assert {name: getattr(settings, name) for name in ARTICLE} == ARTICLE
    assert not settings.keep_refusals


def test_every_field_is_documented():
    for name, option in options_of(HealSettings).items():
        assert option.help or option.default_said(), name  # a name that says all has its default at least


def test_a_presets_defaults_give_way_to_what_is_said(monkeypatch):
    monkeypatch.setitem(PRESET_DEFAULTS, "self", {"learning_rate": 1e-3, "rank": 4})
    assert HealSettings(preset="self").learning_rate == 1e-3
    assert HealSettings(preset="self", learning_rate=2e-4).learning_rate == 2e-4
    assert HealSettings(preset="self", learning_rate=None, rank=8).model_dump()["rank"] == 8  # type: ignore[arg-type]
    assert HealSettings().learning_rate == 5e-6


def test_file_environment_and_flags_in_this_order(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text("seed = 3\n[heal]\nrank = 2\nbeta = 0.3\nmax_length = 99\n[measure]\nmax_new_tokens = 20\n")
    environment = {"ABLITERATE_HEAL__BETA": "0.4", "ABLITERATE_HEAL__MAX_LENGTH": "77", "ABLITERATE_HEAL": "no table"}
    got = resolve({"heal.max_length": 55, "heal.rank": None}, file, environment, kind=HealRunSettings)
    assert (got.seed, got.measure.max_new_tokens) == (3, 20)
    assert (got.heal.rank, got.heal.beta, got.heal.max_length) == (2, 0.4, 55)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"heal.learning_rate": -1.0}, ["heal.learning_rate", "-1.0"]),
        ({"heal.preset": "ppo"}, ["heal.preset", "dpo"]),
        ({"heal.lr": 1}, ["heal.lr"]),
        ({"heal.held_out": 1.0}, ["heal.held_out"]),
    ],
)
def test_a_wrong_value_is_named(flags, words):
    with pytest.raises(AbliterateError) as error:
        resolve(flags, environment={}, kind=HealRunSettings)
    assert all(word in str(error.value) for word in words)


def test_a_job_goes_through_a_file(tmp_path):
    settings = HealRunSettings.model_validate({"seed": 5, "heal": {"preset": "self", "max_steps": 7}})
    job = Job(model="m", original="o", folder=tmp_path, settings=settings, resume=True)
    again = Job.model_validate_json(json.dumps(json.loads(job.model_dump_json())))
    assert again == job
