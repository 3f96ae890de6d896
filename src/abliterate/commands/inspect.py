"""`abliterate inspect` and `abliterate doctor`: what a model and a machine are."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.commands.common import Model, source_of
from abliterate.commands.options import Given, Output, command
from abliterate.settings.run import LoadSettings, RunSettings

if TYPE_CHECKING:
    from abliterate.models.handle import Handle


@command(
    "load.device load.device_map load.max_memory load.offload_folder load.revision load.trust_remote_code "
    "load.at_stream",
    "abliterate inspect ./model --json",
    shares="log_file quiet json",
)
def inspect(
    model: Model,
    *,
    dtype: Annotated[str, "The proof is exact in float32.", LoadSettings.panel] = "float32",
    given: Given[RunSettings],
    io: Output,
) -> None:
    """Print what writes to the residual stream, and the proof that nothing was missed."""
    with io.reported() as terminal:
        settings = given.settings({"load.dtype": dtype})
        from abliterate.run.opening import open_model

        source = source_of(model)
        terminal.say(f"loading {source}")
        handle = open_model(source, settings.load)
        document, passed = _inspection(handle)
    io.result(document)
    if not io.json:
        _print_inspection(document)
    if not passed:
        raise typer.Exit(2)


@command("", "abliterate doctor --json", shares="json")
def doctor(io: Output) -> None:
    """Say what this machine can do, in plain words."""
    from abliterate.commands.doctor import examine

    with io.reported():
        findings = examine()
    io.result([asdict(f) for f in findings], *(f"{'ok  ' if f.ok else 'no  '} {f.text}" for f in findings))


def _inspection(handle: Handle) -> tuple[dict[str, Any], bool]:
    from abliterate.apply.proof import prove, tolerance
    from abliterate.common.errors import WriterError
    from abliterate.models.writers import find_writers

    try:
        writers, problem = find_writers(handle, projector=True), None
    except WriterError as error:  # of the language model, or else of the projector alone
        writers, problem = find_writers(handle), str(error)
    proof, bound = prove(handle), tolerance(handle)
    passed = proof.component <= bound
    return {
        "schema": 1,
        "model": {
            "source": handle.source,
            "class": type(handle.model).__name__,
            "layers": handle.layers,
            "d_model": handle.d_model,
            "tied": handle.tied,
            "config_hash": handle.config_hash,
        },
        "writers": [
            {
                "name": w.name, "layer": w.layer, "side": w.side, "shape": list(w.shape), "axis": w.axis,
                "bias": w.bias, "post_norm": w.gain is not None or w.centred,
            }
            for w in writers
        ],
        "projector_problem": problem,
        "proof": {"component": proof.component, "where": proof.where, "tolerance": bound, "passed": passed},
    }, passed  # fmt: skip


def _print_inspection(document: dict[str, Any]) -> None:
    from rich.table import Table

    from abliterate.commands.terminal import output

    model, proof = document["model"], document["proof"]
    table = Table("writer", "layer", "side", "shape", "along d_model", "bias", "post-norm")
    for w in document["writers"]:
        layer = "-" if w["layer"] is None else str(w["layer"])
        shape = " x ".join(map(str, w["shape"]))
        marks = ("yes" if w["bias"] else "", "yes" if w["post_norm"] else "")
        table.add_row(w["name"], layer, w["side"], shape, f"dimension {w['axis']}", *marks)
    console = output()
    console.print(table)
    projectors = sum(w["side"] == "projector" for w in document["writers"])
    console.print(
        f"{model['class']}: {len(document['writers']) - projectors} writers in {model['layers']} blocks, "
        f"d_model {model['d_model']}"
        + (", embedding and head tied" if model["tied"] else "")
        + (f"; and {projectors} of image tokens, which an edit leaves alone unless asked" if projectors else ""),
        soft_wrap=True,
    )
    if document["projector_problem"]:
        console.print(document["projector_problem"], soft_wrap=True, markup=False)
    verdict = "proved" if proof["passed"] else "NOT PROVED: a writer was missed"
    console.print(
        f"{verdict}: with all of them edited, the largest component left is {proof['component']:.1e} "
        f"at {proof['where']} (bound {proof['tolerance']:.1e})",
        soft_wrap=True,
    )
