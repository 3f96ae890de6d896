"""What a job measures besides the split of the given sets, model after model."""

from __future__ import annotations

from typing import Any

from abliterate.cards.also import also_notes
from abliterate.common.errors import AbliterateError, ModelError, PromptError
from abliterate.common.reporting import Reporter
from abliterate.measure import Measurement
from abliterate.measure.also import FurtherVerdicts, also_json, verdicts_on, weigh
from abliterate.measure.document import RunDocument
from abliterate.measure.judges import Judge
from abliterate.measure.obligations import instructed_ids, obeyed, obligations, obligations_json
from abliterate.measure.thinking import thinking_json
from abliterate.models.handle import Handle, behind
from abliterate.prompts.behaviour import Behaviour
from abliterate.prompts.further import SECOND_TURN, Further, further_sets
from abliterate.prompts.sets import Sides
from abliterate.run.stages import decoding
from abliterate.settings.run import RunSettings


class Beside:
    """Further sets of prompts and obligations; `look` at each model, then `to_json`.

    Args:
        sides: the given sets.
        behaviour: the bundled sets are of refusing.
        settings: of the job.

    Raises:
        AbliterateError: reasoning is to be left open, and a prefill to be put before it.
        PromptError: the user's further set can't be read, or has no prompt of its own.
    """

    def __init__(self, sides: Sides, behaviour: Behaviour, settings: RunSettings) -> None:
        if settings.beside.think and settings.load.prefill is not None:
            raise AbliterateError("--think leaves open how answers begin and --prefill doesn't; leave one of them out")
        self.settings = settings
        refusal = behaviour.name == "refusal"
        most = min(settings.beside.also_prompts, settings.prompts.test_prompts)
        self.sets: list[Further] = further_sets(
            sides,
            settings.beside.also_target,
            most=most,
            bundled=refusal,
            seed=settings.seed,
            second_turn=min(settings.beside.second_turn, settings.prompts.test_prompts) if refusal else 0,
        )
        self.obligations = obligations()[: min(settings.beside.obligations, settings.prompts.test_prompts)]
        self.verdicts: dict[str, list[FurtherVerdicts]] = {}
        self.kept: dict[str, list[bool]] = {}
        self.role = "system"

    def check_lengths(self, handle: Handle, reporter: Reporter) -> None:
        """Raise PromptError, before the work, when a prompt is longer than the context."""
        for one in list(self.sets):
            try:
                with behind(handle, one.before):
                    handle.prompt_ids(one.prompts.texts)
            except (ModelError, PromptError) as error:
                if not one.before or self.verdicts:
                    raise
                reporter.say(f"{SECOND_TURN} isn't measured: {error}")
                self.sets.remove(one)
        _, self.role = instructed_ids(handle, self.obligations)

    def look(self, handle: Handle, judge: Judge, reporter: Reporter, state: str, second: Judge | None = None) -> None:
        """Measure a model; `state` is original or edited, `second` a judge that choosing never saw."""
        if self.sets:
            tick = reporter.progress(f"{state}: further prompts", sum(len(one.prompts) for one in self.sets))
            self.verdicts[state] = verdicts_on(
                handle, self.sets, judge, second=second, tick=tick, **decoding(self.settings)
            )
        if self.obligations:
            tick = reporter.progress(f"{state}: instructions", len(self.obligations))
            self.kept[state] = obeyed(handle, self.obligations, tick=tick, **decoding(self.settings))

    def weigh(self, handle: Handle, state: str, floor: float | None) -> None:
        """Take a model's answers that say nothing about their prompts for evasions.

        Args:
            handle: whose probabilities count.
            state: of the model that was looked at.
            floor: how relevant an answer must be, from the original's measurement; None: that isn't known.
        """
        if floor is not None:
            for one, found in zip(self.sets, self.verdicts.get(state, ()), strict=False):
                weigh(handle, one, found, floor)

    def to_json(self, **measured: Measurement) -> dict[str, Any]:
        """The parts of results.json; the models' numbers on the given sets are what they are compared with."""
        found: dict[str, Any] = {}
        if self.verdicts:
            found["also"] = also_json(self.sets, self.verdicts, measured)
        if self.kept:
            found["obligations"] = obligations_json(self.obligations, self.kept, self.role)
        if self.settings.beside.think:
            found["thinking"] = {
                state: {"target": thinking_json(one.target_answers), "baseline": thinking_json(one.baseline_answers)}
                for state, one in measured.items()
            }
        return found


def say_beside(document: RunDocument, reporter: Reporter) -> None:
    """Say what stands out of it, a line each."""
    for note in also_notes(document):
        reporter.say(note)
