"""`self`: the original model teaches the edited one along its own answers, without a data set.

A LoRA on the edited model's linear layers lowers

    KL(original || edited) along the original's answers to baseline prompts  +  hold * refusing

where refusing is the fit's stand-in (`search.stand_ins.Refusing`): the odds of the openings of the refusals that the
original gives to target prompts, worth nothing once they are small. Refusals in other words that turn up on the way
are taken in too. The original's distributions are computed first and kept compactly, so that one model is in memory
at a time. Distillation along a teacher's own answers: Kim and Rush 2016 (sequences), Hinton et al. 2015 (softened
labels, here at temperature 1).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from abliterate.common.errors import AbliterateError, ModelError
from abliterate.common.reporting import SILENT, Reporter
from abliterate.heal.lesson import Lesson
from abliterate.heal.surroundings import memory_advised
from abliterate.heal.teacher import Teacher, open_lessons, open_teacher
from abliterate.heal.training import Job, Training, lora_config, write_configuration
from abliterate.models.handle import Handle
from abliterate.prompts.sets import Sides
from abliterate.run.facts import shared_prompts, side_facts
from abliterate.run.opening import open_model
from abliterate.settings.heal import HealRunSettings


def train(
    job: Job,
    *,
    handle: Handle | None = None,
    reporter: Reporter | None = None,
    teacher: Teacher | None = None,
    sides: Sides | None = None,
) -> Training:
    """Heal the edited model by what the original says.

    The original is loaded first, and let go before the edited model is loaded. On a CPU the same job, machine and
    versions give the same weights bit for bit, also when it was killed on the way and resumed.

    Args:
        job: what to train; `job.original` is the teacher.
        handle: the edited model where the caller has loaded it; it is left as it was.
        reporter: told how it goes.
        teacher: what the original said, where the caller has it (`open_teacher`).
        sides: the prompts, where the caller has them.

    Raises:
        AbliterateError: when there is no original, or it answers nothing.
        NonFiniteError: when the loss isn't finite.
        OutputError: when `job.resume` and what is there is of another training.
    """
    reporter = reporter or SILENT
    settings = job.settings
    sides = sides or open_lessons(settings)
    teacher = teacher or open_teacher(job, sides, reporter=reporter)
    if handle is None:
        reporter.say(f"loading {job.model}")
        handle = open_model(job.model, settings.load)
    if handle.prompt_ids(sides.baseline.train.texts[:1])[0] != teacher.reads:
        raise ModelError(
            f"{job.model} reads prompts as other tokens than {job.original}; heal it with its own original"
        )
    with _lora(handle, settings) as lora, memory_advised(settings.heal):
        lesson = Lesson(job, handle, lora, teacher, sides, reporter)
        lesson.run()
        lesson.write_adapter()
        training = lesson.training()
    data = shared_prompts({"target": side_facts(sides.target), "baseline": side_facts(sides.baseline)})
    for side in data.values():
        del side["test"]
    settings_used = {**training.resolved, "seed": settings.seed}
    write_configuration(job, data, settings_used, results=training.results)
    return training


@contextlib.contextmanager
def _lora(handle: Handle, settings: HealRunSettings) -> Iterator[Any]:
    """The model with a fresh LoRA, which does nothing yet; as it was when the block ends."""
    from peft import get_peft_model

    config = lora_config(settings.heal)
    if config.target_modules == "all-linear":
        config.target_modules = _linear(handle)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going away
        torch.manual_seed(settings.seed)
        try:
            lora = get_peft_model(handle.model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise AbliterateError(f"--target-modules {settings.heal.target_modules}: {error}") from error
    try:
        yield lora
    finally:
        handle.model = lora.unload()
        handle.model.requires_grad_(False)


def _linear(handle: Handle) -> list[str]:
    """Names of the linear layers inside the decoder's blocks."""
    from transformers.pytorch_utils import Conv1D

    inside = {module for module in handle.blocks.modules() if isinstance(module, nn.Linear | Conv1D)}
    return [name for name, module in handle.model.named_modules() if module in inside]
