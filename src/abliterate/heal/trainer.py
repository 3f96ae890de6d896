"""What a preset needs of transformers' Trainer: loading, LoRA, arguments, checkpoints, progress, curves.

Use, in a preset:

    with watched(job, reporter) as callbacks:
        handle = open_for_training(job, reporter)
        trainer = SomeTrainer(handle.model, SomeConfig(**trainer_arguments(job)), ..., callbacks=callbacks)
        seconds = run_trainer(trainer, job)
        save_adapter(trainer, job)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from abliterate.common.errors import NonFiniteError, OutputError, shorten
from abliterate.common.files import whole_folder, write_text
from abliterate.common.reporting import Reporter, Tick, untold
from abliterate.heal.surroundings import check_packages, resolve_auto, surroundings
from abliterate.heal.training import Job
from abliterate.models.handle import Handle
from abliterate.models.loading import load
from abliterate.prompts.chat import fixed, resolve_chat_template

KEPT_CHECKPOINTS = 2
SAID_LINES = 20
WHOLE = "abliterate-whole"
JOB_FILE = "job.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
SHOWN = {
    "loss": "loss", "rewards/margins": "reward margin", "rewards/accuracies": "accuracy",
    "divergence": "divergence", "learning_rate": "learning rate",
}  # fmt: skip
FORCE_VALUES = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# What may differ between the training that is resumed and the one that resumes it.
FREE_ON_RESUME = ("launch", "processes", "report_to", "log_steps", "save_steps")


def processes() -> int:
    """How many processes train together, as `accelerate launch` set it; 1 outside of it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def _shards_parameters() -> bool:
    """Whether accelerate will spread the parameters over processes itself, and so wants them on the CPU."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or (
        os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
        and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    )


def open_for_training(job: Job, reporter: Reporter) -> Handle:
    """Load the edited model as it is trained: in four bits or not, on this process's device, with a chat template.

    The tokenizer has the template in the end: the one asked for, the model's own, or ChatML.

    Raises:
        ModelError: it can't be loaded.
        AbliterateError: four bits were asked for and can't be had.
    """
    settings, heal = job.settings.load, resolve_auto(job.settings.heal)
    device_map = settings.device or settings.device_map
    if device_map is None and _shards_parameters():
        device_map = "cpu"
    elif device_map is None and torch.cuda.is_available() and processes() > 1:
        device_map = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if is_main():
        reporter.say(f"loading {job.model} to train it")
    handle = load(
        job.model,
        dtype=settings.dtype,
        device_map=device_map,
        quantise="4bit" if heal.quantise == "4bit" else None,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        chat_template=settings.chat_template,
        system_prompt=settings.system_prompt,
    )
    template = settings.chat_template
    if template is None and not handle.tokenizer.chat_template:
        template = handle.chat_template = "chatml"
        if is_main():
            reporter.say("the model has no chat template: chatml is used, and saved with it")
    handle.tokenizer.chat_template = fixed(resolve_chat_template(handle.tokenizer, template))
    return handle


def without_dropout(model: torch.nn.Module) -> None:
    """Turn off the model's own dropout: only the LoRA's is wanted, and none where it is the reference."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def trainer_arguments(job: Job) -> dict[str, Any]:
    """Arguments of `transformers.TrainingArguments` that both presets have in common."""
    heal = resolve_auto(job.settings.heal)
    cuda = torch.cuda.is_available()
    # transformers 5.24 calls it so, and warns of the name before
    new = "activation_checkpointing"
    checkpointing = new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
    arguments: dict[str, Any] = {
        "output_dir": str(job.checkpoints),
        "per_device_train_batch_size": heal.micro_batch,
        "per_device_eval_batch_size": heal.micro_batch,
        "gradient_accumulation_steps": heal.accumulation,
        "num_train_epochs": heal.epochs,
        "max_steps": heal.max_steps or -1,
        "optim": heal.optimizer,
        "lr_scheduler_type": heal.scheduler,
        "learning_rate": heal.learning_rate,
        "warmup_steps": heal.warmup,
        "weight_decay": heal.weight_decay,
        "max_grad_norm": heal.max_grad_norm,
        "bf16": heal.bf16 == "yes",
        checkpointing: heal.gradient_checkpointing,
        "seed": job.settings.seed,
        "data_seed": job.settings.seed,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "ddp_find_unused_parameters": False,
        "logging_steps": heal.log_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if heal.save_steps else "no",
        "save_total_limit": KEPT_CHECKPOINTS,
        "eval_strategy": "no",
        "report_to": [] if heal.report_to == "none" else [heal.report_to],
        "run_name": job.folder.name,
        "disable_tqdm": True,
        "log_level": "error",
    }
    if heal.save_steps:
        arguments["save_steps"] = heal.save_steps
    if heal.gradient_checkpointing:
        arguments[f"{checkpointing}_kwargs"] = {"use_reentrant": False}
    return arguments


# --- The folder, its checkpoints, and whether they may be gone on with ----------------------------


