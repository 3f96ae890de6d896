"""`abliterate run` and `abliterate demo`: the whole job."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.commands.common import (
    SEARCH_PANEL,
    Baseline,
    BaselineColumn,
    BehaviourOption,
    ChatTemplate,
    CollectBatch,
    Config,
    DeviceMap,
    Dtype,
    Filter,
    Json,
    JudgeOption,
    KeepOption,
    LogFile,
    MaxNewTokens,
    Model,
    Overwrite,
    Positions,
    Prefill,
    Quantise,
    Quiet,
    Revision,
    Seed,
    SystemPrompt,
    Target,
    TargetColumn,
    TestPrompts,
    TrainPrompts,
    Trust,
    ValidationPrompts,
    Winsorise,
    app,
    flags_of,
    reported,
    settings_from,
    source_of,
)
from abliterate.common.errors import AbliterateError

if TYPE_CHECKING:
    from abliterate.commands.terminal import Terminal
    from abliterate.search.sweep import Candidate
    from abliterate.settings.run import RunSettings


@app.command(
    epilog="Example: abliterate run Qwen/Qwen3-0.6B --out qwen-abliterated\n\n"
    "Example: abliterate run ./model --target bad.txt --baseline good.txt --method article --interactive\n\n"
    "Example: abliterate run ./model --behaviour persona    a melancholic voice, added to the weights\n\n"
    "Example: abliterate run ./model --plan                 what it would take here, without doing it\n\n"
    "Example: abliterate run demo --induce --out refusing   the converse: a model that refuses everything"
)
def run(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Output folder. [default: NAME-abliterated]")] = None,
    method: Annotated[
        str | None, typer.Option(help="fit, sweep, article or tpe. [default: fit]", rich_help_panel=SEARCH_PANEL)
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers searched and edited, as 4-24.", rich_help_panel=SEARCH_PANEL)
    ] = None,
    interactive: Annotated[
        bool | None,
        typer.Option(
            "--interactive", help="Choose among the article's candidates yourself.", rich_help_panel=SEARCH_PANEL
        ),
    ] = None,
    show_completions: Annotated[
        bool, typer.Option("--show-completions", help="Show answers to target prompts.", rich_help_panel=SEARCH_PANEL)
    ] = False,
    candidates: Annotated[
        int | None,
        typer.Option(help="Directions tried by the article's method. [default: 20]", rich_help_panel=SEARCH_PANEL),
    ] = None,
    max_refusal_rate: Annotated[
        float | None,
        typer.Option(
            help="Refusal rate good enough to choose by divergence. [default: 0.05]", rich_help_panel=SEARCH_PANEL
        ),
    ] = None,
    max_divergence: Annotated[
        float | None,
        typer.Option(
            help="Take the fewest refusals within this divergence, in nats, instead.", rich_help_panel=SEARCH_PANEL
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Gradient steps to the fit's first point. [default: 40]", rich_help_panel=SEARCH_PANEL),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Directions per layer in the fit. [default: 1]", rich_help_panel=SEARCH_PANEL)
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Trials of --method tpe. [default: 200]", rich_help_panel=SEARCH_PANEL)
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="Where tpe keeps its study: a journal file or sqlite:///x.db; several processes may share it.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on with an interrupted run of the same settings.")
    ] = None,
    activations: Annotated[
        Path | None,
        typer.Option(help="File from `abliterate collect`, instead of collecting.", rich_help_panel=SEARCH_PANEL),
    ] = None,
    projected: Annotated[
        bool | None,
        typer.Option("--projected", help="Take the baseline mean out of the directions.", rich_help_panel=SEARCH_PANEL),
    ] = None,
    keep_tied: Annotated[
        bool | None, typer.Option("--keep-tied", help="Edit a tied embedding and head together instead of untying.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Predict time and memory from a probe of one batch; run and write nothing.")
    ] = False,
    induce: Annotated[
        bool,
        typer.Option(
            "--induce",
            help="The converse: add the direction, so that the model refuses what it used to answer.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = False,
    force: Annotated[bool | None, typer.Option("--force", help="Go on although the model hardly refuses.")] = None,
    behaviour: BehaviourOption = None,
    keep: KeepOption = None,
    target: Target = None,
    baseline: Baseline = None,
    target_column: TargetColumn = None,
    baseline_column: BaselineColumn = None,
    train_prompts: TrainPrompts = None,
    validation_prompts: ValidationPrompts = None,
    test_prompts: TestPrompts = None,
    positions: Positions = None,
    filter: Filter = None,
    winsorise: Winsorise = None,
    batch_size: CollectBatch = None,
    judge: JudgeOption = None,
    max_new_tokens: MaxNewTokens = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantise: Quantise = None,
    revision: Revision = None,
    trust_remote_code: Trust = None,
    chat_template: ChatTemplate = None,
    system_prompt: SystemPrompt = None,
    prefill: Prefill = None,
    seed: Seed = None,
    config: Config = None,
    overwrite: Overwrite = False,
    log_file: LogFile = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Find the refusal direction, choose it by measurement, remove it from the weights, and prove the result."""
    flags = flags_of(locals())
    out = out or _default_folder(model)
    with reported(quiet, log_file, None if plan else out) as terminal:
        settings = settings_from(flags, config)
        if settings.search.interactive:
            _check_interactive(settings)
        if induce and (plan or activations is not None or show_completions or method is not None):
            raise AbliterateError("--induce has a search of its own; leave --plan, --activations, --show-completions "
                                  "and --method out")  # fmt: skip
        source = source_of(model)
        if induce:
            if settings.keep is not None:
                raise AbliterateError("--induce adds a shift and doesn't know --keep; leave it out")
            _induce(source, out, settings, terminal, overwrite, json_)
            return
        if plan:
            _plan(source, settings, terminal, activations, json_)
            return
        _run(source, out, settings, terminal, activations, overwrite, show_completions, json_)


