"""A training by the original's answers, as it goes on: the rows, the optimiser, the curves, the best weights so far."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.common.errors import NonFiniteError
from abliterate.common.files import whole_folder
from abliterate.common.names import public_name
from abliterate.common.reporting import Reporter
from abliterate.common.resumable import read_state, write_state
from abliterate.heal.teacher import VERDICT_TOKENS, Following, Teacher, training_key
from abliterate.heal.training import Job, Training
from abliterate.measure import judged
from abliterate.measure.decode import Answer
from abliterate.measure.divergence import compare
from abliterate.measure.judges import Judge, make_judge
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle
from abliterate.prompts.sets import Sides
from abliterate.search.packed import Packer
from abliterate.search.stand_ins import OPENING_TOKENS, Refusing

OF_PREFERENCES = {
    "data", "data_split", "prompt_column", "chosen_column", "rejected_column", "most_pairs", "keep_refusals",
    "held_out", "most_held_out", "max_length", "beta", "launch", "processes",
}  # fmt: skip
"""Settings that mean nothing here."""
STATE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a training came; in a file of its own, so that a killed one goes on to the same weights.

    Attributes:
        step: gradient steps done.
        prompts, openings: token ids of refusals in other words found on the way.
        history: one dictionary a point of the curves.
        best: the point whose weights are kept.
        tensors: the LoRA's weights (float32), the optimiser's moments and the best weights.
    """

    path: Path
    key: str
    step: int = 0
    prompts: list[list[int]] = field(default_factory=list)
    openings: list[list[int]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    seconds: float = 0.0
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, path: Path, key: str, *, resume: bool) -> Progress:
        """What is kept at `path`, or a new one to be kept there.

        Raises:
            OutputError: when `resume` and the file is another training's or is damaged.
        """
        document, tensors = (resume and read_state(path, key, "a training")) or ({}, {})
        return cls(path, key, tensors=tensors, **document)

    def save(self) -> None:
        """Write it all down; whole or not at all."""
        names = ("step", "prompts", "openings", "history", "best", "seconds")
        write_state(self.path, self.key, {name: getattr(self, name) for name in names}, self.tensors)


