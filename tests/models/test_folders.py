"""Where a model is, however it was typed; and what is said where it isn't."""

from __future__ import annotations

import importlib
import shutil

import pytest

import abliterate as ab
from abliterate.common.errors import ModelError
from abliterate.models.folders import check_here, local_folder, meant, model_folder
from abliterate.settings.run import RunSettings
from command import abliterate, succeeds
from models import save_tiny


@pytest.fixture
def cached(tmp_path, monkeypatch, tiny_folder):
    """A model org/tiny in a Hub cache of its own, offline, and a second revision of it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        shutil.copytree(tiny_folder, repo / "snapshots" / commit)
        (repo / "refs" / name).write_text(commit)
    return repo


@pytest.mark.parametrize(
    ("typed", "commit"),
    [
        ("org/tiny", "a"), ("https://huggingface.co/org/tiny", "a"), ("hf.co/org/tiny/", "a"), (" org/tiny ", "a"),
        ("org/tiny@v1", "b"), ("https://huggingface.co/org/tiny/tree/v1?x=y", "b"), ("hf://org/tiny", "a"),
    ],
)  # fmt: skip
def test_a_name_as_pasted_loads(cached, typed, commit):
    assert local_folder(typed).name == model_folder(typed).name == commit * 40
    handle = ab.load(typed, dtype="float32")
    assert (handle.source, handle.folder.name) == ("org/tiny", commit * 40)
    assert handle.revision == ("v1" if commit == "b" else commit * 40)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("https://huggingface.co/org/tiny/blob/main/tiny.gguf", "address of a file or page.*org/tiny.*hf download"),
        ("https://example.com/org/tiny", "no address of a model on the Hugging Face Hub"),
        ("org/tiny:Q4_K_M", "written org/name@revision, and of a GGUF on the Hub the downloaded file"),
        ("https://hf.co/datasets/org/set", "address of a data set, not of a model; for prompts, give --target org/set"),
        ("hf.co/spaces/org/tiny", "address of a space, not of a model$"),
        ("./tiny", "no such file or folder"),
        ("models/org/tiny", "no such file or folder"),
        ("org/tiny.gguf", "no such file or folder"),
    ],
)
def test_what_is_no_model_is_said_without_asking_the_hub(typed, said):
    with pytest.raises(ModelError, match=said):
        check_here(typed)
    with pytest.raises(ModelError, match=said):
        ab.load(typed)


def test_two_revisions_are_an_error():
    assert meant("org/tiny@v1", "v1") == ("org/tiny", "v1")
    with pytest.raises(ModelError, match="names the revision v1, and --revision v2"):
        meant("org/tiny@v1", "v2")


def test_a_folder_is_taken_as_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny@v1").mkdir(parents=True)
    assert meant("org/tiny@v1/") == ("org/tiny@v1/", None)


def test_a_repository_in_the_cache_points_to_its_snapshot(cached):
    with pytest.raises(ModelError, match=rf"no config.json in it; name {cached / 'snapshots' / ('a' * 40)}$"):
        check_here(str(cached))


def test_the_folder_of_a_run_points_to_its_model(tmp_path):
    save_tiny(tmp_path / "out" / "model")
    with pytest.raises(ModelError, match=rf"no config.json in it; name {tmp_path / 'out' / 'model'}$"):
        check_here(str(tmp_path / "out"))


def test_a_missing_model_is_said_before_prompts_are_fetched(tmp_path, monkeypatch):
    def fetch(*_args, **_options):
        raise AssertionError("prompts were fetched")

    for module in ("opening", "measuring", "plan"):
        monkeypatch.setattr(importlib.import_module(f"abliterate.run.{module}"), "open_prompts", fetch)
    missing = str(tmp_path / "missing")
    for command in (["run", missing], ["run", missing, "--plan"], ["measure", missing], ["audit", missing]):
        assert "no such file or folder" in abliterate(*command, "--out", tmp_path / "out").err
    assert RunSettings().prompts.target is None  # the Hub's, which would be fetched


def test_commands_name_their_outputs_after_the_id(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from abliterate.commands.run import _default_folder

    assert str(_default_folder("https://huggingface.co/org/tiny@v1")) == "tiny-abliterated"
    assert succeeds("inspect", "hf.co/org/tiny@v1", "--json").json["model"]["source"] == "org/tiny"
