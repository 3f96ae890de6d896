"""The command that repeats a run, from the settings it kept."""

from __future__ import annotations

import shlex
from pathlib import PurePath
from typing import Any

from abliterate.common.names import is_demo, public_source
from abliterate.measure.document import HealFacts, RunDocument
from abliterate.measure.judges import AND
from abliterate.report.document import Loaded

SOURCES = ("target", "baseline", "also_target", "chat_template")


def repeat_command(loaded: Loaded) -> str:
    """The command line that gives the same numbers with the same versions; files are named without their folders."""
    from abliterate.settings.options import options_of
    from abliterate.settings.run import ENVIRONMENT_PREFIX, RunSettings

    results = loaded.results
    settings = results.settings.model_dump(mode="json", exclude_unset=True)
    if results.heal:
        return _heal_command(results, results.heal, settings)
    defaults, flags = RunSettings().model_dump(), options_of(RunSettings)
    words = ["abliterate", "run" if results.recipe else "measure", model_name(results)]
    variables = []
    for stage, name, value in _flat(settings):
        default = defaults.get(stage, {}).get(name) if stage else defaults.get(name)
        has_own = name in ("judge", "method") and settings.get("behaviour", "refusal") != "refusal"  # instead of ours
        if value is None or (value == default and not has_own):
            continue
        if (f"{stage}.{name}" if stage else name) not in flags:
            variables.append(f"{ENVIRONMENT_PREFIX}{stage.upper()}__{name.upper()}={shlex.quote(str(value))}")
        else:
            words += _flag(name, value)
    if loaded.seen("activations"):
        words += ["--activations", public_source(str(loaded.seen("activations")))]
    return " ".join([*variables, *(shlex.quote(word) for word in words)])


def _heal_command(results: RunDocument, heal: HealFacts, settings: dict[str, Any]) -> str:
    """The command that heals so again; the model edited is named as it lay."""
    from abliterate.settings.heal import HealRunSettings

    healing = settings.get("heal") or {}
    preset = {"preset": healing.get("preset", "dpo")}
    defaults = HealRunSettings.model_validate({"heal": preset}).model_dump(mode="json")
    words = ["abliterate", "heal", public_source(heal.model or "MODEL")]
    if heal.original:
        words += ["--original", model_name(results)]
    words += ["--preset", preset["preset"]]
    own = healing.get("self_teaching") or {}
    flat = [("heal", name, value) for name, value in healing.items() if name not in ("preset", "self_teaching")]
    flat += [("self_teaching", name, value) for name, value in own.items()]
    flat += [entry for entry in _flat(settings) if entry[0] in ("load", "prompts", "measure")]
    flat.append(("", "seed", settings.get("seed")))
    known = {**defaults, "self_teaching": defaults["heal"]["self_teaching"]}
    for stage, name, value in flat:
        default = known[stage].get(name) if stage else defaults.get(name)
        if value != default and value is not None:
            words += _flag(name, public_source(value) if name == "data" else value)
    return " ".join(shlex.quote(word) for word in words)


def model_name(results: RunDocument) -> str:
    """The model as the command line names it."""
    name = public_source(results.model.source or "MODEL")
    return "demo" if is_demo(name) else name


def _flat(settings: dict[str, Any]) -> list[tuple[str, str, Any]]:
    flat = []
    for stage, value in settings.items():
        if isinstance(value, dict):
            flat += [(stage, name, inner) for name, inner in value.items()]
        else:
            flat.append(("", stage, value))
    return flat


def _flag(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    if value is True:
        return [option]
    if value is False:
        return ["--no-" + name.replace("_", "-")]
    text = str(value)
    if name in ("judge", "report_judge"):
        text = AND.join(map(_judge, text.split(AND)))
    elif name in SOURCES and "{" not in text:
        text = public_source(text)
    elif PurePath(text).is_absolute():
        text = PurePath(text).name
    return [option, text]


def _judge(spec: str) -> str:
    kind, colon, rest = spec.partition(":")
    return spec if kind == "llm" else f"{kind}{colon}{public_source(rest) if rest else rest}"
