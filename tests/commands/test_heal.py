"""`abliterate heal`: its options, what it prints, and what it says when it can't."""

from __future__ import annotations

import json

import pytest
import yaml

from abliterate.settings.heal import HealSettings, SelfSettings
from abliterate.settings.options import options_of
from command import PROMPTS, abliterate, fails, succeeds
from models import save_tiny, tiny_llama

FEW = [*PROMPTS, "--validation-prompts", "8", "--test-prompts", "8", "--max-new-tokens", "8"]
SELF = [
    "--preset", "self", "--teaching-prompts", "8", "--answer-tokens", "4", "--max-steps", "2", "--evaluate-every", "2",
]  # fmt: skip
PAIR = {"prompt": "a colour", "chosen": "blue, I think", "rejected": "none at all"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(original, edited); read only."""
    folder = tmp_path_factory.mktemp("models")
    return save_tiny(folder / "fox"), save_tiny(folder / "edited", tiny_llama(seed=1))


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A terminal in which no option's name is cut."""
    monkeypatch.setenv("COLUMNS", "180")


def test_every_setting_is_an_option():
    fields = {*HealSettings.model_fields, *SelfSettings.model_fields} - {"self_teaching"}
    assert fields == {option.name for option in options_of(HealSettings).values()}
    text = succeeds("heal", "--help").out
    for name in fields:
        assert f"--{name.replace('_', '-')}" in text
    assert "Example: abliterate heal" in text


def test_help_names_the_defaults():
    """Those it names are those there are."""
    text = " ".join(succeeds("heal", "--help").out.replace("│", " ").split())
    own = HealSettings.model_validate({"preset": "self"})
    plain = HealSettings.model_validate({})
    for name in ("rank", "alpha", "dropout", "warmup", "epochs", "micro_batch", "accumulation", "save_steps"):
        assert f"[default: {getattr(plain, name):g}; self {getattr(own, name):g}]" in text
    assert (plain.learning_rate, own.learning_rate) == (5e-6, 2e-3)
    assert "[default: 5e-6; self 2e-3]" in text
    for name in SelfSettings.model_fields:
        assert f"[default: {getattr(own.self_teaching, name):g}]" in text


@pytest.mark.slow
def test_prints_three_columns_and_where_things_are(models, tmp_path):
    original, edited = models
    out = tmp_path / "healed"
    done = succeeds("heal", edited, "--original", original, "--out", out, *FEW, *SELF, "--log-file", tmp_path / "log")
    first = done.out.splitlines()[0]
    assert "original against edited against healed" in first
    for name in ("model", "adapter", "card", "results", "report"):
        assert f"{name}:" in done.out
    log = (tmp_path / "log").read_text()
    assert "step 2: divergence" in log and "healed: answers (16)" in log
    again = abliterate("heal", edited, "--original", original, "--out", out, *FEW, *SELF, "--quiet")
    assert again.code == 2 and "is not empty" in again.err
    succeeds("heal", edited, "--original", original, "--out", out, *FEW, *SELF, "--quiet", "--overwrite")


@pytest.mark.slow
def test_json_is_the_results_file(models, tmp_path):
    original, edited = models
    out = tmp_path / "healed"
    done = succeeds(
        "heal", edited, "--original", original, "--out", out, *FEW, *SELF, "--seed", "3", "--json", "--quiet"
    )
    assert done.json == json.loads((out / "results.json").read_text())
    assert done.json["settings"]["seed"] == 3
    assert done.json["settings"]["heal"]["self_teaching"]["teaching_prompts"] == 8
    assert done.err == ""


@pytest.mark.slow
def test_options_stand_in_a_file_too(models, tmp_path):
    original, edited = models
    (tmp_path / "heal.toml").write_text(
        '[heal]\npreset = "self"\nmax_steps = 1\nrank = 2\n[heal.self_teaching]\nteaching_prompts = 8\n'
        "answer_tokens = 4\n[prompts]\ntarget = 'bundled'\nbaseline = 'bundled'\nvalidation_prompts = 8\n"
        "test_prompts = 8\n[measure]\nmax_new_tokens = 8\n"
    )
    done = succeeds(
        "heal", edited, "--original", original, "--out", tmp_path / "out", "--config", tmp_path / "heal.toml",
        "--rank", "3", "--json", "--quiet",
    )  # fmt: skip
    assert done.json["heal"]["settings"]["rank"] == 3
    assert done.json["heal"]["steps"] == 1


def test_writes_axolotl_and_stops(models, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({**PAIR, "prompt": f"colour {i}"}) + "\n" for i in range(40)))
    file = tmp_path / "heal.yaml"
    done = succeeds("heal", models[1], "--data", pairs, "--write-axolotl", file, "--rank", "8", "--quiet")
    assert str(file) in done.out
    document = yaml.safe_load(file.read_text())
    assert document["lora_r"] == 8
    assert document["base_model"] == str(models[1])
    assert not list(tmp_path.glob(".*"))
    line = fails(tmp_path, "heal", models[1], "--data", pairs, "--write-axolotl", file)
    assert "exists" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "self"], "name it with --original"),
        (["--preset", "orpo"], "setting heal.preset = 'orpo'"),
        (["--preset", "self", "--rank", "0"], "setting heal.rank"),
        (["--data", "no-such.jsonl"], "no-such.jsonl not found"),
        (["--preset", "self", "--write-axolotl", "x.yaml"], "--write-axolotl is for --preset dpo"),
        (["--preset", "self", "--original", "no/such/model"], "no/such/model not found"),
        (["--judge", "oracle", "--preset", "self"], "--original"),
    ],
)
def test_what_is_wrong_is_one_line(models, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    assert said in fails(tmp_path, "heal", models[1], "--out", tmp_path / "out", *options)
