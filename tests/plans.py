"""A plan's costs that are all nothing, and a run's settings, for tests of the plan and of its probe."""

from __future__ import annotations

import math

from abliterate.run.probe import Costs, Line
from abliterate.settings.run import RunSettings

COSTS = Costs(
    prefill=Line(0.0, 0.0), step=Line(0.0, 0.0), per_token=0.0, collect=0.0, first_token=0.0, first_token_edited=0.0,
    divergence=0.0, gradient=0.0, load=0.0, prove=0.0, bake=0.0, save=0.0, refusing=(4.0,), answering=(math.inf,),
    settling=(8.0,), refused=1.0, answered=1.0, prompt_tokens=10.0, kv_bytes=100.0, weight_bytes=1000,
    vocabulary=50, tied_bytes=200, peak_bytes=10_000, probe_rows=64, layers=10,
)  # fmt: skip


def settings(search=None, **changes):
    return RunSettings.model_validate({"search": {"method": "sweep", **(search or {})}, **changes})
