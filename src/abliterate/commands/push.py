"""`abliterate push`: a model, adapter, recipe or GGUF file to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from abliterate.commands.common import Json, LogFile, Quiet, app, print_result, reported


@app.command(
    epilog="Example: abliterate push Qwen3-0.6B-abliterated me/Qwen3-0.6B-abliterated --private\n\n"
    "Example: abliterate push recipe.safetensors me/my-recipe --dry-run"
)
def push(
    path: Annotated[
        Path,
        typer.Argument(
            help="Output folder of `run` (model, recipe and results go), model or adapter folder, recipe or GGUF file.",
            show_default=False,
        ),
    ],
    repo: Annotated[str, typer.Argument(help="NAME or USER/NAME; made if it isn't there.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made if it isn't there.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go; needs neither token nor network.")
    ] = False,
    log_file: LogFile = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Send a model, adapter, recipe or GGUF file with its card to the Hugging Face Hub.

    What is there already is not sent again: after an interruption, run the same command. The token comes from
    HF_TOKEN or `hf auth login`.
    """
    with reported(quiet, log_file) as terminal:
        from abliterate.publish.hub import push as push_to_hub

        summary = push_to_hub(path, repo, private=private, revision=revision, dry_run=dry_run, reporter=terminal)
    print_result(summary, json_, _told(summary))


def _told(summary: dict[str, Any]) -> str:
    dry = summary["dry_run"]
    lines = []
    for entry in summary["files"]:
        mark = "would go" if dry else "sent" if entry["sent"] else "there already"
        lines.append(f"{mark:<14}{decimal(entry['bytes']):>10}  {entry['path']}")
    lines += [f"{'stays here':<14}{'':>10}  {entry['path']} ({entry['why']})" for entry in summary["left_out"]]
    lines += [f"note: {note}" for note in summary["notes"]]
    if dry:
        lines.append(f"{len(summary['files'])} files, {decimal(summary['bytes'])}, as {summary['kind']} to "
                     f"{summary['repo']}; nothing was sent")  # fmt: skip
    else:
        lines.append(f"{decimal(summary['bytes_sent'])} of {decimal(summary['bytes'])} sent: {summary['url']}")
    return "\n".join(lines)
