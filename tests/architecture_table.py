"""The table of architectures: what `test_architectures.py` measured, as docs/architectures.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architectures.md"


class Row(NamedTuple):
    """One architecture: its transformers class, writers found, and the largest component left in three forms."""

    name: str
    model_class: str
    writers: int
    live: float
    baked: float
    reloaded: float


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown. Components are rounded up to a power of ten, so that machines agree."""
    lines = [
        "| architecture | class | writers | live | baked | loaded again |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows):
        left = " | ".join(map(magnitude, (row.live, row.baked, row.reloaded)))
        lines.append(f"| {row.name} | {row.model_class} | {row.writers} | {left} |")
    return "\n".join(lines) + "\n"


def magnitude(component: float) -> str:
    return next((f"< {bound:.0e}" for bound in (1e-6, 1e-5, 1e-4, 1e-3) if component < bound), f"{component:.0e}")


def page(rows: Iterable[Row]) -> str:
    """docs/architectures.md."""
    return HEAD + table(rows)


HEAD = """# Architectures

Written by `pytest tests/models/test_architectures.py`. Each is a random model of 2 to 4 blocks made from its
transformers config (gains and biases random too). Its writers are found by looking at a run, without a table of names;
then a direction is taken out of every writer at full strength in float32, and the largest |r.h| / |h| left at any
site of the stream is measured: with the edit attached live, baked into the weights, and in the saved files loaded
again by plain transformers. Other architectures go through the same search; one that isn't understood stops with an
error that names block and side. Of a multimodal model the language model is edited; what projects image tokens into
it is reported (`find_writers(handle, projector=True)`) and left alone.

"""


def write(rows: list[Row], page_file: Path = PAGE) -> None:
    """Bring docs/architectures.md up to date; untouched where it already is."""
    old = page_file.read_text(encoding="utf-8") if page_file.exists() else ""
    if page(rows) != old:
        page_file.write_text(page(rows), encoding="utf-8")
