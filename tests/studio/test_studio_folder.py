"""Nothing outside the chosen folder is read or written: dots, absolute paths, links, and what files name."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from abliterate.common.errors import AbliterateError, OutputError, RecipeError
from abliterate.edit.recipe import MOST_BYTES
from abliterate.studio.folder import MOST_PROMPT_BYTES, Folder


@pytest.fixture
def outside(served):
    """What lies beside the folder: a model, a recipe, prompts and a run."""
    elsewhere = served.parent / "elsewhere"
    shutil.copytree(served, elsewhere)
    return elsewhere


@pytest.fixture
def folder(served):
    return Folder(served)


def ways(outside, served, name):
    """Names of a thing outside, as a page could send them."""
    (served / f"link-{name}").symlink_to(outside / name)
    if not (served / "up").exists():
        (served / "up").symlink_to(outside)
    return [f"../elsewhere/{name}", f"model/../../elsewhere/{name}", str(outside / name), f"link-{name}", f"up/{name}"]


def test_what_is_inside_is_found(folder, served):
    assert folder.model("model") == str(served / "model")
    assert folder.model(str(served / "model")) == str(served / "model")
    assert folder.recipe("recipe.safetensors") == served / "recipe.safetensors"
    assert folder.recipe("out") == served / "out" / "recipe.safetensors"
    assert folder.run("out") == served / "out"
    assert folder.prompts("prompts.txt") == str(served / "prompts.txt")
    assert folder.output("new/recipe", ".safetensors") == served / "new" / "recipe.safetensors"
    assert folder.models() == ["model", "out/model"]
    assert folder.recipes() == [
        "recipe.safetensors", "out/recipe.safetensors", "out/frontier/00.safetensors", "out/frontier/01.safetensors",
    ]  # fmt: skip
    assert folder.runs() == ["out"]
    assert [folder.run_of(name) for name in ("out/frontier/01.safetensors", "out", "recipe.safetensors", "none")] == [
        "out", "out", None, None,
    ]  # fmt: skip


def test_what_is_outside_is_not(folder, served, outside):
    for way in ways(outside, served, "model"):
        with pytest.raises(AbliterateError, match="outside the studio's folder"):
            folder.model(way)
    for way in ways(outside, served, "recipe.safetensors"):
        with pytest.raises(AbliterateError, match="outside"):
            folder.recipe(way)
        with pytest.raises(AbliterateError, match="outside"):
            folder.output(way)
    for way in ways(outside, served, "prompts.txt"):
        with pytest.raises(AbliterateError, match="outside"):
            folder.prompts(way)
        with pytest.raises(AbliterateError, match="outside"):
            folder.prompts(f"{way}:text")
    for way in ways(outside, served, "out"):
        with pytest.raises(AbliterateError, match="outside"):
            folder.run(way)
    assert not [
        name for name in (*folder.models(), *folder.recipes(), *folder.runs()) if "link" in name or "up" in name
    ]


def test_a_new_name_behind_a_link_is_outside(folder, served, outside):
    (served / "up").symlink_to(outside)
    (served / "dangling.safetensors").symlink_to(outside / "new.safetensors")
    for name in ("up/new.safetensors", "dangling.safetensors", "dangling", "../new.safetensors"):
        with pytest.raises(AbliterateError, match="outside"):
            folder.output(name, ".safetensors")


def test_a_model_whose_files_lead_outside(folder, served, outside):
    weights = served / "model" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / "model" / "model.safetensors")
    with pytest.raises(AbliterateError, match="outside"):
        folder.model("model")
    weights.unlink()
    index = served / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../elsewhere/model/model.safetensors"}}))
    with pytest.raises(AbliterateError, match="names files that aren't beside it"):
        folder.model("model")
    index.unlink()
    (served / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(outside)}))
    with pytest.raises(AbliterateError, match="adapter"):
        folder.model("model")


def test_a_run_that_names_recipes_outside(folder, served):
    results = served / "out" / "results.json"
    document = json.loads(results.read_text())
    document["frontier"][0]["recipe"] = "../../elsewhere/recipe.safetensors"
    results.write_text(json.dumps(document))
    with pytest.raises(AbliterateError, match="outside"):
        folder.run("out")


def test_a_hub_id_is_no_path(folder, served, outside, monkeypatch):
    assert folder.model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert folder.prompts("bundled") == "bundled"
    assert folder.prompts("mlabonne/harmful_behaviors:train:text") == "mlabonne/harmful_behaviors:train:text"
    monkeypatch.chdir(outside.parent)  # where the same words are a folder of the process's
    with pytest.raises(AbliterateError, match="no Hub id"):
        folder.model("elsewhere/model")
    for name in ("-oops", "a/b/c", "~/x", "x..y", "http://host/x", "--out=/x"):
        with pytest.raises(AbliterateError):
            folder.model(name)
        with pytest.raises(AbliterateError):
            folder.prompts(name)


def test_names_that_are_none(folder):
    for name in ("", " ", "a\0b", "a\nb", "x" * 5000):
        with pytest.raises(AbliterateError) as caught:
            folder.within(name)
        assert len(str(caught.value)) < 200


def test_hidden_files_and_the_folder_itself_are_not_written(folder):
    for name in (".ssh", "a/.b/c", ".", "model/.."):
        with pytest.raises(OutputError):
            folder.output(name)


def test_types_and_sizes(folder, served):
    (served / "prompts.py").write_text("x")
    with pytest.raises(AbliterateError, match=r"not a \.txt or \.jsonl or \.csv file"):
        folder.prompts("prompts.py")
    with pytest.raises(RecipeError, match=r"not a \.safetensors file"):
        folder.recipe("prompts.txt")
    for name, most, ask in (
        ("big.txt", MOST_PROMPT_BYTES, folder.prompts),
        ("big.safetensors", MOST_BYTES, folder.recipe),
    ):
        with open(served / name, "wb") as file:
            os.truncate(file.fileno(), most + 1)
        with pytest.raises(AbliterateError, match="at most"):
            ask(name)


def test_what_the_command_line_named_may_lie_anywhere(served, outside):
    folder = Folder(served, {"theirs": str(outside / "model"), "r.safetensors": str(outside / "recipe.safetensors")})
    assert folder.model("theirs") == str(outside / "model")
    assert folder.recipe("r.safetensors") == outside / "recipe.safetensors"
    assert folder.models()[0] == "theirs"
    assert folder.recipes()[0] == "r.safetensors"
