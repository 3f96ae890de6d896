"""Ways to apply an edit, one file each; and what they share: what an edit takes out of a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abliterate.apply.removal import Factors as Factors
    from abliterate.apply.removal import factors as factors
    from abliterate.apply.removal import weight_factors as weight_factors

_SHARED = ("Factors", "factors", "weight_factors")  # imported when first used: the form checkpoint needs no torch


def __getattr__(name: str) -> Any:
    if name not in _SHARED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from abliterate.apply import removal

    return getattr(removal, name)
