"""`abliterate watch`: how a run goes, from another terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.commands.options import Output, command
from abliterate.common.errors import AbliterateError, InterruptedByUserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from abliterate.common.watching import Progress

SHOWN_LINES = 12


@command("", "abliterate watch qwen-abliterated", shares="json")
def watch(
    out: Annotated[Path, "Output folder of a run that goes on."],
    *,
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for a run that hasn't begun.")] = 0.0,
    once: Annotated[bool, "Show where it is and leave."] = False,
    io: Output,
) -> None:
    """Show how a run goes, from another terminal; Ctrl-C stops watching, not the run."""
    from abliterate.common.watching import follow

    progress: Progress | None = None
    try:
        if io.json or once or not sys.stdout.isatty():
            shown = 0
            for progress in follow(out, patience=wait):
                shown = _print(progress, shown, io.json, once)
                if once:
                    return
        else:
            from rich.live import Live

            with Live(refresh_per_second=4) as live:
                for progress in follow(out, patience=wait):
                    live.update(_drawn(progress))
    except KeyboardInterrupt:
        raise InterruptedByUserError(f"stopped watching; the run of {out} goes on") from None
    if progress is not None and progress.ended != "done":
        raise AbliterateError(f"the run of {out} was {progress.ended}; `abliterate run ... --resume` goes on")


def _print(progress: Progress, shown: int, json_: bool, once: bool) -> int:
    """Print what is new; returns how many lines have been shown."""
    if json_:
        typer.echo(json.dumps(asdict(progress)))
        return 0
    for stamp, line in progress.lines[shown:]:
        typer.echo(f"{stamp:6.1f}s  {line}")
    if once:
        typer.echo(progress.ended or progress.where)
    return len(progress.lines)


def _drawn(progress: Progress) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    lines = [
        Text(f"{stamp:6.1f}s  {line}", overflow="ellipsis", no_wrap=True)
        for stamp, line in progress.lines[-SHOWN_LINES:]
    ]
    if progress.ended:
        return Group(*lines, Text(progress.ended, style="bold"))
    bar = ProgressBar(total=max(1, progress.total), completed=progress.done, width=60)
    return Group(*lines, Text(progress.where, style="bold"), bar)
