"""`abliterate report`: a run as one HTML file, as pictures or as Markdown."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from abliterate.commands.options import Output, command
from abliterate.common.errors import AbliterateError
from abliterate.common.files import check_file


class Format(str, Enum):
    """What a report can be written as."""

    html = "html"
    png = "png"
    md = "md"


@command("", "abliterate report demo-out --open", "abliterate report demo-out --format md --out card/report.md")
def report(
    run: Annotated[
        Path, typer.Argument(metavar="OUT", help="What `abliterate run` wrote, or a results.json.", show_default=False)
    ],
    *,
    format: Annotated[
        Format, "html: one self-contained page. png: pictures. md: tables and pictures, for cards."
    ] = Format.html,
    out: Annotated[
        Path | None, "File, or folder for png. [default: report.html, report-png or report.md in OUT]"
    ] = None,
    show_completions: Annotated[bool, "Put in, folded, the answers to target prompts that the run kept."] = False,
    open_: Annotated[bool, "Open it in the browser."] = False,
    io: Output,
) -> None:
    """Draw what a run measured: did it work, what did it cost, what was changed, and how to repeat it."""
    if show_completions and format is not Format.html:
        raise AbliterateError(f"--show-completions is for html, where answers are folded away; not for {format.value}")
    if open_ and format is Format.png:
        raise AbliterateError("--open opens a page; pictures are a folder, so leave it out with --format png")
    with io.reported() as terminal:
        written = _written(run, format, out, show_completions, io.overwrite)
        if format is Format.md and not (written.parent / "report-png").is_dir():
            terminal.say("without matplotlib there are no pictures; pip install 'abliterate[report]'")
    document = {"schema": 1, "format": format.value, "path": str(written), "bytes": _size(written)}
    io.result(document, f"report: {written}")
    if open_:
        typer.launch(written.absolute().as_uri())


def _written(run: Path, format: Format, out: Path | None, show_completions: bool, overwrite: bool) -> Path:
    """Write the report; one that stands at its usual place is made anew, anything else is kept unless `overwrite`."""
    from abliterate.report import write_html, write_markdown, write_stills

    if format is Format.png:
        return write_stills(run, out, overwrite=overwrite or out is None)
    if out is not None:
        check_file(out, overwrite=overwrite)
    if format is Format.md:
        return write_markdown(run, out)
    return write_html(run, out, show_completions=show_completions)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
