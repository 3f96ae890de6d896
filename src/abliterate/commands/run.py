"""`abliterate run` and `abliterate demo`: the whole job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.commands.common import Model, source_of
from abliterate.commands.options import Given, Output, command
from abliterate.common.errors import AbliterateError
from abliterate.settings.run import RunSettings, SearchSettings

if TYPE_CHECKING:
    from abliterate.commands.terminal import Terminal
    from abliterate.search.sweep import Candidate


@command(
    "search collect keep behaviour prompts measure beside load workers ray resume keep_tied force seed config",
    "abliterate run Qwen/Qwen3-0.6B --out qwen-abliterated",
    "abliterate run ./model --target bad.txt --baseline good.txt --method article --interactive",
    "abliterate run ./model --behaviour persona    a melancholic voice, added to the weights",
    "abliterate run ./model --plan                 what it would take here, without doing it",
    "abliterate run demo --induce --out refusing   the converse: a model that refuses everything",
)
def run(
    model: Model,
    *,
    out: Annotated[Path | None, "Output folder. [default: NAME-abliterated]"] = None,
    plan: Annotated[bool, "Predict memory from the config, and time from one batch; run and write nothing."] = False,
    given: Given[RunSettings],
    show_completions: Annotated[bool, "Show answers to target prompts.", SearchSettings.panel] = False,
    activations: Annotated[
        Path | None, "File from `abliterate collect`, instead of collecting.", SearchSettings.panel
    ] = None,
    induce: Annotated[
        bool, "The converse: add the direction, so that the model refuses what it used to answer.", SearchSettings.panel
    ] = False,
    io: Output,
) -> None:
    """Find the refusal direction, choose it by measurement, remove it from the weights, and prove the result."""
    out = out or _default_folder(model)
    with io.reported(None if plan else out) as terminal:
        settings = given.settings()
        if settings.search.interactive:
            _check_interactive(settings)
        if induce and (plan or activations is not None or show_completions or "search.method" in given.flags):
            raise AbliterateError("--induce has a search of its own; leave --plan, --activations, --show-completions "
                                  "and --method out")  # fmt: skip
        if induce and (settings.keep or settings.beside.also_target):
            raise AbliterateError("--induce adds a shift and doesn't know --keep or --also-target; leave them out")
        source = source_of(model)
        if induce:
            _induce(source, out, settings, terminal, io)
        elif plan:
            _plan(source, settings, terminal, activations, io)
        else:
            _run(source, out, settings, terminal, io, activations, show_completions)


@command(
    "prompts.test_prompts measure.max_new_tokens seed",
    "abliterate demo --out demo-out --overwrite",
    under={
        "prompts.test_prompts": 100, "measure.max_new_tokens": 64, "prompts.train_prompts": 256,
        "prompts.validation_prompts": 60, "prompts.target": "bundled", "prompts.baseline": "bundled",
        "beside.also_prompts": 40, "beside.obligations": 16, "beside.second_turn": 16,
    },
)  # fmt: skip
def demo(
    *,
    out: Annotated[Path, "Output folder."] = Path("demo-out"),
    given: Given[RunSettings],
    io: Output,
) -> None:
    """The main job on a small real model: SmolLM2-135M-Instruct with a guard that makes it refuse."""
    with io.reported(out) as terminal:
        settings = given.settings()
        from abliterate.models.demo import demo_model

        terminal.say("making the demo model (once; it is kept in the cache)")
        terminal.say("it is a toy of 135M parameters and knows little: its poor French isn't the edit's fault")
        _run(str(demo_model()), out, settings, terminal, io)


def _plan(source: str, settings: RunSettings, terminal: Terminal, activations: Path | None, io: Output) -> None:
    from abliterate.commands.terminal import rows_table
    from abliterate.run.plan import plan_run

    found = plan_run(source, settings, has_activations=activations is not None, reporter=terminal)
    tables = [rows_table(found.rows(), ("", "planned"), "what the run would take here")]
    if found.needs:
        tables.append(
            rows_table(found.needs.rows(), ("memory", "takes", "how it is run"), "memory, from the config alone")
        )
    io.result(found.to_json(), *tables, *found.notes)


def _induce(source: str, out: Path, settings: RunSettings, terminal: Terminal, io: Output) -> None:
    from abliterate.commands.terminal import places, run_result
    from abliterate.run.pipeline import run_induce

    document = run_induce(source, out, settings, overwrite=io.overwrite, reporter=terminal).document
    written = places(out, model="model", recipe="recipe.safetensors", results="results.json", report="report.html")
    io.result(document, *run_result(document), written)


def _default_folder(model: str) -> Path:
    """NAME-abliterated here, for a model's folder, file or Hub id."""
    from abliterate.models.folders import meant

    path = Path(meant(model)[0]).expanduser()
    name = path.resolve().name if path.exists() else path.name
    return Path(f"{name.removesuffix('.gguf')}-abliterated")


def _check_interactive(settings: RunSettings) -> None:
    """Raise before any work when nobody can be asked, or nothing would be."""
    if settings.search.method != "article":
        raise AbliterateError("--interactive chooses among the article's candidates; add --method article")
    if not sys.stdin.isatty():
        raise AbliterateError("--interactive needs a terminal to ask in; leave it out to take the first that passes")


def _run(
    source: str, out: Path, settings: RunSettings, terminal: Terminal, io: Output,
    activations: Path | None = None, show_completions: bool = False,
) -> None:  # fmt: skip
    from abliterate.commands.terminal import places, run_result
    from abliterate.run.pipeline import run as run_pipeline

    def show(heading: str, answers: list[str]) -> None:
        terminal.say(heading)
        for answer in answers if show_completions else ():
            terminal.say(f"    {answer[:300]!r}")

    result = run_pipeline(
        source, out, settings, activations=activations, overwrite=io.overwrite, reporter=terminal,
        choose=lambda candidates, _texts: _ask(terminal, candidates), show=show, show_completions=show_completions,
    )  # fmt: skip
    written = places(
        out, model="model", recipe="recipe.safetensors", card="model/README.md", results="results.json",
        report="report.html", original=source,
    )  # fmt: skip
    io.result(result.document, *run_result(result.document), written)


def _ask(terminal: Terminal, candidates: list[Candidate]) -> int:
    """Let a person choose among the article's candidates."""
    with terminal.paused():
        for index, candidate in enumerate(candidates):
            terminal.console.print(f"{index:3}  {candidate.place}, separation {candidate.separation:.2f}")
        picked = -1
        while not 0 <= picked < len(candidates):
            picked = typer.prompt("which one (--show-completions shows their answers)", default=0, type=int)
    return picked
