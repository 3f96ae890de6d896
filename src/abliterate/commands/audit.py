"""`abliterate audit`: how strongly a model's guard resists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from abliterate.commands.common import (
    Baseline,
    BaselineColumn,
    ChatTemplate,
    CollectBatch,
    Config,
    DeviceMap,
    Dtype,
    Json,
    JudgeOption,
    LogFile,
    Model,
    Overwrite,
    Prefill,
    Quantise,
    Quiet,
    Revision,
    Seed,
    SystemPrompt,
    Target,
    TargetColumn,
    Trust,
    app,
    flags_of,
    reported,
    source_of,
)

AUDIT_PANEL = "Auditing"


@app.command(
    epilog="Example: abliterate audit ./model --out model-audit\n\n"
    "Example: abliterate audit ./model --target bad.txt --baseline good.txt --out model-audit --quick"
)
def audit(
    model: Model,
    out: Annotated[Path, typer.Option(help="Output folder.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts, steps and points.")] = False,
    fit: Annotated[
        bool | None,
        typer.Option("--fit/--no-fit", help="Trace the frontier of fitted edits. [default: fit]",
                     rich_help_panel=AUDIT_PANEL),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Gradient steps to its first point. [default: 24]", rich_help_panel=AUDIT_PANEL)
    ] = None,
    max_directions: Annotated[
        int | None,
        typer.Option(help="Most directions taken out together. [default: 3]", rich_help_panel=AUDIT_PANEL),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(help="Draws of prompts for each number of them. [default: 3]", rich_help_panel=AUDIT_PANEL),
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(help="Longest answer decoded. [default: 32]", rich_help_panel=AUDIT_PANEL)
    ] = None,
    train_prompts: Annotated[
        int | None, typer.Option(help="Most prompts a side for directions. [default: 128]", rich_help_panel="Prompts")
    ] = None,
    validation_prompts: Annotated[
        int | None, typer.Option(help="Most prompts a side for choosing. [default: 48]", rich_help_panel="Prompts")
    ] = None,
    test_prompts: Annotated[
        int | None, typer.Option(help="Most prompts a side for the numbers. [default: 100]", rich_help_panel="Prompts")
    ] = None,
    force: Annotated[bool | None, typer.Option("--force", help="Go on although the model hardly refuses.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on with an interrupted audit of the same settings.")
    ] = None,
    target: Target = None,
    baseline: Baseline = None,
    target_column: TargetColumn = None,
    baseline_column: BaselineColumn = None,
    batch_size: CollectBatch = None,
    judge: JudgeOption = None,
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
) -> None:  # fmt: skip
    """Say how little it takes to undo a model's guard: divergence, directions, layers and prompts needed.

    For those who must defend a model. The model is not changed, no answer is kept, and nothing but numbers is written.
    """
    given = {**locals(), "steps": None}  # `steps` is the audit's own here
    flags = flags_of(given) | {f"audit.{name}": value for name, value in (
        ("fit", fit), ("steps", steps), ("max_directions", max_directions), ("draws", draws),
        ("answer_tokens", answer_tokens),
    ) if value is not None}  # fmt: skip
    with reported(quiet, log_file, out) as terminal:
        from abliterate.audit import audit as run_audit
        from abliterate.audit.text import table_rows
        from abliterate.commands.terminal import output
        from abliterate.settings.audit import QUICK, AuditRunSettings
        from abliterate.settings.run import resolve

        settings = resolve({**(QUICK if quick else {}), **flags}, config, kind=AuditRunSettings)
        document = run_audit(source_of(model), out, settings, overwrite=overwrite, reporter=terminal)
    if json_:
        typer.echo(json.dumps(document, indent=2))
        return
    from rich.table import Table

    table = Table(title="how strongly the guard resists", title_style="bold")
    for heading in ("", "", "refused"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in table_rows(document):
        table.add_row(*row)
    console = output()
    console.print(table)
    for what, name in (("audit", "audit.md"), ("numbers", "audit.json")):
        console.print(f"{what + ':':<10}{out / name}", soft_wrap=True)
