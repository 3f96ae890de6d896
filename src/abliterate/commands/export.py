"""`abliterate export`: a model folder as a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from abliterate.commands.common import source_of
from abliterate.commands.options import Output, command


@command("", "abliterate export ./Qwen3-0.6B-abliterated/model --gguf Q4_K --out qwen3.gguf")
def export(
    model: Annotated[str, "Local folder, or 'demo'."],
    *,
    gguf: Annotated[
        str, "Type of the tensors: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K."
    ],
    out: Annotated[Path, "The GGUF file to write."],
    converter: Annotated[
        Path | None, "llama.cpp's convert_hf_to_gguf.py or its checkout; by default that of the export extra."
    ] = None,
    io: Output,
) -> None:
    """Write a model folder as a GGUF, through llama.cpp's own converter."""
    with io.reported() as terminal:
        from abliterate.publish.gguf import export_gguf

        document = export_gguf(source_of(model), out, gguf, terminal, converter=converter, overwrite=io.overwrite)
    types = ", ".join(f"{count} {kind}" for kind, count in document["types"].items())
    io.result({"schema": 1, **document}, f"{out}: {document['bytes'] / 2**20:,.1f} MiB, tensors: {types}")
