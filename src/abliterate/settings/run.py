"""Every option of every stage, checked in one place: a TOML file, then the environment, then flags."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from abliterate.common.errors import AbliterateError

ENVIRONMENT_PREFIX = "ABLITERATE_"


class Stage(BaseModel):
    """A table of settings: unknown names are errors, values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoadSettings(Stage):
    """How the model is loaded and prompts become conversations."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device_map: str | None = None
    quantise: Literal["4bit", "8bit"] | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    system_prompt: str | None = None
    prefill: str | None = None


class PromptSettings(Stage):
    """Where prompts come from, and how many a side each split gives."""

    target: str | None = None
    baseline: str | None = None
    target_column: str | None = None
    baseline_column: str | None = None
    train_prompts: int = Field(256, ge=8)
    validation_prompts: int = Field(64, ge=4)
    test_prompts: int = Field(200, ge=4)


class CollectSettings(Stage):
    """Which activations count."""

    positions: int | None = Field(None, ge=1)
    filter: bool = True
    winsorise: float | None = Field(None, gt=0.5, lt=1.0)
    projected: bool = False
    batch_size: int = Field(32, ge=1)


class SearchSettings(Stage):
    """How the edit is chosen."""

    method: Literal["fit", "sweep", "article", "tpe"] = "fit"
    layers: str | None = None
    max_refusal_rate: float = Field(0.05, ge=0.0, le=1.0)
    max_divergence: float | None = Field(None, ge=0.0)
    steps: int = Field(40, ge=1)
    rank: int = Field(1, ge=1, le=16)
    trials: int = Field(200, ge=1)
    study: str | None = None
    candidates: int = Field(20, ge=1)
    test_prompts: int = Field(4, ge=1)
    interactive: bool = False

    @field_validator("layers")
    @classmethod
    def _is_range(cls, value: str | None) -> str | None:
        if value is not None:
            layer_range(value)
        return value


class MeasureSettings(Stage):
    """How a model is judged."""

    judge: str = "lexical"
    max_new_tokens: int = Field(100, ge=1)
    batch_size: int = Field(256, ge=1)


class RunSettings(Stage):
    """All of `abliterate run`."""

    seed: int = 0
    force: bool = False
    keep_tied: bool = False
    resume: bool = False
    behaviour: str = "refusal"
    keep: str | None = None
    load: LoadSettings = Field(default_factory=LoadSettings)
    prompts: PromptSettings = Field(default_factory=lambda: PromptSettings.model_validate({}))
    collect: CollectSettings = Field(default_factory=lambda: CollectSettings.model_validate({}))
    search: SearchSettings = Field(default_factory=lambda: SearchSettings.model_validate({}))
    measure: MeasureSettings = Field(default_factory=lambda: MeasureSettings.model_validate({}))


def layer_range(text: str) -> range:
    """The layers in "4-24" (both ends counted) or "7".

    Raises:
        ValueError: when the text is neither.
    """
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
    if not match:
        raise ValueError(f"layers '{text}' should look like 4-24 or 7")
    first = int(match[1])
    last = int(match[2]) if match[2] else first
    if last < first:
        raise ValueError(f"layers '{text}' run backwards")
    return range(first, last + 1)


Settings = TypeVar("Settings", bound=RunSettings)


def resolve(
    flags: Mapping[str, Any],
    config: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
    *,
    kind: type[Settings] = RunSettings,  # type: ignore[assignment]
) -> Settings:
    """Settings from a TOML file, the environment and flags; the later wins.

    Args:
        flags: dotted names to values ("measure.max_new_tokens": 48); None values are left out.
        config: TOML file with a table per stage.
        environment: variables such as ABLITERATE_MEASURE__MAX_NEW_TOKENS; `os.environ` by default.
        kind: the settings wanted; a command with a stage of its own adds it in a subclass.

    Raises:
        AbliterateError: on an unreadable file, an unknown name or a value out of range; names it.
    """
    merged: dict[str, Any] = _read_toml(config) if config else {}
    for name, value in (os.environ if environment is None else environment).items():
        dotted = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        stage = kind.model_fields.get(dotted.split(".")[0])
        known = stage is not None and ("." in dotted) == _is_table(stage.annotation)
        if name.startswith(ENVIRONMENT_PREFIX) and known:
            _put(merged, dotted, value)
    for dotted, value in flags.items():
        if value is not None:
            _put(merged, dotted, value)
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AbliterateError(
            f"setting {where} = {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
        ) from error


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise AbliterateError(f"setting {part} = {tree!r} should be a table of settings, such as {dotted}")
    tree[last] = value


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    file = Path(path)
    if not file.is_file():
        raise AbliterateError(f"settings file {file} not found")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AbliterateError(f"settings file {file} is not valid TOML: {error}") from error
