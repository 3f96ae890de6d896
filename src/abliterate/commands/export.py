"""`abliterate export`: a model folder as a GGUF, for llama.cpp, Ollama and LM Studio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from abliterate.commands.common import source_of
from abliterate.commands.options import Output, command


@command(
    "",
    "abliterate export Qwen3-0.6B-abliterated --gguf Q4_K_M --ollama --lmstudio ~/.lmstudio/models",
    "abliterate export ./model --gguf Q8_0 --out qwen3.gguf",
)
def export(
    model: Annotated[str, "A run's folder, a model's folder, or 'demo'."],
    *,
    gguf: Annotated[
        str,
        "llama-quantize's name of a type: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q4_K_M, Q4_K_S, Q3_K_L, Q3_K_M, "
        "Q3_K_S, Q2_K, Q5_1, Q5_0, Q4_1, Q4_0.",
    ],
    out: Annotated[Path | None, "The GGUF file to write. [default: NAME-TYPE.gguf, in a run's folder or here]"] = None,
    ollama: Annotated[bool, "Write a Modelfile beside it: template, sampling and stop tokens."] = False,
    lmstudio: Annotated[
        Path | None, "LM Studio's folder of models: put it there too, as abliterate/NAME/FILE.gguf."
    ] = None,
    converter: Annotated[
        Path | None, "llama.cpp's convert_hf_to_gguf.py or its checkout; by default that of the export extra."
    ] = None,
    trust_remote_code: Annotated[
        bool, "Let the converter run code that lies in the model's folder, such as a tokenizer's."
    ] = False,
    io: Output,
) -> None:
    """Write a model as a GGUF, through llama.cpp's own converter, and hand it to Ollama and LM Studio."""
    with io.reported() as terminal:
        from abliterate.common.files import check_file, write_text
        from abliterate.publish.front_ends import modelfile, place_in_lmstudio, put
        from abliterate.publish.gguf import export_gguf

        given = Path(source_of(model)).expanduser()
        run = not (given / "config.json").is_file() and (given / "model" / "config.json").is_file()
        folder = given / "model" if run else given
        whole = given.resolve()
        name = whole.parent.name if whole.name == "model" else whole.name
        final = out or (given if run else Path()) / f"{name}-{gguf.upper()}.gguf"
        beside = final.with_name("Modelfile") if ollama else None
        studio = place_in_lmstudio(lmstudio, name, final) if lmstudio else None
        for place in (beside, studio):
            if place:
                check_file(place, overwrite=io.overwrite)
        described, notes = modelfile(folder, f"./{final.name}") if beside else ("", [])
        document = export_gguf(
            folder, final, gguf, terminal,
            converter=converter, overwrite=io.overwrite, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if beside:
            write_text(beside, described)
        if studio:
            put(final, studio)
    types = ", ".join(f"{count} {kind}" for kind, count in document["types"].items())
    said = [f"{final}: {document['bytes'] / 2**20:,.1f} MiB, tensors: {types}"]
    said += [f"Ollama: ollama create {name.lower()} -f {beside} && ollama run {name.lower()}"] if beside else []
    said += [f"LM Studio: {studio}"] if studio else []
    places = {"modelfile": str(beside) if beside else None, "lmstudio": str(studio) if studio else None}
    io.result({"schema": 1, **document, **places, "notes": notes}, "\n".join([*said, *notes]))
