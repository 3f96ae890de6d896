"""`abliterate bench`: lm-evaluation-harness on models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.commands.common import source_of
from abliterate.commands.options import Given, Output, command
from abliterate.common.errors import AbliterateError
from abliterate.settings.run import RunSettings


@command(
    "load -load.tensor_parallel -load.chat_template load.chat_template=template config",
    "abliterate bench original=Qwen/Qwen3-0.6B edited=./Qwen3-0.6B-abliterated/model --out bench",
    "abliterate bench demo --recipe recipe.safetensors --suite quick --out bench",
    "abliterate bench ./model ./healed --suite openllm --limit 100 --out bench --card",
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
    *,
    out: Annotated[Path, "Output folder."] = Path("bench-out"),
    suite: Annotated[
        list[str] | None,
        "quick, openllm, openllm2, nous, or any task of lm-evaluation-harness; several by commas or by "
        "repeating. [default: quick]",
    ] = None,
    recipe: Annotated[
        list[str] | None, "The first model with this recipe, [NAME=]FILE, as one more column; may be repeated."
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items of each task.")] = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Worked examples before each question, instead of the suite's.")
    ] = None,
    batch_size: Annotated[str, "Rows at a time; auto goes by tokens and memory."] = "auto",
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Format questions as a chat. By default openllm and nous don't, as their leaderboards didn't; "
            "openllm2 does where the reference has a template; quick does for its instructions.",
        ),
    ] = None,
    card: Annotated[bool, "Put the results into README.md of the models' folders, the reference's not."] = False,
    fresh: Annotated[bool, "Run everything anew, whatever is in the cache."] = False,
    cache: Annotated[Path | None, "Where scores are kept. [default: ~/.cache/abliterate/bench]"] = None,
    force: Annotated[bool, "Apply a recipe made for a model of another config."] = False,
    given: Given[RunSettings],
    io: Output,
) -> None:
    """Benchmark models side by side, and say which differences are more than chance; done tasks are remembered."""
    rows = _batch_size(batch_size)
    with io.reported(out) as terminal:
        from abliterate.bench.cards import write_cards
        from abliterate.bench.models import contestants
        from abliterate.bench.run import BenchOptions
        from abliterate.bench.run import bench as run_bench

        settings = given.settings()
        columns = contestants([_demo(text) for text in models], recipe or ())
        options = BenchOptions(
            tuple(suite or ("quick",)), limit, few_shot, rows, chat_template, fresh, force, store=cache
        )
        result = run_bench(columns, out, options, settings=settings.load, overwrite=io.overwrite, reporter=terminal)
        cards = write_cards(result, columns) if card else []
        for file in cards:
            terminal.say(f"card: {file}")
    io.result(result.document, f"{result.text}\nresults: {out}")


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