@app.command(epilog="Example: abliterate demo --out demo-out --overwrite")
def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("demo-out"),
    test_prompts: TestPrompts = 100,
    max_new_tokens: MaxNewTokens = 64,
    seed: Seed = None,
    overwrite: Overwrite = False,
    log_file: LogFile = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """The main job on a small real model: SmolLM2-135M-Instruct with a guard that makes it refuse."""
    flags = flags_of(
        {"test_prompts": test_prompts, "max_new_tokens": max_new_tokens, "seed": seed, "train_prompts": 256,
         "validation_prompts": 60, "target": "bundled", "baseline": "bundled"}
    )  # fmt: skip
    with reported(quiet, log_file, out) as terminal:
        settings = settings_from(flags, None)
        from abliterate.models.demo import demo_model

        terminal.say("making the demo model (once; it is kept in the cache)")
        _run(str(demo_model()), out, settings, terminal, None, overwrite, False, json_)


def _plan(source: str, settings: RunSettings, terminal: Terminal, activations: Path | None, json_: bool) -> None:
    from abliterate.commands.terminal import output, plan_table
    from abliterate.run.plan import plan_run

    found = plan_run(source, settings, has_activations=activations is not None, reporter=terminal)
    if json_:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        output().print(plan_table(found.rows()))


def _induce(source: str, out: Path, settings: RunSettings, terminal: Terminal, overwrite: bool, json_: bool) -> None:
    from abliterate.cards.induced import induced_rows
    from abliterate.commands.terminal import output, result_table
    from abliterate.run.inducing import run_induce

    result = run_induce(source, out, settings, overwrite=overwrite, reporter=terminal)
    if json_:
        typer.echo(json.dumps(result.document, indent=2))
        return
    console = output()
    console.print(result_table(induced_rows(result.document)))
    model = [("model", out / "model")] if (out / "model").is_dir() else []
    for what, where in (*model, ("recipe", out / "recipe.safetensors"), ("results", out / "results.json")):
        console.print(f"{what + ':':<10}{where}", soft_wrap=True)


def _default_folder(model: str) -> Path:
    """NAME-abliterated here, for a model's folder, file or Hub id."""
    path = Path(model).expanduser()
    name = path.resolve().name if path.exists() else path.name
    return Path(f"{name.removesuffix('.gguf')}-abliterated")


def _check_interactive(settings: RunSettings) -> None:
    """Raise before any work when nobody can be asked, or nothing would be."""
    if settings.search.method != "article":
        raise AbliterateError("--interactive chooses among the article's candidates; add --method article")
    if not sys.stdin.isatty():
        raise AbliterateError("--interactive needs a terminal to ask in; leave it out to take the first that passes")


def _run(
    source: str, out: Path, settings: RunSettings, terminal: Terminal, activations: Path | None, overwrite: bool,
    show_completions: bool, json_: bool,
) -> None:  # fmt: skip
    from abliterate.cards.card import result_rows
    from abliterate.commands.terminal import output, result_table
    from abliterate.run.pipeline import run as run_pipeline

    def choose(candidates: list[Candidate], _texts: list[list[str]]) -> int:
        return _ask(terminal, candidates)

    def show(heading: str, answers: list[str]) -> None:
        terminal.say(heading)
        for answer in answers if show_completions else ():
            terminal.say(f"    {answer[:300]!r}")

    result = run_pipeline(
        source,
        out,
        settings,
        activations=activations,
        overwrite=overwrite,
        reporter=terminal,
        choose=choose,
        show=show,
        show_completions=show_completions,
    )
    if json_:
        typer.echo(json.dumps(result.document, indent=2))
        return
    console = output()
    console.print(result_table(result_rows(result.document)))
    for what, where in (
        ("model", out / "model"), ("recipe", out / "recipe.safetensors"), ("card", out / "model" / "README.md"),
        ("results", out / "results.json"), ("report", out / "report.html"),
        ("original", source),
    ):  # fmt: skip
        if what == "original" or Path(str(where)).exists():  # a style has no report
            console.print(f"{what + ':':<10}{where}", soft_wrap=True)


def _ask(terminal: Terminal, candidates: list[Candidate]) -> int:
    """Let a person choose among the article's candidates."""
    with terminal.paused():
        for index, candidate in enumerate(candidates):
            terminal.console.print(f"{index:3}  {candidate.place}, separation {candidate.separation:.2f}")
        picked = -1
        while not 0 <= picked < len(candidates):
            picked = typer.prompt("which one (--show-completions shows their answers)", default=0, type=int)
    return picked
