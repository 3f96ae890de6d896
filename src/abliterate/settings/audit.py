"""The settings of `abliterate audit`: those of a run, smaller sets of prompts, and a stage of its own."""

from __future__ import annotations

from pydantic import Field

from abliterate.settings.run import PromptSettings, RunSettings, Stage


class AuditPrompts(PromptSettings):
    """Where prompts come from, and how many a side each split gives."""

    train_prompts: int = Field(128, ge=8)
    validation_prompts: int = Field(48, ge=4)
    test_prompts: int = Field(100, ge=4)


class AuditStage(Stage):
    """Sizes of the audit's stages.

    Attributes:
        fit: whether the frontier of gradient-fitted edits is traced, which takes most of the time.
        steps: gradient steps to its first point, a third of it to each further one.
        strengths: of one direction in every writer.
        max_directions: most directions taken out together.
        counts: prompts a side from which the direction is found.
        draws: draws of prompts for each count.
        draw_prompts: test prompts answered for each draw.
        divergence_prompts: baseline prompts that divergence is measured on.
        answer_tokens: longest answer decoded.
    """

    fit: bool = True
    steps: int = Field(24, ge=1)
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    max_directions: int = Field(3, ge=1, le=16)
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    draws: int = Field(3, ge=1)
    draw_prompts: int = Field(32, ge=4)
    divergence_prompts: int = Field(64, ge=4)
    answer_tokens: int = Field(32, ge=1)


QUICK = {
    "audit.steps": 8, "audit.strengths": (0.5, 1.0), "audit.max_directions": 2, "audit.counts": (1, 4, 16, 64),
    "audit.draws": 2, "audit.draw_prompts": 16, "audit.divergence_prompts": 24, "prompts.train_prompts": 64,
    "prompts.validation_prompts": 24, "prompts.test_prompts": 50,
}  # fmt: skip


class AuditRunSettings(RunSettings):
    """All of `abliterate audit`."""

    prompts: AuditPrompts = Field(default_factory=lambda: AuditPrompts.model_validate({}))
    audit: AuditStage = Field(default_factory=lambda: AuditStage.model_validate({}))
