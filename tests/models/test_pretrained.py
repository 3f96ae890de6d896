"""Code that lies beside a model is run only where --trust-remote-code says so; nobody is asked at a terminal."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch

import abliterate
from abliterate.apply.forms import ApplyOptions, apply_recipe
from abliterate.common.errors import ModelError
from abliterate.common.reporting import Silent
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe
from abliterate.measure.judges import make_judge
from abliterate.models.loading import load
from abliterate.models.stored import skeleton

DOWN = "model.layers.1.mlp.down_proj.weight"
LOADERS = {"from_pretrained", "from_config", "get_config_dict", "pipeline", "from_pretrained_config"}


def test_no_other_module_calls_a_loader():
    root = Path(abliterate.__file__).parent
    found = []
    for file in sorted(root.rglob("*.py")):
        if file == root / "models" / "pretrained.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            method = isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS
            if method or (isinstance(node.func, ast.Name) and node.func.id == "pipeline"):
                found.append(f"{file.relative_to(root)}:{node.lineno}")
    assert found == []


def test_the_door_always_says_whether_code_is_trusted():
    from abliterate.models import pretrained

    said = {}

    class Kind:
        from_pretrained = from_config = staticmethod(lambda _, **options: said.update(options))

    for call in (pretrained.from_pretrained, pretrained.from_config):
        call(Kind, "x")
        assert said.pop("trust_remote_code") is False
    pretrained.from_pretrained(Kind, "x", trust_remote_code=True)
    assert said == {"trust_remote_code": True}


@pytest.fixture
def with_code(tiny_folder, tmp_path, monkeypatch):
    """A folder that only its own code can load, which writes the file `ran`; at a terminal, all answers are yes."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).write_text('x')\nfrom transformers import LlamaConfig\n"
        "class ZorkConfig(LlamaConfig):\n    model_type = 'zork'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "zork", "auto_map": {"AutoConfig": "code.ZorkConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    yield folder
    assert not ran.exists()


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
def test_apply_refuses_a_folder_with_code_of_its_own(with_code, tmp_path, plan, form):
    recipe = Recipe(Edit.from_names({DOWN: 1.0}, torch.ones(32)), {"config_hash": "a" * 64})
    with pytest.raises(ModelError, match="comes with code of its own"):
        apply_recipe(recipe, str(with_code), tmp_path / "out", form, ApplyOptions(plan=plan), Silent())
    assert not (tmp_path / "out").exists()


def test_loading_refuses_it(with_code):
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load(with_code)
    with pytest.raises(ModelError, match="comes with code of its own"):
        skeleton(with_code)


def test_the_classifier_judge_refuses_it(with_code):
    with pytest.raises(ModelError, match="comes with code of its own"):
        make_judge(f"classifier:{with_code}")
