"""`abliterate heal`: train an edited model back to what the edit cost it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.commands.common import (
    Baseline,
    BaselineColumn,
    ChatTemplate,
    Config,
    DeviceMap,
    Dtype,
    Json,
    JudgeOption,
    LogFile,
    MaxNewTokens,
    Overwrite,
    Prefill,
    Quiet,
    Revision,
    Seed,
    SystemPrompt,
    Target,
    TargetColumn,
    TestPrompts,
    Trust,
    ValidationPrompts,
    app,
    flags_of,
    print_result,
    reported,
    source_of,
)

if TYPE_CHECKING:
    from abliterate.commands.terminal import Terminal
    from abliterate.settings.heal import HealRunSettings

DPO_PANEL = "Preference pairs (dpo)"
SELF_PANEL = "The original's teaching (self)"
LORA_PANEL = "LoRA"
TRAINING_PANEL = "Training"
LAUNCH_PANEL = "Several processes"

HEAL_FIELDS = (
    "preset", "data", "data_split", "prompt_column", "chosen_column", "rejected_column", "most_pairs", "keep_refusals",
    "held_out", "most_held_out", "beta", "quantise", "rank", "alpha", "dropout", "target_modules", "max_length",
    "micro_batch", "accumulation", "epochs", "max_steps", "optimizer", "scheduler", "learning_rate", "warmup",
    "weight_decay", "max_grad_norm", "bf16", "gradient_checkpointing", "save_steps", "log_steps", "report_to",
    "launch", "processes",
)  # fmt: skip
SELF_FIELDS = (
    "teaching_prompts", "answer_tokens", "hold", "hold_batch", "evaluate_every", "patience", "max_refusal_rate",
)  # fmt: skip


def _option(text: str, panel: str | None, *names: str) -> Any:
    text = text.replace("[", "\\[")  # else rich takes [default: ...] for a style and leaves it out
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


@app.command(
    epilog="Example: abliterate heal demo-out --preset self --out healed                the run knows its original\n\n"
    "Example: abliterate heal ./edited --original ./model --preset self --out healed\n\n"
    "Example: abliterate heal ./edited --original ./model --out healed          DPO on mlabonne/orpo-dpo-mix-40k\n\n"
    "Example: abliterate heal ./edited --data pairs.jsonl --learning-rate 1e-5 --launch zero2 --out healed\n\n"
    "Example: abliterate heal ./edited --write-axolotl heal.yaml                the same training for Axolotl"
)
def heal(
    model: Annotated[
        str,
        typer.Argument(
            help="The edited model: folder, Hub id, GGUF file, or what `abliterate run` wrote.", show_default=False
        ),
    ],
    original: Annotated[
        str | None,
        _option(
            "The model before the edit: `self` learns from it, and all are measured against it. "
            "[default: that of the run]",
            None,
        ),
    ] = None,
    out: Annotated[Path | None, _option("Output folder. [default: NAME-healed]", None)] = None,
    preset: Annotated[
        str | None, _option("dpo: preference pairs. self: the original's teaching, no data. [default: dpo]", None)
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on with an interrupted training of the same settings.")
    ] = None,
    write_axolotl: Annotated[
        Path | None, typer.Option(help="Write the same training as an Axolotl configuration to this file, and stop.")
    ] = None,
    data: Annotated[
        str | None,
        _option("Hub data set, .jsonl, .json, .csv or .parquet. [default: mlabonne/orpo-dpo-mix-40k]", DPO_PANEL),
    ] = None,
    data_split: Annotated[str | None, _option("Its split. [default: train]", DPO_PANEL)] = None,
    prompt_column: Annotated[str | None, _option("[default: prompt]", DPO_PANEL)] = None,
    chosen_column: Annotated[str | None, _option("[default: chosen]", DPO_PANEL)] = None,
    rejected_column: Annotated[str | None, _option("[default: rejected]", DPO_PANEL)] = None,
    most_pairs: Annotated[int | None, _option("Use at most so many pairs.", DPO_PANEL)] = None,
    keep_refusals: Annotated[
        bool | None, _option("Keep pairs whose chosen answer refuses.", DPO_PANEL, "--keep-refusals")
    ] = None,
    held_out: Annotated[
        float | None, _option("Share of the pairs kept for the preference accuracy. [default: 0.05]", DPO_PANEL)
    ] = None,
    most_held_out: Annotated[int | None, _option("At most so many of them. [default: 256]", DPO_PANEL)] = None,
    beta: Annotated[
        float | None, _option("How strongly DPO holds to the edited model. [default: 0.1]", DPO_PANEL)
    ] = None,
    teaching_prompts: Annotated[
        int | None, _option("Most training prompts a side to learn from. [default: 512]", SELF_PANEL)
    ] = None,
    answer_tokens: Annotated[
        int | None, _option("Tokens of each of the original's answers. [default: 48]", SELF_PANEL)
    ] = None,
    hold: Annotated[float | None, _option("Weight of keeping refusals away. [default: 0.2]", SELF_PANEL)] = None,
    hold_batch: Annotated[int | None, _option("Refused prompts in a step. [default: 8]", SELF_PANEL)] = None,
    evaluate_every: Annotated[
        int | None, _option("Steps between looks at validation prompts. [default: 20]", SELF_PANEL)
    ] = None,
    patience: Annotated[
        int | None, _option("Stop after so many looks without a better one. [default: 3]", SELF_PANEL)
    ] = None,
    max_refusal_rate: Annotated[
        float | None, _option("Refusals on validation prompts good enough. [default: 0.05]", SELF_PANEL)
    ] = None,
    quantise: Annotated[str | None, _option("auto, 4bit (QLoRA, on CUDA) or none. [default: auto]", LORA_PANEL)] = None,
    rank: Annotated[int | None, _option("[default: 64; self 16]", LORA_PANEL)] = None,
    alpha: Annotated[float | None, _option("[default: 32; self 16]", LORA_PANEL)] = None,
    dropout: Annotated[float | None, _option("[default: 0.05; self 0]", LORA_PANEL)] = None,
    target_modules: Annotated[
        str | None, _option("all-linear, or names with commas between. [default: all-linear]", LORA_PANEL)
    ] = None,
    learning_rate: Annotated[
        float | None, _option("At its highest. [default: 5e-6; self 2e-3]", TRAINING_PANEL)
    ] = None,
    scheduler: Annotated[str | None, _option("As in transformers. [default: cosine]", TRAINING_PANEL)] = None,
    warmup: Annotated[
        float | None, _option("Steps, or below 1 their share. [default: 0.02; self 5]", TRAINING_PANEL)
    ] = None,
    epochs: Annotated[float | None, _option("[default: 1; self 2]", TRAINING_PANEL)] = None,
    max_steps: Annotated[int | None, _option("Stop after so many steps.", TRAINING_PANEL)] = None,
    micro_batch: Annotated[int | None, _option("Examples run at once. [default: 1; self 16]", TRAINING_PANEL)] = None,
    accumulation: Annotated[
        int | None, _option("Micro-batches a step adds up. [default: 8; self 1]", TRAINING_PANEL)
    ] = None,
    max_length: Annotated[int | None, _option("Most tokens of a conversation. [default: 2048]", TRAINING_PANEL)] = None,
    optimizer: Annotated[
        str | None, _option("As in transformers; auto: paged 8-bit AdamW on CUDA, AdamW elsewhere.", TRAINING_PANEL)
    ] = None,
    weight_decay: Annotated[float | None, _option("[default: 0]", TRAINING_PANEL)] = None,
    max_grad_norm: Annotated[float | None, _option("[default: 1]", TRAINING_PANEL)] = None,
    bf16: Annotated[
        str | None, _option("Arithmetic in bfloat16: auto, yes or no. [default: auto]", TRAINING_PANEL)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        _option(
            "Less memory, slower. [default: on; self where memory asks for it]",
            TRAINING_PANEL,
            "--gradient-checkpointing/--no-gradient-checkpointing",
        ),
    ] = None,
    save_steps: Annotated[
        int | None, _option("Steps between checkpoints; 0: none. [default: 100; self 20]", TRAINING_PANEL)
    ] = None,
    log_steps: Annotated[
        int | None, _option("Steps between points of the curves. [default: 1]", TRAINING_PANEL)
    ] = None,
    report_to: Annotated[
        str | None, _option("Curves beside TensorBoard's: wandb, trackio or none. [default: none]", TRAINING_PANEL)
    ] = None,
    launch: Annotated[
        str | None, _option("ddp, fsdp, zero2, zero3 or an accelerate configuration (.yaml).", LAUNCH_PANEL)
    ] = None,
    processes: Annotated[int | None, _option("How many. [default: one per GPU]", LAUNCH_PANEL)] = None,
    target: Target = None,
    baseline: Baseline = None,
    target_column: TargetColumn = None,
    baseline_column: BaselineColumn = None,
    validation_prompts: ValidationPrompts = None,
    test_prompts: TestPrompts = None,
    judge: JudgeOption = None,
    max_new_tokens: MaxNewTokens = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
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
    """Train an edited model back to what the edit cost it, and measure original, edited and healed."""
    flags = _flags(locals())
    out = out or _default_folder(model)
    with reported(quiet, log_file, None if write_axolotl else out) as terminal:
        from abliterate.settings.heal import resolve_heal

        settings = resolve_heal(flags, config)
        source = source_of(original) if original else None
        if write_axolotl is not None:
            _write_axolotl(model, out, write_axolotl, settings, terminal, overwrite, json_)
            return
        _heal(model, source, out, settings, terminal, overwrite, json_)


def _flags(values: dict[str, Any]) -> dict[str, Any]:
    """Command-line values as dotted settings names; `--quantise` and `--max-refusal-rate` are the healing's own."""
    shared = flags_of({name: value for name, value in values.items() if name not in (*HEAL_FIELDS, *SELF_FIELDS)})
    own = {f"heal.{name}": values[name] for name in HEAL_FIELDS}
    own |= {f"heal.self_teaching.{name}": values[name] for name in SELF_FIELDS}
    return shared | {name: value for name, value in own.items() if value is not None}


