"""`abliterate push`: a model, adapter, recipe or GGUF file to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rich.filesize import decimal

from abliterate.commands.options import Output, command


@command(
    "",
    "abliterate push Qwen3-0.6B-abliterated me/Qwen3-0.6B-abliterated --private",
    "abliterate push recipe.safetensors me/my-recipe --dry-run",
    shares="log_file quiet json",
)
def push(
    path: Annotated[
        Path, "Output folder of `run` (model, recipe and results go), model or adapter folder, recipe or GGUF file."
    ],
    repo: Annotated[str, "NAME or USER/NAME; made if it isn't there."],
    *,
    private: Annotated[bool, "Make the repository private."] = False,
    revision: Annotated[str | None, "Branch to commit to; made if it isn't there."] = None,
    dry_run: Annotated[bool, "List what would go; needs neither token nor network."] = False,
    io: Output,
) -> None:
    """Send a model, adapter, recipe or GGUF file with its card to the Hugging Face Hub.

    What is there already is not sent again: after an interruption, run the same command. The token comes from
    HF_TOKEN or `hf auth login`.
    """
    with io.reported() as terminal:
        from abliterate.publish.hub import push as push_to_hub

        summary = push_to_hub(path, repo, private=private, revision=revision, dry_run=dry_run, reporter=terminal)
    io.result(summary, _told(summary))


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
