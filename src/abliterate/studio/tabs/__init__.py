"""The parts of the page, by what a user sees: the controls at its side, and a file for each tab or two.

A part lays out its components where it is made; `wire` then says what happens when they are used. `on` wires an event
(`page.told`). Values come from the page and are checked by `Studio`, `Session` and `Folder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

On = Callable[..., Any]
SMALL: dict[str, Any] = {"scale": 0, "min_width": 150, "size": "md"}  # a button that doesn't fill its row
LONGER = {**SMALL, "min_width": 220}  # for a longer text
