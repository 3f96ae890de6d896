"""What a run of one kind supplies to the skeleton that all kinds share (`pipeline._carried_out`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterate.directions.activations import Activations
from abliterate.directions.keep import Kept
from abliterate.directions.means import Directions
from abliterate.measure import Measurement
from abliterate.measure.judges import Judge
from abliterate.models.handle import Handle
from abliterate.report.gather import Gathered
from abliterate.run.opening import Job
from abliterate.run.showing import Shown
from abliterate.search.sweep import Choice


class Strategy:
    """What contrasts, how an edit is chosen, and what is written of it; a run makes a new one.

    Attributes:
        takes_out: whether its edit takes directions out of writers, which are then proved, and may leave what --keep
            names alone.
        may_shift: whether its edit may add at blocks, which not every class's weights can hold.
        keeps_frontier: whether each point of the frontier has a recipe.
        looks_beside: whether further sets and instructions are measured.
        method: what results.json calls the search, where it isn't the settings' method.
        activations: a file that `collect` saved, read instead of collecting.
        shown: the training prompts after the filter, where there is one.
    """

    takes_out = True
    may_shift = True
    keeps_frontier = False
    looks_beside = True
    method: str | None = None
    activations: str | Path | None = None
    shown: Shown | None = None

    def check(self, handle: Handle | None = None) -> None:
        """See that what it reads is there and whole, and once the model is loaded, that it is for this model."""

    def filter(self, job: Job) -> None:
        """See which prompts count, or whether there is anything to do."""
        raise NotImplementedError

    def collect(self, job: Job) -> Activations:
        """The activations that the directions come from."""
        raise NotImplementedError

    def search(self, job: Job, directions: Directions, kept: Kept | None) -> Choice:
        """Choose an edit."""
        raise NotImplementedError

    def gathered(self, job: Job, choice: Choice, directions: Directions) -> Gathered | None:
        """What a report needs of the original; None where there is no report."""
        return None

    def judge(self, judge: Judge) -> Judge:
        """What measures the models."""
        return judge

    def numbers(self, measurement: Measurement) -> dict[str, Any]:
        """A measurement as results.json has it."""
        return measurement.to_json()

    def prompt_facts(self) -> dict[str, Any]:
        """What results.json says of the prompts beside their sources."""
        return {"filter": None}

    def facts(self, job: Job) -> dict[str, Any]:
        """What results.json says beside what every run's says."""
        return {"behaviour": job.behaviour.to_json()}

    def found(self, direction: dict[str, Any]) -> dict[str, Any]:
        """What a recipe says of how its direction was found."""
        return {"found_at": direction}
