"""Every option of `abliterate heal`; as a TOML table `[heal]`, in the environment, or as flags."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from abliterate.settings.options import Stage, extras, option
from abliterate.settings.run import RunSettings

pairs = partial(option, panel="Preference pairs (dpo)")
lora = partial(option, panel="LoRA")
training = partial(option, panel="Training")
launching = partial(option, panel="Several processes")


class SelfSettings(Stage):
    """What only the preset `self` has: how the original model teaches the edited one.

    The original's answers are learnt from, its refusals kept away. Weights that refuse more validation target prompts
    than `max_refusal_rate` count as worse than any that don't, unless the edited model refused as many before.
    """

    panel = "The original's teaching (self)"
    teaching_prompts: int = option(512, "Most training prompts a side to learn from.", ge=8)
    answer_tokens: int = option(48, "Tokens of each of the original's answers.", ge=1)
    hold: float = option(0.2, "Weight of keeping refusals away, against one nat of divergence.", ge=0.0)
    hold_batch: int = option(8, "Refused prompts in a step.", ge=1)
    evaluate_every: int = option(20, "Steps between looks at validation prompts.", ge=1)
    patience: int = option(3, "Stop after so many looks without a better one.", ge=1)
    max_refusal_rate: float = option(0.05, "Refusals on validation prompts good enough.", ge=0.0, le=1.0)


class HealSettings(Stage):
    """How an edited model is healed. The defaults are the article's recipe (Labonne 2024) for `dpo`.

    `optimizer` "auto" is paged_adamw_8bit on CUDA with bitsandbytes, adamw_torch elsewhere; `quantise` "auto" is
    "4bit" on CUDA (QLoRA; needs bitsandbytes); `bf16` is of the arithmetic, weights keep their dtype. `beta` is that
    of Rafailov et al. 2023, eq. 7. A `report_to` beside "none" is set to stay offline. Without `launch`, training is
    in this process.
    """

    preset: Literal["dpo", "self"] = option("dpo", "dpo: preference pairs. self: the original's teaching, no data.")
    data: str = pairs("mlabonne/orpo-dpo-mix-40k", "Hub data set, .jsonl, .json, .csv or .parquet.")
    data_split: str | None = pairs(None, "Its split.", said="train")
    prompt_column: str = pairs("prompt")
    chosen_column: str = pairs("chosen")
    rejected_column: str = pairs("rejected")
    most_pairs: int | None = pairs(None, "Use at most so many pairs, drawn with the seed.", ge=2)
    keep_refusals: bool = pairs(False, "Keep pairs whose chosen answer refuses.")
    held_out: float = pairs(0.05, "Share of the pairs kept for the preference accuracy.", ge=0.0, lt=1.0)
    most_held_out: int = pairs(256, "At most so many of them.", ge=1)
    beta: float = pairs(0.1, "How strongly DPO holds to the edited model.", gt=0.0)
    quantise: Literal["auto", "4bit", "none"] = lora("auto", "auto, 4bit (QLoRA, on CUDA) or none.")
    rank: int = lora(64, own=16, ge=1)
    alpha: float = lora(32.0, own=16.0, gt=0.0)
    dropout: float = lora(0.05, own=0.0, ge=0.0, lt=1.0)
    target_modules: str = lora("all-linear", "all-linear, or names with commas between.")
    learning_rate: float = training(5e-6, "At its highest.", own=2e-3, gt=0.0)
    scheduler: str = training("cosine", "As in transformers.")
    warmup: float = training(0.02, "Steps, or below 1 their share.", own=5.0, ge=0.0)  # the article's 100 of 4,900
    epochs: float = training(1.0, own=2.0, gt=0.0)
    max_steps: int | None = training(None, "Stop after so many steps.", ge=1)
    micro_batch: int = training(1, "Examples a process runs at once.", own=16, ge=1)
    accumulation: int = training(8, "Micro-batches a step adds up.", own=1, ge=1)
    max_length: int = training(2048, "Most tokens of a conversation.", ge=8)
    optimizer: str = training("auto", "As in transformers; auto: paged 8-bit AdamW on CUDA, AdamW elsewhere.")
    weight_decay: float = training(0.0, ge=0.0)
    max_grad_norm: float = training(1.0, "Gradients are scaled down to this norm.", gt=0.0)
    bf16: Literal["auto", "yes", "no"] = training("auto", "Arithmetic in bfloat16: auto, yes or no.")
    gradient_checkpointing: bool = training(
        True, "Less memory, slower.", said="on; self where memory asks for it", own=False
    )
    save_steps: int = training(100, "Steps between checkpoints, which --resume goes on from; 0: none.", own=20, ge=0)
    log_steps: int = training(1, "Steps between points of the curves.", ge=1)
    report_to: Literal["none", "wandb", "trackio"] = training(
        "none", "Curves beside TensorBoard's: wandb, trackio or none."
    )
    launch: str | None = launching(None, "ddp, fsdp, zero2, zero3 or an accelerate configuration (.yaml).")
    processes: int | None = launching(None, "How many.", said="one per GPU", ge=1)
    self_teaching: SelfSettings = Field(default_factory=SelfSettings)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        """The preset's defaults under what is given; None means not given."""
        if not isinstance(given, Mapping):
            return given
        kept = {name: value for name, value in given.items() if value is not None}
        return {**PRESET_DEFAULTS.get(str(kept.get("preset", "dpo")), {}), **kept}


PRESET_DEFAULTS: dict[str, dict[str, Any]] = {"dpo": {}, "self": extras(HealSettings, "own")}
"""What a preset has instead of a field's default, which is the article's (dpo)."""


class HealRunSettings(RunSettings):
    """All of `abliterate heal`: how models are loaded, prompts found and measured as in `run`, and `heal`."""

    resume: bool = option(False, "Go on with an interrupted training of the same settings.")
    heal: HealSettings = Field(default_factory=lambda: HealSettings.model_validate({}))
