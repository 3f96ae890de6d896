"""Draws docs/house.svg: the rooms of src/abliterate, one floor above the other, from the layers contract.

    python scripts/draw_house.py          # writes docs/house.svg
    python scripts/draw_house.py --check  # exit 1 if it isn't what would be written

A room's line is the docstring of its package; the contract is `[tool.importlinter]` in pyproject.toml.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "house.svg"
WIDTH, FLOOR, GAP, MARGIN = 960, 54, 10, 24
CHARACTERS_A_PIXEL = 1 / 6.4  # of the text's 12-pixel letters


def floors() -> list[list[str]]:
    """The rooms from the top floor to the cellar, those that stand side by side together."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[room.strip() for room in layer.split("|")] for layer in layers]


def about(room: str) -> str:
    """The first sentence of a room's docstring."""
    package = ROOT / "src" / "abliterate" / room
    file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def drawing() -> str:
    """The whole picture."""
    rows = floors()
    height = 2 * MARGIN + len(rows) * (FLOOR + GAP) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<title>The rooms of src/abliterate: each imports only from rooms below it</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, row in enumerate(rows):
        y = MARGIN + number * (FLOOR + GAP)
        width = (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row)
        for place, room in enumerate(row):
            x = MARGIN + place * (width + GAP)
            parts += _room(x, y, width, room, shade=number / len(rows))
    caption = "A room imports only from rooms below it."
    parts.append(f'<text x="{MARGIN}" y="{height - MARGIN}" font-size="12" fill="#555555">{caption}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _room(x: float, y: float, width: float, room: str, shade: float) -> list[str]:
    blue = round(255 - 30 * shade)
    lines = textwrap.wrap(about(room), max(12, int((width - 24) * CHARACTERS_A_PIXEL)))
    if len(lines) > 2:
        lines = [lines[0], lines[1].rstrip(",;: ") + " …"]
    return [
        f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{FLOOR}" rx="6" fill="rgb(236,243,{blue})"'
        ' stroke="#4a6a8a"/>',
        f'<text x="{x + 12:.0f}" y="{y + 18}" font-size="14" font-weight="bold" fill="#1d3347">{escape(room)}</text>',
        *(
            f'<text x="{x + 12:.0f}" y="{y + 33 + 14 * n}" font-size="12" fill="#333333">{escape(line)}</text>'
            for n, line in enumerate(lines)
        ),
    ]


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(OUT.read_text() != drawing())
    OUT.write_text(drawing())
