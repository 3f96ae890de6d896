"""What the commands share: the app, what a model is called, and writing results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.common.names import is_local, pasted
from abliterate.common.version import __version__

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
    "Exit codes: 0 done, 2 bad input or an error with a reason, 3 nothing to do, 70 unforeseen, 130 interrupted, "
    "143 terminated.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


Model = Annotated[str, "Hub id, local folder, GGUF file, or 'demo'."]


def source_of(model: str) -> str:
    """The model's source; 'demo' stands for the demo model."""
    if model != "demo" or Path("demo").exists():
        return model if is_local(model) else pasted(model)
    from abliterate.models.demo import demo_model

    return str(demo_model())