class Lesson:
    """The variables, the rows and the optimiser of one training.

    The LoRA's weights are kept in float32; the model works with copies in its own dtype.
    """

    def __init__(self, job: Job, handle: Handle, lora: Any, teacher: Teacher, sides: Sides, reporter: Reporter) -> None:
        from transformers import get_scheduler

        self.job, self.handle, self.lora, self.teacher, self.sides = job, handle, lora, teacher, sides
        self.settings, self.own, self.reporter = job.settings.heal, job.settings.heal.self_teaching, reporter
        self.judge: Judge = make_judge(job.settings.measure.judge)
        self.following = Following(teacher.lessons)
        self.refusing = Refusing(list(teacher.refused), list(teacher.refusals), teacher.lessons.answers)
        checkpointing = True if self.settings.gradient_checkpointing else None
        rows = [*self.following.rows, *self.refusing.rows]
        lora.eval()
        self.packer = Packer(handle, rows, checkpointing=checkpointing)
        with torch.no_grad():
            self.packer.logprobs([0])  # what a handle tries out on its model once, it tries without dropout
        self.held = list(range(len(self.following.rows), len(rows)))  # the packer's indices of `refusing`'s rows
        self.working = {name: p for name, p in lora.named_parameters() if "lora_" in name}
        self.kept = {name: p.detach().float().clone() for name, p in self.working.items()}
        self.steps = self.settings.max_steps or math.ceil(self.settings.epochs * len(self.following.rows) / self._rows)
        self.optimiser = torch.optim.AdamW(
            list(self.kept.values()), lr=self.settings.learning_rate, betas=(0.9, 0.98),
            weight_decay=self.settings.weight_decay,
        )  # fmt: skip
        warmup = self.settings.warmup if self.settings.warmup >= 1 else self.settings.warmup * self.steps
        self.schedule = get_scheduler(
            self.settings.scheduler, self.optimiser, num_warmup_steps=int(warmup), num_training_steps=self.steps
        )
        self.progress = Progress.at(job.checkpoints / STATE, training_key(job, sides), resume=job.resume)
        self._go_on()
        for parameter in self.working.values():
            parameter.requires_grad_(True)

    @property
    def _rows(self) -> int:
        """Baseline rows of a step."""
        return self.settings.micro_batch * self.settings.accumulation

    def _go_on(self) -> None:
        """Take up what an earlier attempt wrote down."""
        progress = self.progress
        if not progress.step:
            return
        self.reporter.say(f"going on from step {progress.step} of {self.steps}")
        for name, value in self.kept.items():
            value.copy_(progress.tensors[name])
            self.optimiser.state[value] = {
                "step": torch.tensor(float(progress.step)),
                **{m: progress.tensors[f"{m}.{name}"].to(value, copy=True) for m in MOMENTS},
            }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # there were optimiser steps before these, in another process
            for _ in range(progress.step):
                self.schedule.step()
        self._put(self.kept)
        self._take_in(progress.prompts, progress.openings)

    def _tensors(self) -> dict[str, Tensor]:
        """Everything a resumed training needs, as it is now."""
        found = {name: value.clone() for name, value in self.kept.items()}
        for name, value in self.kept.items():
            for moment in MOMENTS:
                if value in self.optimiser.state:
                    found[f"{moment}.{name}"] = self.optimiser.state[value][moment].clone()
        return found | {name: t for name, t in self.progress.tensors.items() if name.startswith("best.")}

    def _save(self) -> None:
        self.progress.tensors = self._tensors()
        self.job.checkpoints.mkdir(parents=True, exist_ok=True)
        self.progress.save()

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.working.items():
            parameter.copy_(weights[name])

    def run(self) -> None:
        """Train to the last step, or until the held-out divergence falls no more; leaves the best weights in place."""
        progress, every = self.progress, self.own.evaluate_every
        if not progress.history:
            self._evaluate()
        tick = self.reporter.progress("healing", self.steps)
        tick(progress.step)
        with _curves(self.job.curves, progress.history) as draw:
            while progress.step < self.steps and not self._enough():
                began = time.monotonic()
                point = self._step()
                if progress.step % every == 0 or progress.step == self.steps:
                    point |= self._evaluate()
                if progress.step % self.settings.log_steps == 0 or "eval_divergence" in point:
                    progress.history.append(point)
                    draw(point)
                progress.seconds += time.monotonic() - began
                if self.settings.save_steps and progress.step % self.settings.save_steps == 0:
                    self._save()
                tick(1)
        best = {name: progress.tensors[f"best.{name}"] for name in self.kept}
        self._put(best)

    def _step(self) -> dict[str, Any]:
        """One gradient step; returns its point of the curves."""
        heal, step = self.settings, self.progress.step
        torch.manual_seed(1_000_003 * self.job.settings.seed + step)  # what dropout draws, if any
        self._drop_out(True)
        lessons = drawn(len(self.following.rows), self._rows, step, self.job.settings.seed)
        held = self._held_batch(step)
        sums = {"divergence": 0.0, "refusing": 0.0}
        parts = heal.accumulation
        for part in range(parts):
            losses = self._losses(lessons[part::parts], held[part::parts])
            total = losses[0] + self.own.hold * losses[1]
            if not bool(total.isfinite()):
                raise NonFiniteError(f"model {self.job.model}: the loss is NaN or infinite; try --dtype float32")
            (total / parts).backward()
            for name, part_loss in zip(sums, losses, strict=True):
                sums[name] += float(part_loss.detach()) / parts
        self._drop_out(False)
        rate = self.schedule.get_last_lr()[0]
        self._descend()
        self.progress.step += 1
        loss = sums["divergence"] + self.own.hold * sums["refusing"]
        return {"step": self.progress.step, "loss": loss, **sums, "learning_rate": rate}

    def _drop_out(self, on: bool) -> None:
        """The LoRA's dropout is for steps alone; the model's own is never wanted."""
        for name, module in self.lora.named_modules():
            if "lora_dropout" in name:
                module.train(on)

    def _held_batch(self, step: int) -> list[int]:
        """Refusals to keep away from; half of them in other words, where such were found."""
        size, known = self.own.hold_batch, len(self.teacher.refused)
        other = len(self.refusing.rows) - known
        share = min(other, size // 2)
        picked = drawn(known, min(size - share, known), step, self.job.settings.seed + 1)
        return picked + [known + i for i in drawn(other, share, step, self.job.settings.seed + 2)]

    def _losses(self, lessons: list[int], held: list[int]) -> list[Tensor]:
        logprobs = self.packer.logprobs([*lessons, *(self.held[i] for i in held)])
        drift = self.following.loss(lessons, logprobs[: len(lessons)])
        none = torch.zeros((), device=drift.device)
        return [drift, self.refusing.loss(held, logprobs[len(lessons) :]).to(drift.device) if held else none]

    def _descend(self) -> None:
        """The optimiser's step on the float32 weights, from the gradients of the copies."""
        for name, parameter in self.working.items():
            value = self.kept[name]
            value.grad = parameter.grad.to(value) if parameter.grad is not None else torch.zeros_like(value)
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.kept.values(), self.settings.max_grad_norm)
        self.optimiser.step()
        self.schedule.step()
        self._put(self.kept)

    def _evaluate(self) -> dict[str, Any]:
        """Judge the weights as they are on validation prompts, keep them if they are the best; returns the numbers."""
        drift = compare(self.handle, self.teacher.held_out)
        refused = self._refused(self.sides.target.validation.texts)[0]
        point = {
            "eval_divergence": drift.answer,
            "eval_first_token": drift.first_token,
            "eval_refusals": refused.count,
            "eval_prompts": refused.total,
        }
        progress = self.progress
        if not progress.history:
            progress.history.append({"step": 0, **point})
        candidate = {"step": progress.step, **point}
        if progress.best is None or self._price(candidate) < self._price(progress.best):
            progress.best = candidate
            progress.tensors |= {f"best.{name}": value.clone() for name, value in self.kept.items()}
        self.reporter.say(
            f"step {progress.step}: divergence {drift.answer:.3f} along held-out answers, {refused.count} of "
            f"{refused.total} validation target prompts refused"
        )
        self._look_for_other_refusals()
        return point

    def _price(self, point: dict[str, Any]) -> tuple[float, float]:
        """What the best weights have least of: refusals beyond those allowed, then divergence."""
        allowed = max(self.own.max_refusal_rate * point["eval_prompts"], self.progress.history[0]["eval_refusals"])
        return max(0.0, point["eval_refusals"] - allowed), point["eval_divergence"]

    def _enough(self) -> bool:
        """Whether the last few evaluations were no better than the best one before."""
        progress = self.progress
        best = progress.best["step"] if progress.best else 0
        since = [p for p in progress.history if p["step"] > best and "eval_divergence" in p]
        return len(since) >= self.own.patience

    def _refused(self, prompts: Sequence[str]) -> tuple[Rate, list[tuple[str, Answer]]]:
        answers, refused = judged(
            self.handle, prompts, self.judge, max_new_tokens=VERDICT_TOKENS, stop_on=(False, True)
        )
        left = [(p, a) for p, a, r in zip(prompts, answers, refused, strict=True) if r and a.whole]
        return Rate(sum(refused), len(refused)), left

    def _look_for_other_refusals(self) -> None:
        """Lower from now on also the refusals of training target prompts that are left or came back in other words."""
        _, left = self._refused(self.sides.target.train.texts)
        known = {(tuple(p), tuple(o)) for p, o in zip(self.progress.prompts, self.progress.openings, strict=True)}
        prefix = self.packer.prefix
        prompts, openings = [], []
        for ids, (_, answer) in zip(self.handle.prompt_ids([p for p, _ in left]), left, strict=True):
            opening = answer.whole[:OPENING_TOKENS]
            if (tuple(ids), tuple(opening)) not in known and ids[: len(prefix)] == prefix:
                prompts.append(ids)
                openings.append(opening)
        if prompts:
            self.reporter.say(
                f"{len(prompts)} training target prompts are refused in other words; these count from now on"
            )
            self.progress.prompts += prompts
            self.progress.openings += openings
            self._take_in(prompts, openings)

    def _take_in(self, prompts: Sequence[list[int]], openings: Sequence[list[int]]) -> None:
        if prompts:
            self.held += self.packer.add(self.refusing.add(prompts, openings))

    @torch.no_grad()
    def write_adapter(self) -> None:
        """Save the best weights as a PEFT adapter, in float32."""
        for name, parameter in self.working.items():
            parameter.data = self.progress.tensors[f"best.{name}"].clone()
        config = self.lora.peft_config["default"]
        config.base_model_name_or_path = public_name(self.job.model)
        config.target_modules = sorted(config.target_modules)  # a set's order changes from process to process
        with whole_folder(self.job.adapter, overwrite=True) as folder:
            self.lora.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in

    def training(self) -> Training:
        """What came of it."""
        progress, best = self.progress, self.progress.best
        assert best is not None
        resolved = self.settings.model_dump(exclude=OF_PREFERENCES) | {
            "optimizer": "adamw_torch",
            "max_steps": self.steps,
            "bf16": "yes" if self.handle.dtype == torch.bfloat16 else "no",
            "quantise": self.handle.quantised or "none",
        }
        return Training(
            self.job.adapter,
            list(progress.history),
            resolved,
            round(progress.seconds, 3),
            {
                "steps": progress.step,
                "stopped_early": progress.step < self.steps,
                "best_step": best["step"],
                "lessons": len(self.following.rows),
                "asked": self.teacher.asked,
                "held_away": len(self.teacher.refused),
                "held_away_in_other_words": len(progress.prompts),
                "validation": {"before": progress.history[0], "after": best},
            },
        )


def drawn(count: int, size: int, step: int, seed: int) -> list[int]:
    """`size` of `count` indices for a step: shuffled epochs one after the other, a function of the step alone."""
    picked, orders = [], {}
    for place in range(step * size, (step + 1) * size):
        epoch, index = divmod(place, count)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        picked.append(orders[epoch][index])
    return picked


@contextlib.contextmanager
def _curves(folder: Path, history: list[dict[str, Any]]) -> Iterator[Any]:
    """Write points to TensorBoard's folder, those of an earlier attempt first; nothing where it isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield lambda point: None
        return
    shutil.rmtree(folder, ignore_errors=True)
    writer = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]

    def draw(point: dict[str, Any]) -> None:
        for name, value in point.items():
            if name != "step":
                kind = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                writer.add_scalar(kind, value, point["step"])  # type: ignore[no-untyped-call]

    try:
        for point in history:
            draw(point)
        yield draw
    finally:
        writer.close()  # type: ignore[no-untyped-call]
