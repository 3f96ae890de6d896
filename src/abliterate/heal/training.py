"""What the presets share: the job that a process is given, and the training it hands back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from abliterate.common.files import write_text
from abliterate.common.names import public_name
from abliterate.settings.heal import HealRunSettings, HealSettings

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
CURVES = "runs"
CONFIGURATION = "heal.json"


class Job(BaseModel):
    """One training, as any process can start it from a JSON file (`abliterate.heal.worker`).

    Attributes:
        model: source of the edited model (folder, Hub id, GGUF file), which is trained.
        original: source of the original model, for the preset `self`.
        folder: everything the training writes goes below: `adapter/` (PEFT, safetensors), `checkpoints/`, `runs/`.
        settings: all settings.
        resume: go on from the last checkpoint in the folder, if there is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    original: str | None = None
    folder: Path
    settings: HealRunSettings
    resume: bool = False

    @property
    def adapter(self) -> Path:
        return self.folder / ADAPTER

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def curves(self) -> Path:
        """TensorBoard's folder."""
        return self.folder / CURVES


@dataclass(frozen=True)
class Training:
    """What a training left.

    Attributes:
        adapter: folder of the PEFT adapter (safetensors) that heals the edited model.
        history: the Trainer's log: one dictionary a point, with `step` and numbers such as `loss`.
        resolved: every setting as it was used, "auto" replaced by what it came to.
        seconds: of training, without loading.
        results: the preset's own numbers; all can stand in results.json.
    """

    adapter: Path
    history: list[dict[str, Any]]
    resolved: dict[str, Any]
    seconds: float
    results: dict[str, Any] = field(default_factory=dict)


def lora_config(heal: HealSettings) -> Any:
    """The LoRA (Hu et al. 2021) that is trained; its B starts at zero, so training starts at the edited model."""
    from peft import LoraConfig

    names = [name.strip() for name in heal.target_modules.split(",") if name.strip()]
    return LoraConfig(
        r=heal.rank,
        lora_alpha=heal.alpha,  # type: ignore[arg-type]  # peft only divides it
        lora_dropout=heal.dropout,
        target_modules="all-linear" if names == ["all-linear"] else names,
        bias="none",
        task_type="CAUSAL_LM",
    )


def write_configuration(
    job: Job, data: dict[str, Any], settings: dict[str, Any], *, packages: Sequence[str] = (), **more: Any
) -> None:
    """Write heal.json, the resolved configuration, into the job's folder.

    Args:
        job: what was trained.
        data: what was learnt from, without paths of this machine.
        settings: as they were used.
        packages: whose versions count beside those that every preset needs.
        more: further fields.
    """
    from importlib.metadata import version

    original = {"original": public_name(job.original)} if job.original else {}
    document = {
        "preset": job.settings.heal.preset,
        "model": public_name(job.model),
        **original,
        "data": data,
        "settings": settings,
        **more,
        "versions": {name: version(name) for name in ("abliterate", "torch", "transformers", "peft", *packages)},
    }
    write_text(job.folder / CONFIGURATION, json.dumps(document, indent=2) + "\n")
