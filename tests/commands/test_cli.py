"""The command line: what it offers, where settings come from, and what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import abliterate as package
from abliterate.cli import app
from command import PROMPTS, SMALL, abliterate, succeeds
from models import save_tiny

FAST = [*SMALL, "--no-filter", "--method", "article", "--candidates", "1"]
COMMANDS = [command.callback.__name__ for command in app.registered_commands]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def edited(tiny_folder, tmp_path_factory):
    """The folder of one run, and what the command said."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, succeeds("run", tiny_folder, "--out", out, *FAST)


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


# --- what it offers ---


def test_commands():
    assert {"run", "demo", "collect", "measure", "inspect", "doctor"} <= set(COMMANDS)


def test_help_has_the_commands_and_examples():
    shown = succeeds("--help").out
    assert "Examples" in shown
    for command in COMMANDS:
        assert command in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command):
    for option in ("--help", "-h"):
        shown = succeeds(command, option).out
        assert re.search(rf"Example( \([^)]+\))?: abliterate {command}", shown)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom abliterate.cli import main\n"
        "sys.argv = ['abliterate', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as leaving:\n    assert not leaving.code\n"
        "print('HEAVY', [m for m in ('torch', 'transformers', 'datasets', 'peft', 'numpy') if m in sys.modules])"
    )
    for arguments in (["--help"], ["run", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_installed_command():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("abliterate")), "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"{package.__version__}\n")


def test_version():
    assert succeeds("--version").out == f"{package.__version__}\n"


# --- run ---


def test_run_prints_the_numbers_and_where_things_are(edited, tiny_folder):
    out, done = edited
    table = done.out
    for name in ("original", "edited", "refusals", "over-refusals", "divergence", "degenerate"):
        assert name in table
    for path in (out / "model", out / "recipe.safetensors", out / "model" / "README.md", out / "results.json"):
        assert path.exists()
        assert str(path) in table
    assert str(tiny_folder) in table


def test_run_tells_how_it_goes_on_stderr(edited):
    log = edited[1].err
    for said in ("loading", "writers found; proof", "collecting activations (16)", "chose layer", "edited"):
        assert said in log
    assert all(re.match(r" *\d+\.\ds  ", line) for line in log.splitlines())


def test_quiet(desk, tiny_folder):
    done = succeeds("run", tiny_folder, "--out", "out", *FAST, "--quiet")
    assert done.err == ""
    assert "refusals" in done.out


def test_json(desk, tiny_folder):
    done = succeeds("run", tiny_folder, "--out", "out", *FAST, "--json")
    assert done.json == results(desk / "out")


def test_out_is_named_after_the_model(desk, monkeypatch):
    from abliterate.commands.run import _default_folder

    save_tiny(desk / "fox")
    succeeds("run", "fox/", *FAST)
    assert (desk / "fox-abliterated" / "results.json").is_file()
    assert _default_folder("org/fox-0.6B") == Path("fox-0.6B-abliterated")
    assert _default_folder("models/fox.Q4_K_M.gguf") == Path("fox.Q4_K_M-abliterated")
    assert _default_folder("demo") == Path("demo-abliterated")
    monkeypatch.chdir(desk / "fox")
    assert _default_folder(".") == Path("fox-abliterated")


@pytest.mark.slow
def test_interactive_asks_and_hides_answers(desk, tiny_folder, monkeypatch):
    import typer

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(typer, "prompt", lambda *args, **options: 1)
    arguments = ["run", tiny_folder, *SMALL, "--no-filter", "--method", "article", "--candidates", "3", "--interactive"]
    hidden = succeeds(*arguments, "--out", "out")
    shown = succeeds(*arguments, "--out", "out", "--overwrite", "--show-completions")
    document = results(desk / "out")
    assert document["recipe"]["direction"]["note"] == "picked by a person"
    assert document["candidates"].index(document["recipe"]["direction"]) == 1
    assert len(shown.err) + len(shown.out) > len(hidden.err) + len(hidden.out) + 100


# --- where settings come from ---


def test_environment_file_and_flags(desk, tiny_folder, monkeypatch):
    (desk / "settings.toml").write_text(
        'seed = 5\n[measure]\nmax_new_tokens = 3\n[collect]\nfilter = false\nbatch_size = 7\n'
        '[search]\nmethod = "article"\ncandidates = 1\n[prompts]\ntrain_prompts = 9\nvalidation_prompts = 8\n'
    )  # fmt: skip
    monkeypatch.setenv("ABLITERATE_MEASURE__MAX_NEW_TOKENS", "4")
    monkeypatch.setenv("ABLITERATE_PROMPTS__TEST_PROMPTS", "8")
    monkeypatch.setenv("ABLITERATE_CACHE", "not a setting")
    succeeds("run", tiny_folder, "--out", "out", *PROMPTS, "--config", "settings.toml", "--train-prompts", "10")
    used = results(desk / "out")["settings"]
    assert used["seed"] == 5
    assert used["collect"]["batch_size"] == 7
    assert used["measure"]["max_new_tokens"] == 4
    assert used["prompts"]["test_prompts"] == 8
    assert used["prompts"]["train_prompts"] == 10


def test_bad_environment_is_named(desk, tiny_folder, monkeypatch):
    monkeypatch.setenv("ABLITERATE_LOAD__DTYPE", "int3")
    failed = abliterate("run", tiny_folder, "--out", "out", *FAST, "--quiet")
    assert failed.code == 2
    assert "load.dtype = 'int3'" in failed.err


def test_every_option_reaches_a_setting():
    """Every option is one of the settings' or known to be the command's own."""
    import typer

    from abliterate.settings.options import options_of
    from abliterate.settings.run import RunSettings

    names = {option.name for option in options_of(RunSettings).values()}
    not_settings = {
        "model", "out", "config", "overwrite", "quiet", "json", "show_completions", "activations", "original",
        "keep_vectors", "plan", "log_file", "induce", "recipe",
    }  # fmt: skip
    commands = typer.main.get_command(app).commands
    for name in ("run", "demo", "collect", "measure", "inspect"):  # those that take settings
        for parameter in commands[name].params:
            if parameter.name != "help":
                assert parameter.name in names | not_settings, f"{name}: {parameter.name}"


def test_every_option_of_the_settings_is_one_of_run():
    import typer

    from abliterate.settings.options import options_of
    from abliterate.settings.run import RunSettings

    options = options_of(RunSettings).values()
    parameters = {p.name: p for p in typer.main.get_command(app).commands["run"].params}
    assert len({option.name for option in options}) == len(options)  # else one would hide another
    for option in options:
        assert option.help in parameters[option.name].help.replace("\\[", "[")  # as rich wants it
        assert f"--{option.name.replace('_', '-')}" in parameters[option.name].opts


# --- the other commands ---


@pytest.mark.slow
def test_collect_then_run(desk, tiny_folder):
    done = succeeds("collect", tiny_folder, "--out", "acts.safetensors", *SMALL[:6], "--no-filter", "--json")
    assert done.json["target"] == done.json["baseline"] == 8
    assert (done.json["layers"], done.json["d_model"]) == (4, 32)
    said = succeeds("run", tiny_folder, "--out", "out", *FAST, "--activations", "acts.safetensors").err
    assert "activations from acts.safetensors" in said
    plain = succeeds("collect", tiny_folder, "--out", "acts.safetensors", *SMALL[:6], "--no-filter", "--overwrite")
    assert plain.out == "activations: acts.safetensors\n"


def test_measure(desk, edited, tiny_folder):
    out, _ = edited
    more = [*PROMPTS, "--test-prompts", "8", "--max-new-tokens", "8"]
    done = succeeds("measure", out / "model", "--original", tiny_folder, "--out", "numbers.json", *more)
    document = json.loads((desk / "numbers.json").read_text())
    for name in ("original", "edited"):
        for rate in ("refusal", "over_refusal", "degenerate"):
            assert document[name][rate] == results(out)[name][rate]
    assert document["original"]["divergence"] is None
    assert document["edited"]["divergence"]["prompts"] == 8
    assert "divergence" in done.out
    alone = succeeds("measure", tiny_folder, *more, "--json").json
    assert alone["original"]["refusal"]["total"] == 8
    assert alone["edited"] is None
    assert "divergence" not in succeeds("measure", tiny_folder, *more).out


def test_inspect(tiny_folder):
    document = succeeds("inspect", tiny_folder, "--json").json
    assert document["proof"]["passed"] is True
    assert document["proof"]["component"] < document["proof"]["tolerance"] <= 1e-5
    assert len(document["writers"]) == 1 + 2 * 4
    assert document["writers"][0]["name"] == "model.embed_tokens.weight"
    shown = succeeds("inspect", tiny_folder).out
    assert "proved: with all of them edited" in shown
    for writer in document["writers"]:
        assert writer["name"] in shown


def test_inspect_of_what_is_not_proved(tiny_folder, monkeypatch):
    import abliterate.apply.proof as proof

    monkeypatch.setattr(proof, "prove", lambda handle: proof.Proof(0.3, "block 2, post (mlp writes it)"))
    failed = abliterate("inspect", tiny_folder)
    assert failed.code == 2
    assert "NOT PROVED" in failed.out
    assert "block 2, post" in failed.out


@pytest.mark.slow
def test_demo_is_the_demo_whatever_lies_around(desk, tiny_folder, monkeypatch):
    import abliterate.models.demo as demo

    (desk / "demo").mkdir()
    monkeypatch.setattr(demo, "demo_model", lambda: tiny_folder)
    failed = abliterate("demo", "--out", "out", "--test-prompts", "8", "--quiet")
    assert failed.code == 3  # a random model doesn't refuse; but it was loaded
    assert str(tiny_folder) in failed.err
