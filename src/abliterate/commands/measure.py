"""`abliterate collect` and `abliterate measure`: single stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.commands.common import (
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
    Winsorise,
    app,
    check_free,
    flags_of,
    print_result,
    reported,
    settings_from,
    source_of,
    write_json,
)

if TYPE_CHECKING:
    pass


@app.command(epilog="Example: abliterate collect ./model --out acts.safetensors --target bundled --baseline bundled")
def collect(
    model: Model,
    out: Annotated[Path, typer.Option(help="File to write.")],
    keep_vectors: Annotated[bool, typer.Option("--keep-vectors", help="Keep every prompt's activations too.")] = False,
    behaviour: BehaviourOption = None,
    target: Target = None,
    baseline: Baseline = None,
    target_column: TargetColumn = None,
    baseline_column: BaselineColumn = None,
    train_prompts: TrainPrompts = None,
    positions: Positions = None,
    filter: Filter = None,
    winsorise: Winsorise = None,
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
) -> None:
    """Save the statistics of the residual stream on both sides' prompts, for `run --activations`."""
    flags = flags_of(locals())
    with reported(quiet, log_file) as terminal:
        settings = settings_from(flags, config)
        check_free(out, overwrite)
        from abliterate.run.pipeline import collect_to_file

        summary = collect_to_file(source_of(model), out, settings, keep_vectors=keep_vectors, reporter=terminal)
    print_result(summary, json_, f"activations: {out}")


@app.command(epilog="Example: abliterate measure ./edited --original ./model --target bundled --baseline bundled")
def measure(
    model: Model,
    original: Annotated[str | None, typer.Option(help="The model to compare with; gives the divergence.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result to this file as JSON.")] = None,
    behaviour: BehaviourOption = None,
    target: Target = None,
    baseline: Baseline = None,
    target_column: TargetColumn = None,
    baseline_column: BaselineColumn = None,
    test_prompts: TestPrompts = None,
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
    """Count refusals, over-refusals and degenerate answers on held-out prompts, and the divergence from an original."""
    flags = flags_of(locals())
    with reported(quiet, log_file) as terminal:
        settings = settings_from(flags, config)
        if out is not None:
            check_free(out, overwrite)
        from abliterate.run.pipeline import measure_models

        first = source_of(original) if original else None
        document = measure_models(source_of(model), first, settings, reporter=terminal)
        if out is not None:
            write_json(out, document)
    if json_:
        typer.echo(json.dumps(document, indent=2))
    else:
        from abliterate.commands.terminal import measurement_table, output

        output().print(measurement_table(document))
