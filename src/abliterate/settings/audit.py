"""The settings of `abliterate audit`: those of a run, smaller sets of prompts, and a stage of its own."""

from __future__ import annotations

from pydantic import Field

from abliterate.settings.options import Stage, option
from abliterate.settings.run import PromptSettings, RunSettings


class AuditPrompts(PromptSettings):
    """Where prompts come from, and how many a side each split gives."""

    train_prompts: int = option(128, "Most prompts a side for directions.", ge=8)
    validation_prompts: int = option(48, "Most prompts a side for choosing.", ge=4)
    test_prompts: int = option(100, "Most prompts a side for the numbers.", ge=4)


class AuditStage(Stage):
    """Sizes of the audit's stages.

    Attributes:
        steps: a third of it goes to each further point. Fitting takes most of the time.
        strengths: of one direction in every writer.
        counts: prompts a side from which the direction is found.
        draw_prompts: test prompts answered for each draw.
        divergence_prompts: baseline prompts that divergence is measured on.
    """

    panel = "Auditing"
    fit: bool = option(True, "Trace the frontier of fitted edits.")
    steps: int = option(24, "Gradient steps to its first point.", ge=1)
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    max_directions: int = option(3, "Most directions taken out together.", ge=1, le=16)
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    draws: int = option(3, "Draws of prompts for each number of them.", ge=1)
    draw_prompts: int = Field(32, ge=4)
    divergence_prompts: int = Field(64, ge=4)
    answer_tokens: int = option(32, "Longest answer decoded.", ge=1)


QUICK = {
    "audit.steps": 8, "audit.strengths": (0.5, 1.0), "audit.max_directions": 2, "audit.counts": (1, 4, 16, 64),
    "audit.draws": 2, "audit.draw_prompts": 16, "audit.divergence_prompts": 24, "prompts.train_prompts": 64,
    "prompts.validation_prompts": 24, "prompts.test_prompts": 50,
}  # fmt: skip


class AuditRunSettings(RunSettings):
    """All of `abliterate audit`."""

    resume: bool = option(False, "Go on with an interrupted audit of the same settings.")
    prompts: AuditPrompts = Field(default_factory=AuditPrompts)
    audit: AuditStage = Field(default_factory=AuditStage)
