"""`abliterate run --induce`: make a model refuse what it used to answer, prove it, and write it down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abliterate.common.errors import AbliterateError
from abliterate.directions.activations import Activations
from abliterate.directions.keep import Kept
from abliterate.directions.means import Directions
from abliterate.measure import Judged, Measurement
from abliterate.measure.judges import Judge
from abliterate.run.opening import Job
from abliterate.run.showing import Shown, filtered
from abliterate.run.stages import collected
from abliterate.run.strategy import Strategy
from abliterate.search.induce import InduceSettings, induce
from abliterate.search.sweep import Choice
from abliterate.settings.run import layer_range


class Inducing(Strategy):
    """The model's own refusals against its answers: a shift makes it refuse what it answers."""

    takes_out = False
    looks_beside = False
    method = "induce"
    validation: Shown

    def filter(self, job: Job) -> None:
        """Find the model's own words of both kinds.

        Raises:
            NothingToDoError: the model hardly refuses its target prompts, so it has no refusal to copy.
        """
        self.shown, self.validation = self._shown(job, "train"), self._shown(job, "validation")

    def _shown(self, job: Job, split: str) -> Shown:
        shown = filtered(job, split, always=True)
        if not shown.refused.count:
            source = job.handle.source
            raise AbliterateError(f"{source} refuses none of the target prompts, so it has no refusal to copy")
        return shown

    def collect(self, job: Job) -> Activations:
        assert self.shown is not None
        return collected(
            job.handle, self.shown.target, self.shown.baseline, job.settings.collect, job.reporter
        )  # fmt: skip

    def search(self, job: Job, directions: Directions, kept: Kept | None) -> Choice:
        assert self.shown is not None and self.shown.examples is not None
        named = job.settings.search.layers
        options = InduceSettings(layers=layer_range(named) if named else None, seed=job.settings.seed)
        baseline = self.validation.baseline
        words = self.shown.examples
        found: Any = induce(job.handle, directions, words, baseline, job.judge, options, reporter=job.reporter)
        return Choice(found.edit, found.winner, found.candidates)

    def judge(self, judge: Judge) -> Judge:
        return Patient(judge)

    def numbers(self, measurement: Measurement) -> dict[str, Any]:
        whole = Judged(measurement.baseline_answers, measurement.refused_baseline).coherent
        return {**measurement.to_json(), "coherent_over_refusal": whole.to_json("refused")}

    def prompt_facts(self) -> dict[str, Any]:
        assert self.shown is not None
        return {"filter": self.shown.to_json()}

    def facts(self, job: Job) -> dict[str, Any]:
        return {}

    def found(self, direction: dict[str, Any]) -> dict[str, Any]:
        return {"induced": {name: value for name, value in direction.items() if name != "note"}}


class Patient:
    """A judge that wants every answer to its end: where refusals are induced, whether they are sentences counts."""

    def __init__(self, judge: Judge) -> None:
        self.name, self._judge = judge.name, judge

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """As the judge within."""
        return self._judge.judge(prompts, answers)

    def settled(self, prompt: str, partial_answer: str) -> bool | None:
        """Never."""
        return None
