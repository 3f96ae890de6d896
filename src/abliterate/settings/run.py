"""Every option of every stage, checked in one place: a TOML file, then the environment, then flags."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator

from abliterate.common import toml
from abliterate.common.errors import AbliterateError
from abliterate.settings.options import Stage, is_table, option

ENVIRONMENT_PREFIX = "ABLITERATE_"


class LoadSettings(Stage):
    """How the model is loaded and prompts become conversations."""

    panel = "Loading"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", "auto, bfloat16, float16 or float32.")
    device: str | None = option(
        None, "cuda, cuda:1, mps, xpu or cpu: all of the model there.", said="the accelerators there are, else the CPU"
    )
    device_map: str | None = option(None, "Spread over devices as transformers does: auto, balanced or sequential.")
    max_memory: str | None = option(
        None, "Most weights on each device, 0=20GiB,cpu=60GiB; the rest are brought from disk for each pass."
    )
    offload_folder: str | None = option(
        None, "Where such weights are kept that the model's files don't hold as they are used.", said="in the cache"
    )
    tensor_parallel: bool = option(False, "Every matrix spread over the processes of torchrun (docs/scale.md).")
    quantise: Literal["4bit", "8bit"] | None = option(None, "4bit or 8bit, to save memory.")
    revision: str | None = option(None, "Hub commit, branch or tag.")
    trust_remote_code: bool = option(False, "Run model code that comes from the Hub.")
    chat_template: str | None = option(None, "Jinja file, template text, or 'chatml'.")
    system_prompt: str | None = option(None, "System prompt for every prompt.")
    prefill: str | None = option(None, "Text every answer starts with; found by itself for reasoning models.")
    reasoning_marks: str | None = option(
        None,
        "What opens and what closes reasoning, where it isn't known: '<ponder> </ponder>'; may be repeated.",
        several="\n",
    )

    at_stream: bool = option(
        False, "Edit the stream itself, live and in no weights: for a model whose writers can't be told."
    )

    @field_validator("reasoning_marks")
    @classmethod
    def _is_marks(cls, value: str | None) -> str | None:
        if any(len(line.split()) != 2 for line in (value or "").splitlines() if line.strip()):
            raise ValueError("should be two marks, what opens and what closes reasoning: '<ponder> </ponder>'")
        return value


class PromptSettings(Stage):
    """Where prompts come from, and how many a side each split gives."""

    panel = "Prompts"
    target: str | None = option(
        None,
        "Prompts that show the behaviour: Hub set id[/subset][:split[:column]], 'harmful_behaviors', 'bundled', "
        "'bundled-varied', a .txt .json .jsonl .csv .tsv .parquet file, a folder of them, or - for standard input.",
    )
    baseline: str | None = option(None, "Prompts that don't show it; sources as for --target.")
    target_column: str | None = option(None, "Column with the target prompts.")
    baseline_column: str | None = option(None, "Column with the baseline prompts.")
    train_prompts: int = option(256, "Most prompts a side for directions.", ge=8)
    validation_prompts: int = option(64, "Most prompts a side for choosing.", ge=4)
    test_prompts: int = option(200, "Most prompts a side for the final numbers.", ge=4)


class CollectSettings(Stage):
    """Which activations count."""

    panel = "Directions"
    positions: int | None = option(
        None, "Last token positions read; by default what the template adds, at most 5.", ge=1
    )
    filter: bool = option(True, "Count only targets that are refused and baselines that are answered.")
    winsorise: float | None = option(None, "Clamp activations to this quantile of their size (0.995).", gt=0.5, lt=1.0)
    projected: bool = option(False, "Take the baseline mean out of the directions.")
    batch_size: int = option(32, "Prompts per forward pass.", ge=1)


class SearchSettings(Stage):
    """How the edit is chosen."""

    panel = "Directions"
    method: Literal["fit", "sweep", "article", "tpe"] = option("fit", "fit, sweep, article or tpe.")
    layers: str | None = option(None, "Layers searched and edited, as 4-24.")
    max_refusal_rate: float = option(
        0.05, "Target prompts refused or evaded that are few enough, four times of five.", ge=0.0, le=1.0
    )
    max_divergence: float | None = option(
        None, "Take the fewest refusals within this divergence, in nats, instead.", ge=0.0
    )
    free_divergence: float = option(
        0.02, "Divergence in nats that nobody notices: below it, fewer refusals win.", ge=0.0
    )
    steps: int = option(16, "Gradient steps to the fit's first point.", ge=1)
    rank: int = option(1, "Directions per layer in the fit.", ge=1, le=16)
    trials: int = option(200, "Trials of --method tpe.", ge=1)
    study: str | None = option(
        None, "Where tpe keeps its study: a journal file or sqlite:///x.db; several processes may share it."
    )
    candidates: int = option(20, "Directions tried by the article's method.", ge=1)
    test_prompts: int = Field(4, ge=1)
    interactive: bool = option(False, "Choose among the article's candidates yourself.")

    @field_validator("layers")
    @classmethod
    def _is_range(cls, value: str | None) -> str | None:
        if value is not None:
            layer_range(value)
        return value


class MeasureSettings(Stage):
    """How a model is judged."""

    panel = "Measuring"
    judge: str = option(
        "lexical",
        "lexical, trained, classifier:PATH[:LABEL], llm:URL[:MODEL] or style:BEHAVIOUR; may be repeated.",
        said="the behaviour's",
        several=" + ",
    )
    report_judge: str = option("trained", "A judge that choosing never sees, for the report; as --judge, or none.")
    max_new_tokens: int = option(100, "Longest answer decoded.", ge=1)
    batch_size: int = Field(256, ge=1)


class BesideSettings(Stage):
    """What is measured besides the given sets."""

    panel = "Measuring"
    also_prompts: int = option(
        100,
        "Most prompts of each further set that is measured (bundled-varied, bundled-xstest), at most as many as "
        "--test-prompts; 0: none.",
        ge=0,
    )
    also_target: str | None = option(None, "A further target set of yours to measure; sources as for --target.")
    obligations: int = option(
        48, "Most system prompts whose keeping is counted, at most as many as --test-prompts; 0: none.", ge=0
    )
    second_turn: int = option(
        24, "Most target prompts asked once more, in a second turn behind an innocent first one; 0: none.", ge=0
    )
    think: bool = option(False, "Measure with the reasoning left open: the verdict is on what follows it.")


class RunSettings(Stage):
    """All of `abliterate run`."""

    seed: int = option(0, "Seed of every shuffle and sample.")
    force: bool = option(False, "Go on although the model hardly refuses.")
    keep_tied: bool = option(False, "Edit a tied embedding and head together instead of untying.")
    resume: bool = option(False, "Go on with an interrupted run of the same settings.")
    behaviour: str = option(
        "refusal",
        "refusal, persona, slop or a FILE.toml that defines one (docs/behaviours.md).",
        panel=PromptSettings.panel,
    )
    keep: str | None = option(
        None,
        "What must not change: a file of prompts, or a recipe or safetensors file of directions.",
        panel=SearchSettings.panel,
    )
    # no part of what a run says of itself: any number of workers gives the same
    workers: int | None = option(
        None, "Processes with a replica of the model each that share the work, here or on the cluster of --ray.",
        panel=LoadSettings.panel, ge=1, exclude=True,
    )  # fmt: skip
    ray: str | None = option(
        None, "HOST:PORT of a Ray cluster that this machine belongs to; workers run there (docs/scale.md).",
        panel=LoadSettings.panel, exclude=True,
    )  # fmt: skip
    load: LoadSettings = Field(default_factory=LoadSettings)
    prompts: PromptSettings = Field(default_factory=PromptSettings)
    collect: CollectSettings = Field(default_factory=CollectSettings)
    search: SearchSettings = Field(default_factory=SearchSettings)
    measure: MeasureSettings = Field(default_factory=MeasureSettings)
    beside: BesideSettings = Field(default_factory=BesideSettings)


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
        known = stage is not None and ("." in dotted) == is_table(stage.annotation)
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


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise AbliterateError(f"setting {part} = {tree!r} should be a table of settings, such as {dotted}")
    tree[last] = value


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise AbliterateError(f"settings file {file} not found")
    try:
        return toml.loads(file.read_text(encoding="utf-8"))
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AbliterateError(f"settings file {file} is not valid TOML: {error}") from error