def prepare_folder(job: Job) -> None:
    """Make the folder ready, once, before any process trains: old checkpoints go, or are checked when resuming.

    Raises:
        OutputError: the checkpoints are of a training with other settings; names the first that differs.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    if not job.resume:
        for old in (job.checkpoints, job.curves, job.adapter):
            shutil.rmtree(old, ignore_errors=True)
    wanted, file = _what_matters(job), job.folder / JOB_FILE
    if job.resume and file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        for name in wanted:
            if found.get(name) != wanted[name]:
                raise OutputError(
                    f"{job.folder} holds a training with {name} = {found.get(name)!r}, not {wanted[name]!r}; "
                    "resume it with its own settings, or start anew without --resume"
                )
    write_text(file, json.dumps(wanted, indent=2) + "\n")
    for folder in _checkpoint_folders(job):
        if not (folder / WHOLE).is_file():  # the process was killed while it wrote this one
            shutil.rmtree(folder, ignore_errors=True)


def last_checkpoint(job: Job) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [folder for folder in _checkpoint_folders(job) if (folder / WHOLE).is_file()]
    return max(whole, key=_step, default=None)


def _checkpoint_folders(job: Job) -> list[Path]:
    return [path for path in job.checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _what_matters(job: Job) -> dict[str, Any]:
    """What a training must share with the one it goes on with."""
    settings = job.settings
    heal = {f"heal.{k}": v for k, v in settings.heal.model_dump(mode="json").items() if k not in FREE_ON_RESUME}
    return {"model": job.model, "original": job.original, "seed": settings.seed, **heal}


# --- Watching a training -------------------------------------------------------------------------


@contextlib.contextmanager
def watched(job: Job, reporter: Reporter) -> Iterator[list[TrainerCallback]]:
    """Callbacks that report, draw TensorBoard's curves and mark whole checkpoints; the libraries' own bars off.

    Raises:
        AbliterateError: out of memory, in one line with what helps; TensorBoard or the tracker asked for is missing.
    """
    check_packages(job.settings.heal)
    callbacks: list[TrainerCallback] = [_Progress(reporter), _MarkWhole()]
    with contextlib.ExitStack() as after:
        if is_main():
            from torch.utils.tensorboard import SummaryWriter
            from transformers.integrations import TensorBoardCallback

            last = last_checkpoint(job) if job.resume else None
            writer = SummaryWriter(str(job.curves), purge_step=_step(last) + 1 if last else None)
            after.callback(writer.close)
            callbacks.append(TensorBoardCallback(writer))
        after.enter_context(surroundings(job.settings.heal))
        yield callbacks


def run_trainer(trainer: Any, job: Job) -> float:
    """Train, from the last checkpoint when the job resumes; returns the seconds it took.

    Raises:
        OutputError: the checkpoint is damaged, or holds more than tensors and plain values.
    """
    trainer.remove_callback(PrinterCallback)
    last = last_checkpoint(job) if job.resume else None
    start = time.monotonic()
    with _values_alone(last):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return time.monotonic() - start


@contextlib.contextmanager
def _values_alone(checkpoint: Path | None) -> Iterator[None]:
    """Have torch read nothing from a checkpoint's .pt files but tensors and plain values, whoever reads them.

    A pickle can run code when it is read. transformers and accelerate ask torch for `weights_only` themselves,
    DeepSpeed asks for the opposite; the environment variable outweighs both.

    Raises:
        OutputError: a file is damaged or holds anything else.
    """
    if checkpoint is None:
        yield
        return
    before = os.environ.get(FORCE_VALUES)
    os.environ[FORCE_VALUES] = "1"
    try:
        with torch.serialization.safe_globals(_of_deepspeed()):
            yield
    except pickle.UnpicklingError as error:
        raise OutputError(
            f"{checkpoint} can't be read, to go on from: it is damaged, or holds what could run code "
            f"({shorten(str(error), 120)}); start anew without --resume"
        ) from error
    finally:
        if before is None:
            del os.environ[FORCE_VALUES]
        else:
            os.environ[FORCE_VALUES] = before


def _of_deepspeed() -> list[Any]:
    """The classes of DeepSpeed whose values stand in its checkpoints: plain numbers with a name."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        return []
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, ZeroStageEnum, fragment_address]


def save_adapter(trainer: Any, job: Job) -> Path:
    """Write the trained adapter, gathered from all processes, as its two files; every process must call this."""
    gathered = job.folder / ".gathered"
    trainer.save_model(str(gathered))
    if is_main():
        with whole_folder(job.adapter, overwrite=True) as temporary:
            for name in ADAPTER_FILES:
                shutil.copyfile(gathered / name, temporary / name)
        shutil.rmtree(gathered, ignore_errors=True)
    return job.adapter


def history_of(trainer: Any) -> list[dict[str, Any]]:
    """The Trainer's log without the closing summary: one dictionary a point, each with `step`."""
    return [dict(point) for point in trainer.state.log_history if "train_runtime" not in point]


class _Progress(TrainerCallback):
    """Tells a reporter how a training goes, from the main process only, and stops at a loss that isn't finite."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.tick: Tick = untold
        self.said = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            if state.global_step:
                self.reporter.say(f"going on from step {state.global_step} of {state.max_steps}")
            self.tick = self.reporter.progress("training", state.max_steps - state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tick(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(float(loss)):
            raise NonFiniteError(
                f"the loss at step {state.global_step} is {loss}; make --learning-rate smaller, or pass --bf16 no"
            )
        line = state.global_step * SAID_LINES // max(1, state.max_steps)
        if state.is_world_process_zero and line > self.said:
            self.said = line
            shown = ", ".join(f"{name} {float(logs[key]):.4g}" for key, name in SHOWN.items() if key in (logs or {}))  # type: ignore[index]
            self.reporter.say(f"step {state.global_step} of {state.max_steps}: {shown}")


class _MarkWhole(TrainerCallback):
    """Leaves a mark in each checkpoint that was written to its end."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()
