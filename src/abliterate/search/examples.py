"""What the searches that learn are given: prompts with what the original answered to them."""

from __future__ import annotations

from dataclasses import dataclass, field

from abliterate.measure.decode import Answer


@dataclass
class Examples:
    """Prompts of one split with what the original answered.

    Attributes:
        target: prompts it refuses, with its refusals in `refusals`.
        baseline: prompts it answers, with its answers in `answers`.
        asked: all target prompts, refused or not, where points are judged on them; those answered must stay so.
        over_refused: baseline prompts it refuses, with its refusals in `over_refusals`; these are removed too.
    """

    target: list[str]
    refusals: list[Answer]
    baseline: list[str]
    answers: list[Answer]
    over_refused: list[str] = field(default_factory=list)
    over_refusals: list[Answer] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @property
    def judged_on(self) -> list[str]:
        """The target prompts by which points are judged: all of them, where that is known."""
        return self.asked or self.target
