"""Every option of `abliterate heal`; as a TOML table `[heal]`, in the environment, or as flags."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from abliterate.settings.run import RunSettings, Stage, resolve

DPO_DATA = "mlabonne/orpo-dpo-mix-40k"

PRESET_DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "self": {
        "rank": 16, "alpha": 16.0, "dropout": 0.0, "learning_rate": 2e-3, "warmup": 5, "micro_batch": 16,
        "accumulation": 1, "epochs": 2.0, "gradient_checkpointing": False, "save_steps": 20,
    },
}  # fmt: skip
"""What a preset has instead of a field's default, which is the article's (dpo)."""


class SelfSettings(Stage):
    """What only the preset `self` has: how the original model teaches the edited one.

    Attributes:
        teaching_prompts: most training prompts a side; the original's answers are learnt from, its refusals kept away.
        answer_tokens: tokens of each of the original's answers that are learnt from.
        hold: weight of keeping refusals away against one nat of divergence.
        hold_batch: refused prompts of a step.
        evaluate_every: steps between looks at validation prompts.
        patience: stop after so many looks without a better one.
        max_refusal_rate: weights that refuse more validation target prompts count as worse than any that don't,
            unless the edited model refused as many before.
    """

    teaching_prompts: int = Field(512, ge=8)
    answer_tokens: int = Field(48, ge=1)
    hold: float = Field(0.2, ge=0.0)
    hold_batch: int = Field(8, ge=1)
    evaluate_every: int = Field(20, ge=1)
    patience: int = Field(3, ge=1)
    max_refusal_rate: float = Field(0.05, ge=0.0, le=1.0)


class HealSettings(Stage):
    """How an edited model is healed. The defaults are the article's recipe (Labonne 2024) for `dpo`.

    Attributes:
        preset: "dpo", preference pairs; "self", the original model as the teacher.
        data: preference pairs for `dpo`: a Hub data set or a .jsonl, .json or .parquet file.
        data_split: the data's split that is used; "train" where it has splits.
        prompt_column, chosen_column, rejected_column: its columns.
        most_pairs: use at most so many pairs, drawn with the seed.
        keep_refusals: train on pairs whose chosen answer refuses too.
        held_out: share of the pairs that is not trained on, for the preference accuracy before and after.
        most_held_out: at most so many of them.
        quantise: "4bit" trains a LoRA on a model in four bits (QLoRA; needs bitsandbytes), "none" doesn't; "auto"
            does on CUDA.
        rank, alpha, dropout: of the LoRA.
        target_modules: what gets a LoRA: "all-linear", or names of modules with commas between.
        max_length: most tokens of a conversation.
        micro_batch: examples a process runs at once.
        accumulation: micro-batches a step adds up.
        epochs: times the data is gone through.
        max_steps: stop after so many steps.
        optimizer: a name of transformers' `optim`; "auto" is paged_adamw_8bit on CUDA with bitsandbytes,
            adamw_torch elsewhere.
        scheduler: of the learning rate, as transformers names it.
        learning_rate: at its highest.
        warmup: steps in which it rises, or their share of all when below 1 (the article's 100 of 4,900).
        weight_decay: of the optimizer.
        max_grad_norm: gradients are scaled down to this norm.
        beta: how strongly `dpo` holds to the edited model (Rafailov et al. 2023, eq. 7).
        bf16: arithmetic in bfloat16: "auto" where a GPU can, or "yes", "no". Weights keep their dtype.
        gradient_checkpointing: compute activations again instead of keeping them: slower, less memory.
        save_steps: steps between checkpoints, which --resume goes on from; 0 for none.
        log_steps: steps between two points of the curves.
        report_to: where curves go beside TensorBoard: "wandb", "trackio" or "none". Both are set to stay offline.
        launch: several processes by `accelerate launch`: "ddp", "fsdp", "zero2", "zero3", or an accelerate
            configuration file (.yaml); None trains in this process.
        processes: how many on this machine, for a configuration by name; None is one per GPU.
        self_teaching: the fields of `self`.
    """

    preset: Literal["dpo", "self"] = "dpo"
    data: str = DPO_DATA
    data_split: str | None = None
    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    most_pairs: int | None = Field(None, ge=2)
    keep_refusals: bool = False
    held_out: float = Field(0.05, ge=0.0, lt=1.0)
    most_held_out: int = Field(256, ge=1)
    quantise: Literal["auto", "4bit", "none"] = "auto"
    rank: int = Field(64, ge=1)
    alpha: float = Field(32.0, gt=0.0)
    dropout: float = Field(0.05, ge=0.0, lt=1.0)
    target_modules: str = "all-linear"
    max_length: int = Field(2048, ge=8)
    micro_batch: int = Field(1, ge=1)
    accumulation: int = Field(8, ge=1)
    epochs: float = Field(1.0, gt=0.0)
    max_steps: int | None = Field(None, ge=1)
    optimizer: str = "auto"
    scheduler: str = "cosine"
    learning_rate: float = Field(5e-6, gt=0.0)
    warmup: float = Field(0.02, ge=0.0)
    weight_decay: float = Field(0.0, ge=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    beta: float = Field(0.1, gt=0.0)
    bf16: Literal["auto", "yes", "no"] = "auto"
    gradient_checkpointing: bool = True
    save_steps: int = Field(100, ge=0)
    log_steps: int = Field(1, ge=1)
    report_to: Literal["none", "wandb", "trackio"] = "none"
    launch: str | None = None
    processes: int | None = Field(None, ge=1)
    self_teaching: SelfSettings = Field(default_factory=SelfSettings)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        """The preset's defaults under what is given; None means not given."""
        if not isinstance(given, Mapping):
            return given
        kept = {name: value for name, value in given.items() if value is not None}
        return {**PRESET_DEFAULTS.get(str(kept.get("preset", "dpo")), {}), **kept}


class HealRunSettings(RunSettings):
    """All of `abliterate heal`: how models are loaded, prompts found and measured as in `run`, and `heal`."""

    heal: HealSettings = Field(default_factory=lambda: HealSettings.model_validate({}))


def resolve_heal(
    flags: Mapping[str, Any], config: str | os.PathLike[str] | None = None, environment: Mapping[str, str] | None = None
) -> HealRunSettings:
    """As `abliterate.settings.run.resolve`, with the stage `heal` ("heal.learning_rate": 1e-5)."""
    return resolve(flags, config, environment, kind=HealRunSettings)
