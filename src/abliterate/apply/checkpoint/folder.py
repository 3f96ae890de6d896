"""A model's folder besides its weights: where it is, its config, and the files that go along with it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from abliterate.common.errors import ModelError, shorten
from abliterate.edit.recipe import Recipe, check_model, config_hash
from abliterate.models.shards import INDEX

# Weights in other formats, and what tells where in them a tensor is: they would be the unedited model's.
OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|ot|tflite)"
    r"|(pytorch_)?model.*\.bin|consolidated.*\.bin|pytorch_model.*\.bin\.index\.json|.*\.safetensors\.index\.json"
)
_LANGUAGE_MODEL = ("text_config", "llm_config", "language_config")  # fields that hold its config in a larger model's
NOT_COPIED = {".git", ".cache", ".gitattributes"}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelError: when it is missing or no JSON object, or the folder holds an adapter.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"model folder {folder} holds a PEFT adapter; merge it into its model first, then edit that")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model folder {folder}: there is no config.json in it; name the model's folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {shorten(str(error))}; nothing was written, get it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is damaged: it is not an object; nothing was written, get it again")
    return config


def check_config(recipe: Recipe, folder: Path, *, force: bool) -> None:
    """Raise RecipeError when the recipe was made for a model of another config (`recipe.check_model`)."""
    if force or not recipe.model.get("config_hash"):
        return
    if recipe.model.get("config_file_hash") == config_hash(read_config(folder)):
        return  # the very file that the recipe was made for; importing transformers takes longer than copying GiBs
    from transformers import AutoConfig

    from abliterate.models.pretrained import from_pretrained, wants_own_code

    try:
        config = from_pretrained(AutoConfig, folder)
    except Exception as error:
        if wants_own_code(error):
            raise ModelError(
                f"model folder {folder} comes with code of its own, which isn't run to read its config; --force "
                "applies the recipe without comparing it"
            ) from error
        raise ModelError(
            f"model folder {folder}: its config.json can't be used: {shorten(str(error), 200)}; --force applies the "
            "recipe without comparing it"
        ) from error
    check_model(recipe, config_hash(config.to_dict()), force=force)


def config_levels(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config, and the configs of the model's parts that are in it."""
    yield config
    yield from (value for value in config.values() if isinstance(value, dict))


def config_with(config: dict[str, Any], field: str, value: bool, *, everywhere: bool = False) -> dict[str, Any]:
    """The config with a field of the language model's set, or with `everywhere` of the whole model's too."""
    parts = [key for key in _LANGUAGE_MODEL if isinstance(config.get(key), dict)]
    changed = {**config, **{key: {**config[key], field: value} for key in parts}}
    return {**changed, field: value} if everywhere or not parts else changed


def other_files(folder: Path, made: set[str]) -> tuple[list[Path], list[str]]:
    """What else is in a folder: files to copy, and files with weights that are left out; relative to it.

    Links are followed: a Hub cache's snapshot is made of them.

    Args:
        folder: the model's.
        made: names of files that are written otherwise.
    """
    copies: list[Path] = []
    left_out: list[Path] = []
    for base, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        folders[:] = [
            f for f in folders if f not in NOT_COPIED and not real.startswith(os.path.realpath(Path(base, f)) + os.sep)
        ]
        for file in sorted(files):
            relative = Path(base, file).relative_to(folder)
            if str(relative) in made or file in NOT_COPIED or not (folder / relative).is_file():
                continue
            if file.startswith(".") and file.endswith((".tmp", ".abliterate-new")):
                continue  # what a killed process left
            taken = str(relative) == INDEX or not OTHER_WEIGHTS.fullmatch(file)
            (copies if taken else left_out).append(relative)
    return sorted(copies), sorted(map(str, left_out))
