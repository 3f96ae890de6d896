"""`abliterate bench`: lm-evaluation-harness on models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.commands.common import (
    LOADING_PANEL,
    Config,
    DeviceMap,
    Dtype,
    Json,
    LogFile,
    Overwrite,
    Prefill,
    Quantise,
    Quiet,
    Revision,
    SystemPrompt,
    Trust,
    app,
    flags_of,
    print_result,
    reported,
    settings_from,
    source_of,
)
from abliterate.common.errors import AbliterateError


@app.command(
    epilog="Example: abliterate bench original=Qwen/Qwen3-0.6B edited=./Qwen3-0.6B-abliterated/model --out bench\n\n"
    "Example: abliterate bench demo --recipe recipe.safetensors --suite quick --out bench\n\n"
    "Example: abliterate bench ./model ./healed --suite openllm --limit 100 --out bench --card"
)
def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Models, PEFT adapters or recipes, [NAME=]PATH; the first is the reference, and what adapters and "
            "recipes are applied to.",
            show_default=False,
            metavar="MODEL",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("bench-out"),
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="quick, openllm, openllm2, nous, or any task of lm-evaluation-harness; several by commas or by "
            "repeating. [default: quick]",
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="The first model with this recipe, [NAME=]FILE, as one more column; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items of each task.")] = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Worked examples before each question, instead of the suite's.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Rows at a time; auto goes by tokens and memory.")] = "auto",
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Format questions as a chat. By default openllm and nous don't, as their leaderboards didn't; "
            "openllm2 does where the reference has a template; quick does for its instructions.",
        ),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Put the results into README.md of the models' folders, the reference's not.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run everything anew, whatever is in the cache.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Where scores are kept. [default: ~/.cache/abliterate/bench]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Apply a recipe made for a model of another config.")] = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantise: Quantise = None,
    revision: Revision = None,
    trust_remote_code: Trust = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="Jinja file, template text, or 'chatml'.", rich_help_panel=LOADING_PANEL),
    ] = None,
    system_prompt: SystemPrompt = None,
    prefill: Prefill = None,
    config: Config = None,
    overwrite: Overwrite = False,
    log_file: LogFile = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Benchmark models side by side, and say which differences are more than chance; done tasks are remembered."""
    flags = flags_of(
        {"dtype": dtype, "device_map": device_map, "quantise": quantise, "revision": revision, "prefill": prefill,
         "trust_remote_code": trust_remote_code, "chat_template": template, "system_prompt": system_prompt}
    )  # fmt: skip
    rows = _batch_size(batch_size)
    with reported(quiet, log_file, out) as terminal:
        from abliterate.bench.cards import write_cards
        from abliterate.bench.models import contestants
        from abliterate.bench.run import BenchOptions
        from abliterate.bench.run import bench as run_bench

        settings = settings_from(flags, config)
        columns = contestants([_demo(text) for text in models], recipe or ())
        options = BenchOptions(
            tuple(suite or ("quick",)), limit, few_shot, rows, chat_template, fresh, force, store=cache
        )
        result = run_bench(columns, out, options, settings=settings.load, overwrite=overwrite, reporter=terminal)
        cards = write_cards(result, columns) if card else []
        for file in cards:
            terminal.say(f"card: {file}")
    print_result(result.document, json_, f"{result.text}\nresults: {out}")


def _demo(text: str) -> str:
    """A contestant with the demo model's folder where it says demo."""
    label, _, place = text.rpartition("=")
    if place != "demo":
        return text
    return f"{label or 'demo'}={source_of('demo')}"


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise AbliterateError(f"--batch-size {text} should be auto or a number of rows")
    return int(text)
