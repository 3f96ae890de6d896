"""`abliterate export`: a model folder as a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.commands.common import Json, LogFile, Overwrite, Quiet, app, print_result, reported, source_of


@app.command(epilog="Example: abliterate export ./Qwen3-0.6B-abliterated/model --gguf Q4_K --out qwen3.gguf")
def export(
    model: Annotated[str, typer.Argument(help="Local folder, or 'demo'.", show_default=False)],
    gguf: Annotated[
        str,
        typer.Option(
            "--gguf",
            help="Type of the tensors: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The GGUF file to write.", show_default=False)],
    converter: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's convert_hf_to_gguf.py or its checkout; by default that of the export extra."),
    ] = None,
    overwrite: Overwrite = False,
    log_file: LogFile = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Write a model folder as a GGUF, through llama.cpp's own converter."""
    with reported(quiet, log_file) as terminal:
        from abliterate.publish.gguf import export_gguf

        document = export_gguf(source_of(model), out, gguf, terminal, converter=converter, overwrite=overwrite)
    types = ", ".join(f"{count} {kind}" for kind, count in document["types"].items())
    text = f"{out}: {document['bytes'] / 2**20:,.1f} MiB, tensors: {types}"
    print_result({"schema": 1, **document}, json_, text)
