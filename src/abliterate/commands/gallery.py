"""`abliterate recipes` and `abliterate reproduce`: recipes that others made, and making one again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from abliterate.commands.common import source_of
from abliterate.commands.options import Output, command
from abliterate.common.errors import AbliterateError
from abliterate.common.names import is_demo

MOST_SHOWN = 20


@command(
    "",
    "abliterate recipes USER/NAME                       what a repository of recipes holds",
    "abliterate recipes USER/NAME qwen3.safetensors --out qwen3.safetensors",
    "abliterate recipes https://host/recipe.safetensors --out recipe.safetensors --sha256 1c9f...",
)
def recipes(
    source: Annotated[str, "USER/NAME of the Hub, a folder, a file, or an https address."],
    name: Annotated[str | None, "Which one to fetch."] = None,
    *,
    out: Annotated[Path | None, "Where to write it."] = None,
    sha256: Annotated[str | None, "What its hash must be, or begin with."] = None,
    io: Output,
) -> None:
    """List recipes, or fetch one: kilobytes, strictly read, its hash checked."""
    with io.reported() as terminal:
        from abliterate.commands.terminal import rows_table
        from abliterate.common.errors import RecipeError
        from abliterate.common.files import check_file
        from abliterate.publish.gallery import described, entries, fetched, keep

        if out:
            check_file(out, overwrite=io.overwrite)
        there = entries(source)
        chosen = [entry for entry in there if name in (None, entry.name)]
        if not chosen or (out and len(chosen) > 1):
            raise AbliterateError(f"{source} holds {', '.join(e.name for e in there)[:300]}; name one of them")
        found = []
        for entry in chosen:
            try:
                data, recipe = fetched(entry, sha256)
            except RecipeError as error:
                if name or out or sha256 or len(chosen) == 1:
                    raise
                terminal.say(f"{entry.name} is left out: {error}")
                continue
            found.append(described(entry, data, recipe))
            if out:
                keep(data, out)
    rows = [
        [row["name"], f"{row['bytes']:,}", row["model"] or "-", (row["config_hash"] or "-")[:12],
         (row["weights_hash"] or "-")[:12], row["sha256"][:12]] for row in found
    ]  # fmt: skip
    headings = ("recipe", "bytes", "model", "config hash", "weights' hash", "sha256")
    told = [rows_table(rows, headings, f"recipes of {source}", left=6)]
    model = found[0]["model"] if out else None
    said = [f"{out}: written; next: abliterate apply {out} {model or 'MODEL'} --out edited"] if out else []
    io.result({"schema": 1, "recipes": found, "out": str(out) if out else None}, *told, *said)


@command(
    "",
    "abliterate reproduce Qwen3-0.6B-abliterated",
    "abliterate reproduce recipe.safetensors Qwen/Qwen3-0.6B --out again",
)
def reproduce(
    made: Annotated[Path, "recipe.safetensors, results.json, or a run's folder."],
    model: Annotated[str | None, "Its model. [default: the one it names]"] = None,
    *,
    out: Annotated[Path, "Folder of the new run."] = Path("reproduced"),
    force: Annotated[bool, "Go on with a model of another config."] = False,
    io: Output,
) -> None:
    """Run again with the settings that were kept; the same recipe bit for bit, or what differs."""
    with io.reported(out) as terminal:
        from abliterate.run.reproduce import read_made
        from abliterate.run.reproduce import reproduce as run_again

        found = read_made(made)
        source = model or ("demo" if is_demo(found.source) else found.source)
        if not source:
            raise AbliterateError(f"{made} doesn't name its model; give it as the second argument")
        document = run_again(found, source_of(source), out, terminal, overwrite=io.overwrite, force=force)
    differs = document["differs"]
    lines = [f"{name}: {before} before, {now} now" for name, (before, now) in list(differs.items())[:MOST_SHOWN]]
    lines += [f"and {len(differs) - MOST_SHOWN} more (--json lists all)"] if len(differs) > MOST_SHOWN else []
    said = "the same recipe, bit for bit" if document["bit_for_bit"] else (
        "the same edit; the recipe's bytes differ in what it says of itself" if document["same_edit"]
        else "another edit came out"
    )  # fmt: skip
    io.result(document, "\n".join([said, *lines]))