def _default_folder(model: str) -> Path:
    """NAME-healed here, for a model's folder (that of a run: the run's), file or Hub id."""
    path = Path(model).expanduser()
    path = path.resolve() if path.exists() else path
    name = path.parent.name if path.name == "model" and (path.parent / "results.json").is_file() else path.name
    return Path(f"{name.removesuffix('.gguf')}-healed")


def _write_axolotl(
    model: str, out: Path, file: Path, settings: HealRunSettings, terminal: Terminal, overwrite: bool, json_: bool
) -> None:
    from abliterate.heal.axolotl import write_axolotl
    from abliterate.heal.run import find_sources, work_folder
    from abliterate.heal.training import Job

    job = Job(model=find_sources(model, None).model, folder=work_folder(out), settings=settings)
    document = write_axolotl(job, file, overwrite=overwrite, reporter=terminal)
    print_result(document, json_, f"axolotl: {file}")


def _heal(
    model: str, original: str | None, out: Path, settings: HealRunSettings, terminal: Terminal, overwrite: bool,
    json_: bool,
) -> None:  # fmt: skip
    from abliterate.cards.card import measured_states, result_rows
    from abliterate.commands.terminal import output, result_table
    from abliterate.heal.run import heal as run_heal

    result = run_heal(model, out, settings, original=original, overwrite=overwrite, reporter=terminal)
    if json_:
        typer.echo(json.dumps(result.document, indent=2))
        return
    console = output()
    console.print(result_table(result_rows(result.document), measured_states(result.document)))
    for what, where in (
        ("model", out / "model"), ("adapter", out / "adapter"), ("card", out / "model" / "README.md"),
        ("results", out / "results.json"), ("report", out / "report.html"),
    ):  # fmt: skip
        console.print(f"{what + ':':<10}{where}", soft_wrap=True)
