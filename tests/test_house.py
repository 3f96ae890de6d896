"""The house keeps its measures: few loose files, short files, short functions, and the picture of its rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "abliterate"
FILES = sorted(SOURCE.rglob("*.py"))


def bodies(file: Path) -> Iterator[tuple[str, int]]:
    """Each function of a file and how many lines its body has, its docstring not counted."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            yield f"{file.relative_to(SOURCE)}: {node.name}", (body[-1].end_lineno or 0) - body[0].lineno + 1


def test_at_most_eight_files_stand_outside_the_rooms() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= 8


def test_no_file_has_more_than_400_lines() -> None:
    lengths = {str(file.relative_to(SOURCE)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_functions_body_has_more_than_60_lines() -> None:
    assert {name: length for file in FILES for name, length in bodies(file) if length > 60} == {}


def test_the_picture_of_the_rooms_is_that_of_the_contract() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "draw_house.py"), "--check"]
    assert subprocess.run(script).returncode == 0, "run python scripts/draw_house.py"
