"""A chat template's own switch that turns reasoning off, found by trying."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from abliterate.common.errors import ModelError
from abliterate.prompts.chat import THINKING_ON
from abliterate.prompts.reasoning import closed_at_end, open_at_end

_NAMES = re.compile(r"\b[a-z_]*(?:think|reason)[a-z_]*\b")
_ASKED = re.compile(r"\b([a-z_]\w*)\s*(?=\| *default|is (?:not )?defined)|(?<=if )\s*(?:not )?([a-z_]\w*)")
_MEASURED = re.compile("budget|effort|mode|level")  # such names take other values than true and false
_WORDS = ("none", "off", "disabled", "no_think")


def switched_off(
    render: Callable[[Mapping[str, Any]], Sequence[str]], template: str
) -> tuple[dict[str, Any], list[str]] | None:
    """The switch of a template that ends in no open reasoning where it did, and the prompts as they are then.

    Args:
        render: gives some prompts as the template writes them with such names and values set.
        template: its text, in which names are looked for.

    Returns:
        None where no name that it mentions makes a difference: there is no switch, or it is off.
    """
    before = list(render({}))
    speaking = sorted(set(_NAMES.findall(template)), key=lambda name: (name not in THINKING_ON, name))
    asked = sorted({name for found in _ASKED.findall(template) for name in found if name} - {*speaking})
    for name in (*speaking, *asked):
        for value in (0, *_WORDS) if _MEASURED.search(name) else (False, True, *_WORDS, {"type": "disabled"}):
            try:
                after = list(render({name: value}))
            except ModelError:  # it can't take such a value
                continue
            sure = (value is False and name in speaking) or all(map(closed_at_end, after))
            if after != before and sure and not any(map(open_at_end, after)):
                return {name: value}, after
    return None
