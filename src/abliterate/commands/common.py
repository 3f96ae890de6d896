"""What the commands share: the app, the option types, settings from flags, reporting and printing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

import abliterate
from abliterate.common.errors import AbliterateError, InterruptedByUserError, OutputError

if TYPE_CHECKING:
    from abliterate.commands.terminal import Terminal
    from abliterate.settings.run import RunSettings

app = typer.Typer(
    name="abliterate",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find the direction that carries a behaviour in a language model (by default: refusing), "
    "remove it from the weights without retraining, and prove what that did.\n\n"
    "[bold]Examples[/bold]\n\n"
    "abliterate demo                      the whole job on a small real model\n\n"
    "abliterate run Qwen/Qwen3-0.6B       the same on yours\n\n"
    "abliterate inspect ./my-model        what writes to its residual stream, and the proof\n\n"
    "Exit codes: 0 done, 2 bad input or an error with a reason, 3 nothing to do, 130 interrupted, "
    "143 terminated.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(abliterate.__version__)
        raise typer.Exit


LOADING_PANEL = "Loading"
PROMPTS_PANEL = "Prompts"
SEARCH_PANEL = "Directions"
MEASURE_PANEL = "Measuring"

Model = Annotated[str, typer.Argument(help="Hub id, local folder, GGUF file, or 'demo'.", show_default=False)]
Dtype = Annotated[
    str | None,
    typer.Option(help="auto, bfloat16, float16 or float32. [default: auto]", rich_help_panel=LOADING_PANEL),
]
DeviceMap = Annotated[
    str | None, typer.Option(help="As in transformers: auto, cpu, cuda:0.", rich_help_panel=LOADING_PANEL)
]
Quantise = Annotated[str | None, typer.Option(help="4bit or 8bit, to save memory.", rich_help_panel=LOADING_PANEL)]
Revision = Annotated[str | None, typer.Option(help="Hub commit, branch or tag.", rich_help_panel=LOADING_PANEL)]
Trust = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Run model code that comes from the Hub.", rich_help_panel=LOADING_PANEL),
]
ChatTemplate = Annotated[
    str | None, typer.Option(help="Jinja file, template text, or 'chatml'.", rich_help_panel=LOADING_PANEL)
]
SystemPrompt = Annotated[
    str | None, typer.Option(help="System prompt for every prompt.", rich_help_panel=LOADING_PANEL)
]
Prefill = Annotated[
    str | None,
    typer.Option(
        help="Text every answer starts with; found by itself for reasoning models.", rich_help_panel=LOADING_PANEL
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="Prompts that show the behaviour: Hub set id[:split[:column]], 'harmful_behaviors', 'bundled', "
        "or a .txt .json .jsonl .csv .parquet file or datasets folder.",
        rich_help_panel=PROMPTS_PANEL,
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option(help="Prompts that don't show it; sources as for --target.", rich_help_panel=PROMPTS_PANEL),
]
TargetColumn = Annotated[
    str | None, typer.Option(help="Column with the target prompts.", rich_help_panel=PROMPTS_PANEL)
]
BaselineColumn = Annotated[
    str | None, typer.Option(help="Column with the baseline prompts.", rich_help_panel=PROMPTS_PANEL)
]
TrainPrompts = Annotated[
    int | None, typer.Option(help="Most prompts a side for directions. [default: 256]", rich_help_panel=PROMPTS_PANEL)
]
ValidationPrompts = Annotated[
    int | None, typer.Option(help="Most prompts a side for choosing. [default: 64]", rich_help_panel=PROMPTS_PANEL)
]
TestPrompts = Annotated[
    int | None,
    typer.Option(help="Most prompts a side for the final numbers. [default: 200]", rich_help_panel=PROMPTS_PANEL),
]
BehaviourOption = Annotated[
    str | None,
    typer.Option(
        "--behaviour",
        help="refusal, persona, slop or a FILE.toml that defines one (docs/behaviours.md). [default: refusal]",
        rich_help_panel=PROMPTS_PANEL,
    ),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        "--keep",
        help="What must not change: a file of prompts, or a recipe or safetensors file of directions.",
        rich_help_panel=SEARCH_PANEL,
    ),
]
Positions = Annotated[
    int | None,
    typer.Option(
        help="Last token positions read; by default what the template adds, at most 5.", rich_help_panel=SEARCH_PANEL
    ),
]
Filter = Annotated[
    bool | None,
    typer.Option(
        "--filter/--no-filter",
        help="Count only targets that are refused and baselines that are answered. [default: filter]",
        rich_help_panel=SEARCH_PANEL,
    ),
]
Winsorise = Annotated[
    float | None,
    typer.Option(help="Clamp activations to this quantile of their size (0.995).", rich_help_panel=SEARCH_PANEL),
]
CollectBatch = Annotated[
    int | None,
    typer.Option("--batch-size", help="Prompts per forward pass. [default: 32]", rich_help_panel=SEARCH_PANEL),
]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="lexical, classifier:PATH[:LABEL] or style:BEHAVIOUR. [default: the behaviour's]",
        rich_help_panel=MEASURE_PANEL,
    ),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Longest answer decoded. [default: 100]", rich_help_panel=MEASURE_PANEL)
]
Seed = Annotated[int | None, typer.Option(help="Seed of every shuffle and sample. [default: 0]")]
Config = Annotated[Path | None, typer.Option(help="TOML file with settings, a table per stage.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]
LogFile = Annotated[Path | None, typer.Option(help="Write the log to this file too; it is added to.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")]


# Flag names that aren't "stage.field" already.
FIELDS = {
    "load": (
        "dtype", "device_map", "quantise", "revision", "trust_remote_code", "chat_template", "system_prompt", "prefill",
    ),
    "prompts": (
        "target", "baseline", "target_column", "baseline_column", "train_prompts", "validation_prompts", "test_prompts",
    ),
    "collect": ("positions", "filter", "winsorise", "projected", "batch_size"),
    "search": (
        "method", "layers", "max_refusal_rate", "max_divergence", "steps", "rank", "trials", "study", "candidates",
        "interactive",
    ),
    "measure": ("judge", "max_new_tokens"),
    "": ("seed", "force", "keep_tied", "resume", "behaviour", "keep"),
}  # fmt: skip


def flags_of(values: dict[str, Any]) -> dict[str, Any]:
    """Command-line values as dotted settings names."""
    return {
        f"{stage}.{name}" if stage else name: values[name]
        for stage, names in FIELDS.items()
        for name in names
        if values.get(name) is not None
    }


def settings_from(flags: dict[str, Any], config: Path | None) -> RunSettings:
    from abliterate.settings.run import resolve

    return resolve(flags, config)


def source_of(model: str) -> str:
    """The model's source; 'demo' stands for the demo model."""
    if model != "demo" or Path("demo").exists():
        return model
    from abliterate.models.demo import demo_model

    return str(demo_model())


