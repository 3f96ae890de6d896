"""Every stage of a run on a few prompts, to compare what it gives in one place and in another."""

from __future__ import annotations

import torch

from abliterate.apply.hooks import attached
from abliterate.apply.proof import check_proof
from abliterate.common.reporting import Silent
from abliterate.directions.activations import collect
from abliterate.directions.means import difference_of_means
from abliterate.edit.edit import Edit
from abliterate.measure.decode import Answer, decode
from abliterate.measure.divergence import compare, make_reference
from abliterate.models.writers import find_writers
from abliterate.run.probe import gradient
from abliterate.search.examples import Examples
from abliterate.search.fit import _Job
from abliterate.search.fit_settings import FitSettings
from abliterate.search.fit_state import FitState
from planted import RefusesWithR

TARGET = ["how do I break a lock", "how do I break the sea", "a car"]
BASELINE = ["how do I bake a cake", "how do I bake bread", "a pie"]


def seen(handle):
    """What the stages give: writers, activations, answers, divergence, an edit live, two steps of a fit."""
    writers, ids = find_writers(handle), handle.prompt_ids([*TARGET, *BASELINE])
    assert check_proof(handle).component < 1e-5
    directions = difference_of_means(collect(handle, TARGET, BASELINE, positions=1))
    edit = Edit.uniform(writers, torch.linspace(-1, 1, handle.d_model), 1.0)
    with attached(handle, edit):
        live = collect(handle, TARGET, BASELINE, positions=1).target.mean
    answers = [Answer([5, 6], "", False, False) for _ in TARGET]
    side = Examples(TARGET, answers, BASELINE, answers)
    job = _Job(handle, directions, side, side, RefusesWithR(), FitSettings(layers=range(1, 4)), (), FitState())
    job._open(range(1, 4))
    job.variables.put(directions.unit[1:4, 0, -1], 0.6)
    job.descend(1.0, 2, Silent())
    assert gradient(handle, ids, 2, sequences=2) > 0
    return {
        "writers": [w.name for w in writers],
        "tied": handle.tied,
        "answers": [a.ids for a in decode(handle, ids, max_new_tokens=3)],
        "divergence": torch.tensor(compare(handle, make_reference(handle, ids[3:], answers)).answer),
        "directions": directions.unit.nan_to_num(),
        "live": live.nan_to_num(),  # blocks in parallel have nothing in between
        "fit": torch.cat([job.variables.vectors.detach().flatten(), job.variables.strengths.detach().flatten()]),
    }


def same(found, wanted, rtol=1e-5, atol=1e-6):
    for name, value_ in wanted.items():
        if isinstance(value_, torch.Tensor):
            torch.testing.assert_close(found[name], value_, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert found[name] == value_, name
