"""The same preference tuning as a configuration of Axolotl, the tool that the article trains with.

Keys and values are those of Axolotl's published schema (`axolotl.utils.schemas`, 0.19.0); a test holds the keys to it.
Axolotl can't leave out pairs whose chosen answer refuses, so the pairs that are left are written beside the
configuration, and it trains on the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abliterate.common.errors import AbliterateError
from abliterate.common.files import check_file, whole_file, write_text
from abliterate.common.reporting import Reporter
from abliterate.heal.preferences import Pair, load_preferences
from abliterate.heal.training import Job
from abliterate.measure.judges import make_judge

PAIRS_SUFFIX, HELD_OUT_SUFFIX = ".pairs.jsonl", ".held-out.jsonl"
DEEPSPEED = {"zero2": "deepspeed_configs/zero2.json", "zero3": "deepspeed_configs/zero3.json"}
"""Files that `axolotl fetch deepspeed_configs` puts there."""


def write_axolotl(job: Job, file: Path, *, overwrite: bool = False, reporter: Reporter | None = None) -> dict[str, Any]:
    """Write the job's training for Axolotl: `FILE`, and beside it the pairs (FILE's name and `.pairs.jsonl`).

    Args:
        job: what would be trained; nothing is.
        file: the configuration, .yaml or .yml; paths in it are relative to where FILE's own path is.
        overwrite: replace what is there.
        reporter: told which pairs are left out.

    Returns:
        The configuration.

    Raises:
        AbliterateError: the preset isn't dpo, the data can't be read, or a chat template can't be expressed.
        OutputError: a file is there already or can't be written.
    """
    import yaml

    heal = job.settings.heal
    if heal.preset != "dpo":
        raise AbliterateError(f"--write-axolotl is for --preset dpo; Axolotl has nothing like {heal.preset}")
    pairs_file = file.with_name(file.stem + PAIRS_SUFFIX)
    held_out_file = file.with_name(file.stem + HELD_OUT_SUFFIX)
    for path in (file, pairs_file, held_out_file):
        check_file(path, overwrite=overwrite)
    judge = make_judge(job.settings.measure.judge)
    data = load_preferences(heal, seed=job.settings.seed, judge=judge, reporter=reporter)
    _write_pairs(data.train, pairs_file, job.settings.load.system_prompt)
    if data.held_out:
        _write_pairs(data.held_out, held_out_file, job.settings.load.system_prompt)
    document = axolotl_configuration(job, pairs_file, held_out_file if data.held_out else None)
    write_text(file, _heading(file) + yaml.safe_dump(document, sort_keys=False))
    return document


def axolotl_configuration(job: Job, pairs: Path, held_out: Path | None) -> dict[str, Any]:
    """The settings in Axolotl's words.

    Args:
        job: what would be trained.
        pairs, held_out: files that `write_axolotl` writes.

    Raises:
        AbliterateError: the chat template is given as its text.
    """
    settings = job.settings
    load, heal = settings.load, settings.heal
    four_bits = heal.quantise != "none"  # Axolotl trains on CUDA
    modules = [name.strip() for name in heal.target_modules.split(",")]
    document: dict[str, Any] = {
        "base_model": job.model,
        "load_in_4bit": four_bits,
        "strict": False,
        "rl": "dpo",
        "rl_beta": heal.beta,
        **_template(load.chat_template),
        "datasets": [_dataset(pairs)],
        "val_set_size": 0.0,
        "output_dir": str(job.folder),
        "adapter": "qlora" if four_bits else "lora",
        "lora_r": heal.rank,
        "lora_alpha": _plain(heal.alpha),
        "lora_dropout": heal.dropout,
        **({"lora_target_linear": True} if modules == ["all-linear"] else {"lora_target_modules": modules}),
        "sequence_len": heal.max_length,
        "excess_length_strategy": "truncate",
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "micro_batch_size": heal.micro_batch,
        "gradient_accumulation_steps": heal.accumulation,
        "num_epochs": heal.epochs,
        "optimizer": "paged_adamw_8bit" if heal.optimizer == "auto" else heal.optimizer,
        "lr_scheduler": heal.scheduler,
        "learning_rate": heal.learning_rate,
        **({"warmup_ratio": heal.warmup} if heal.warmup < 1 else {"warmup_steps": int(heal.warmup)}),
        "weight_decay": heal.weight_decay,
        "max_grad_norm": heal.max_grad_norm,
        "bf16": {"auto": "auto", "yes": True, "no": False}[heal.bf16],
        "gradient_checkpointing": heal.gradient_checkpointing,
        "logging_steps": heal.log_steps,
        "save_total_limit": 2,
        "use_tensorboard": True,
        "seed": settings.seed,
    }
    if held_out is not None:
        document["test_datasets"] = [_dataset(held_out)]
    if heal.gradient_checkpointing:
        # ZeRO-3 gathers parameters anew for the second forward, which only the reentrant kind bears with LoRA
        document["gradient_checkpointing_kwargs"] = {"use_reentrant": heal.launch == "zero3"}
    if heal.max_steps is not None:
        document["max_steps"] = heal.max_steps
    if heal.save_steps:
        document["save_steps"] = heal.save_steps
    if load.revision:
        document["revision_of_model"] = load.revision
    if load.trust_remote_code:
        document["trust_remote_code"] = True
    return document | _tracker(heal.report_to) | _spread(heal.launch)


def _template(given: str | None) -> dict[str, Any]:
    if given is None:
        return {"chat_template": "tokenizer_default_fallback_chatml"}
    if given == "chatml":
        return {"chat_template": "chatml"}
    return {"chat_template": "jinja", "chat_template_jinja": given}


def _dataset(file: Path) -> dict[str, Any]:
    return {
        "path": str(file), "split": "train", "type": "chat_template.default", "field_messages": "messages",
        "field_chosen": "chosen", "field_rejected": "rejected",
    }  # fmt: skip


def _tracker(name: str) -> dict[str, Any]:
    if name == "wandb":
        return {"use_wandb": True, "wandb_project": "abliterate", "wandb_mode": "offline"}
    return {"use_trackio": True, "trackio_project_name": "abliterate"} if name == "trackio" else {}


def _spread(launch: str | None) -> dict[str, Any]:
    """Several GPUs; a file of accelerate's is for `axolotl train --launcher accelerate`, and not in here."""
    if launch in DEEPSPEED:
        return {"deepspeed": DEEPSPEED[launch]}
    if launch != "fsdp":
        return {}
    fsdp = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True, "offload_params": False}
    return {"fsdp_version": 2, "fsdp_config": {**fsdp, "state_dict_type": "FULL_STATE_DICT"}}


def _plain(number: float) -> int | float:
    """A whole number as such: Axolotl's alpha is an integer.

    Raises:
        AbliterateError: it isn't whole.
    """
    if number != int(number):
        raise AbliterateError(f"--alpha {number} is not a whole number, which Axolotl needs")
    return int(number)


def _write_pairs(pairs: Sequence[Pair], file: Path, system_prompt: str | None) -> None:
    with whole_file(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for pair in pairs:
            row = {
                "messages": pair.after(system_prompt),
                "chosen": {"role": "assistant", "content": pair.chosen},
                "rejected": {"role": "assistant", "content": pair.rejected},
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def _heading(file: Path) -> str:
    return (
        "# Written by `abliterate heal --write-axolotl`, keys as in Axolotl 0.19.0. Train with:\n"
        f"#   axolotl train {file.name}\n"
    )