def check_free(path: Path, overwrite: bool) -> None:
    from abliterate.common.files import check_file

    check_file(path, overwrite=overwrite)


def write_json(path: Path, document: dict[str, Any]) -> None:
    from abliterate.common.files import whole_file

    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def print_result(document: dict[str, Any], json_: bool, text: str) -> None:
    typer.echo(json.dumps(document, indent=2) if json_ else text)


@contextmanager
def reported(quiet: bool, log_file: Path | None = None, out: Path | None = None) -> Iterator[Terminal]:
    """A terminal for progress, with the libraries' own chatter off.

    Args:
        quiet: print nothing about how it goes.
        log_file: write it to this file too, quiet or not; lines are added to what is there.
        out: the output of a long run, whose progress `abliterate watch` can then show.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from abliterate.commands.terminal import Terminal
    from abliterate.common.watching import ProgressFile, progress_file

    with ExitStack() as stack:
        log = stack.enter_context(_log(log_file)) if log_file else None
        published = ProgressFile(progress_file(out)) if out else None
        try:
            with Terminal(quiet=quiet, log=log, published=published) as terminal:
                try:
                    yield terminal
                except AbliterateError as error:
                    if log:
                        log.write(f"error: {error}\n")
                    raise
        except KeyboardInterrupt:  # before typer sees it, whose exit code and text depend on its version
            raise InterruptedByUserError("interrupted; nothing half-written is left") from None


def _log(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"log file {path} can't be written: {error.strerror}") from error
