"""Judging a model: refusals, over-refusals, divergence, degenerate answers, loss; and results.json as types.

What measures needs torch and is imported when it is asked for: `measure.document` is read without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abliterate.measure.measurement import Judged as Judged
    from abliterate.measure.measurement import Measurement as Measurement
    from abliterate.measure.measurement import judged as judged
    from abliterate.measure.measurement import look_for_relevance as look_for_relevance
    from abliterate.measure.measurement import mean_score as mean_score
    from abliterate.measure.measurement import measure as measure
    from abliterate.measure.measurement import reference_of as reference_of

__all__ = ["Judged", "Measurement", "judged", "look_for_relevance", "mean_score", "measure", "reference_of"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from abliterate.measure import measurement

    return getattr(measurement, name)
