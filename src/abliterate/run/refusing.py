"""A run of refusing, or of another behaviour that two sets of prompts contrast: its directions are taken out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterate.common.names import public_name
from abliterate.directions.activations import Activations
from abliterate.directions.activations_file import load_activations
from abliterate.directions.keep import Kept
from abliterate.directions.means import Directions
from abliterate.models.handle import Handle
from abliterate.report.gather import Gathered, gather
from abliterate.run.opening import Job
from abliterate.run.searching import Work, search
from abliterate.run.showing import Shown, filtered
from abliterate.run.stages import collected
from abliterate.run.strategy import Strategy
from abliterate.search.sweep import Choice, Choose, Show


class Refusing(Strategy):
    """Prompts that the model refuses against prompts that it answers.

    Args:
        activations: a file that `collect` saved, instead of collecting.
        choose, show: for the article's method, by hand.
    """

    may_shift = False
    keeps_frontier = True
    validation: Shown

    def __init__(
        self, activations: str | Path | None = None, choose: Choose | None = None, show: Show | None = None
    ) -> None:
        self.activations, self.choose, self.show = activations, choose, show
        self.stored: Activations | None = None

    def check(self, handle: Handle | None = None) -> None:
        if self.activations is not None:
            self.stored = load_activations(self.activations, handle)

    def filter(self, job: Job) -> None:
        # activations from a file were filtered when they were collected; the fit wants the answers
        if self.stored is None or job.settings.search.method == "fit":
            self.shown = filtered(job, "train")
        self.validation = filtered(job, "validation", seen=self.shown)
        self.counted = self.shown if job.settings.collect.filter else None

    def collect(self, job: Job) -> Activations:
        if self.stored is not None:
            job.reporter.say(f"activations from {self.activations}")
            return self.stored
        assert self.shown is not None
        return collected(
            job.handle, self.shown.target, self.shown.baseline, job.settings.collect, job.reporter
        )  # fmt: skip

    def search(self, job: Job, directions: Directions, kept: Kept | None) -> Choice:
        return search(
            Work(
                **vars(job), directions=directions, shown=self.shown, validation=self.validation, kept=kept,
                choose=self.choose, show=self.show,
            )
        )  # fmt: skip

    def gathered(self, job: Job, choice: Choice, directions: Directions) -> Gathered:
        target, baseline = self.validation.target, self.validation.baseline
        tick = job.reporter.progress("reading activations for the report", len(target) + len(baseline))
        with job.clock.stage("report data"):
            found = gather(job.handle, choice.edit, choice.winner.place, directions, target, baseline, tick=tick)
        found.document["activations"] = public_name(str(self.activations)) if self.activations else None
        return found

    def prompt_facts(self) -> dict[str, Any]:
        return {"filter": self.counted.to_json() if self.counted else None}
