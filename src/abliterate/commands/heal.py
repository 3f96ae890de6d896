"""`abliterate heal`: train an edited model back to what the edit cost it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from abliterate.commands.common import source_of
from abliterate.commands.options import Given, Output, command
from abliterate.settings.heal import HealRunSettings

if TYPE_CHECKING:
    from abliterate.commands.terminal import Terminal


@command(
    "heal measure prompts -prompts.train_prompts load -load.quantise -load.max_memory -load.offload_folder "
    "-load.tensor_parallel resume seed config heal.quantise",
    "abliterate heal demo-out --preset self --out healed                the run knows its original",
    "abliterate heal ./edited --original ./model --preset self --out healed",
    "abliterate heal ./edited --original ./model --out healed          DPO on mlabonne/orpo-dpo-mix-40k",
    "abliterate heal ./edited --data pairs.jsonl --learning-rate 1e-5 --launch zero2 --out healed",
    "abliterate heal ./edited --write-axolotl heal.yaml                the same training for Axolotl",
    kind=HealRunSettings,
)
def heal(
    model: Annotated[str, "The edited model: folder, Hub id, GGUF file, or what `abliterate run` wrote."],
    *,
    original: Annotated[
        str | None,
        "The model before the edit: `self` learns from it, and all are measured against it. [default: that of the run]",
    ] = None,
    out: Annotated[Path | None, "Output folder. [default: NAME-healed]"] = None,
    write_axolotl: Annotated[
        Path | None, "Write the same training as an Axolotl configuration to this file, and stop."
    ] = None,
    given: Given[HealRunSettings],
    io: Output,
) -> None:
    """Train an edited model back to what the edit cost it, and measure original, edited and healed."""
    out = out or _default_folder(model)
    with io.reported(None if write_axolotl else out) as terminal:
        settings = given.settings()
        if write_axolotl is not None:
            _write_axolotl(model, out, write_axolotl, settings, terminal, io)
        else:
            _heal(model, source_of(original) if original else None, out, settings, terminal, io)


def _default_folder(model: str) -> Path:
    """NAME-healed here, for a model's folder (that of a run: the run's), file or Hub id."""
    path = Path(model).expanduser()
    path = path.resolve() if path.exists() else path
    name = path.parent.name if path.name == "model" and (path.parent / "results.json").is_file() else path.name
    return Path(f"{name.removesuffix('.gguf')}-healed")


def _write_axolotl(
    model: str, out: Path, file: Path, settings: HealRunSettings, terminal: Terminal, io: Output
) -> None:
    from abliterate.heal.axolotl import write_axolotl
    from abliterate.heal.run import work_folder
    from abliterate.heal.sources import find_sources
    from abliterate.heal.training import Job

    job = Job(model=find_sources(model, None).model, folder=work_folder(out), settings=settings)
    io.result(write_axolotl(job, file, overwrite=io.overwrite, reporter=terminal), f"axolotl: {file}")


def _heal(
    model: str, original: str | None, out: Path, settings: HealRunSettings, terminal: Terminal, io: Output
) -> None:
    from abliterate.commands.terminal import places, run_result
    from abliterate.heal.run import heal as run_heal

    document = run_heal(model, out, settings, original=original, overwrite=io.overwrite, reporter=terminal).document
    written = places(
        out, model="model", adapter="adapter", card="model/README.md", results="results.json", report="report.html"
    )
    io.result(document, *run_result(document), written)
