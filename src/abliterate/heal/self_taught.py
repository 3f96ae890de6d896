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
import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from abliterate.common.errors import AbliterateError, ModelError, NonFiniteError, OutputError
from abliterate.common.files import whole_file, whole_folder
from abliterate.common.reporting import Reporter, Silent
from abliterate.common.resumable import key_of
from abliterate.heal.training import Job, Training
from abliterate.measure import judged
from abliterate.measure.decode import Answer
from abliterate.measure.divergence import Reference, compare, make_reference
from abliterate.measure.judges import Judge, make_judge
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle
from abliterate.prompts.sets import Sides
from abliterate.run.facts import environment
from abliterate.run.opening import open_model, open_prompts
from abliterate.search.packed import Packer, Row
from abliterate.search.stand_ins import OPENING_TOKENS, Refusing
from abliterate.settings.heal import HealRunSettings

KEPT = 256  # likeliest tokens of each distribution that are learnt from; the mass of all others is one more
CHUNK = 64  # prompts whose distributions are read before they are thinned to that
VALIDATION_TOKENS = 24  # as the divergence in results.json
VERDICT_TOKENS = 32
LEAST_REST = 1e-6  # below it, what float32 says of the mass left is rounding
LEAST_PROMPTS = 8
OF_PREFERENCES = {
    "data", "data_split", "prompt_column", "chosen_column", "rejected_column", "most_pairs", "keep_refusals",
    "held_out", "most_held_out", "max_length", "beta", "launch", "processes",
}  # fmt: skip
"""Settings that mean nothing here."""
CONFIGURATION_FILE = "heal.json"
TEACHER, STATE = "teacher.safetensors", "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Teacher:
    """What the original said, kept for when it is let go.

    Attributes:
        lessons: its distributions along its answers to training baseline prompts.
        held_out: the same for validation baseline prompts.
        refused: token ids of training prompts that it refuses, of either side.
        refusals: token ids of its refusals' openings.
        asked: how many baseline prompts it was asked for lessons.
        reads: token ids of the first training baseline prompt: both models must read it so.
    """

    lessons: Reference
    held_out: Reference
    refused: list[list[int]]
    refusals: list[list[int]]
    asked: int
    reads: list[int]

    def save(self, path: Path, key: str) -> None:
        """Write it all to one safetensors file."""
        from safetensors.torch import save_file

        document: dict[str, Any] = {
            "key": key, "refused": self.refused, "refusals": self.refusals, "asked": self.asked,
            "reads": self.reads,
        }  # fmt: skip
        tensors: dict[str, Tensor] = {}
        for name, reference in (("lessons", self.lessons), ("held_out", self.held_out)):
            document[name] = {"rows": reference.rows, "answers": reference.answers, "loss": reference.loss}
            tensors[f"{name}.tokens"] = torch.cat(reference.tokens)
            tensors[f"{name}.logprobs"] = torch.cat(reference.logprobs)
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={"abliterate.heal": json.dumps(document)})

    @classmethod
    def read(cls, path: Path, key: str) -> Teacher:
        """What `save` wrote.

        Raises:
            OutputError: when the file is damaged, or was made with another key.
        """
        document, tensors = _read(path, key)

        def reference(name: str) -> Reference:
            part = document[name]
            sizes = list(map(len, part["answers"]))
            tokens, logprobs = (list(tensors[f"{name}.{what}"].split(sizes)) for what in ("tokens", "logprobs"))
            return Reference(part["rows"], part["answers"], tokens, logprobs, part["loss"])

        others = (document[name] for name in ("refused", "refusals", "asked", "reads"))
        return cls(reference("lessons"), reference("held_out"), *others)


def make_teacher(
    handle: Handle, sides: Sides, judge: Judge, *, answer_tokens: int, reporter: Reporter | None = None
) -> Teacher:
    """Have the original answer the training and validation prompts, and keep what it said.

    Args:
        handle: the original.
        sides: prompts; the test split is not read.
        judge: decides what a refusal is.
        answer_tokens: tokens of each answer that are learnt from.
        reporter: told how it goes.

    Raises:
        AbliterateError: when the original answers hardly any baseline prompt.
    """
    reporter = reporter or Silent()
    baseline = list(sides.baseline.train.texts)
    answered, over_refused = _asked(handle, baseline, judge, answer_tokens, reporter, "the original answers")
    if len(answered) < LEAST_PROMPTS:
        raise AbliterateError(
            f"{handle.source} answers {len(answered)} of {len(baseline)} baseline prompts; at least {LEAST_PROMPTS} "
            "are needed to learn from. Give others with --baseline"
        )
    validation, _ = _asked(
        handle, list(sides.baseline.validation.texts), judge, VALIDATION_TOKENS, reporter, "held-out answers"
    )
    target = list(sides.target.train.texts)
    tick = reporter.progress("the original's refusals", len(target))
    answers, verdicts = judged(handle, target, judge, max_new_tokens=VERDICT_TOKENS, tick=tick)
    refused = [(p, a) for p, a, r in zip(target, answers, verdicts, strict=True) if r and a.whole] + over_refused
    reporter.say(
        f"the original answers {len(answered)} of {len(baseline)} training baseline prompts, which it teaches, and "
        f"refuses {sum(verdicts)} of {len(target)} training target prompts, which it must not"
    )
    tick = reporter.progress("the original's distributions", len(answered) + len(validation))
    return Teacher(
        _reference(handle, answered, answer_tokens, tick),
        _reference(handle, validation, VALIDATION_TOKENS, tick),
        handle.prompt_ids([p for p, _ in refused]) if refused else [],
        [a.whole[:OPENING_TOKENS] for _, a in refused],
        len(baseline),
        handle.prompt_ids(baseline[:1])[0],
    )


Said = list[tuple[str, Answer]]


def _asked(
    handle: Handle, prompts: list[str], judge: Judge, tokens: int, reporter: Reporter, stage: str
) -> tuple[Said, Said]:
    """(prompt, answer) where it answers, and where it refuses."""
    tick = reporter.progress(stage, len(prompts))
    answers, refused = judged(handle, prompts, judge, max_new_tokens=tokens, stop_on=(True,), tick=tick)
    said = [(p, a, r) for p, a, r in zip(prompts, answers, refused, strict=True) if a.whole]
    return [(p, a) for p, a, r in said if not r], [(p, a) for p, a, r in said if r]


def _reference(handle: Handle, said: Said, tokens: int, tick: Any) -> Reference:
    """The original's distributions, thinned a chunk at a time."""
    parts = []
    for start in range(0, len(said), CHUNK):
        chunk = said[start : start + CHUNK]
        ids = handle.prompt_ids([p for p, _ in chunk])
        parts.append(thinned(make_reference(handle, ids, [a for _, a in chunk], answer_tokens=tokens, tick=tick)))
    joined = Reference([], [], [], [], 0.0)
    for part in parts:
        joined.rows += part.rows
        joined.answers += part.answers
        joined.tokens += part.tokens
        joined.logprobs += part.logprobs
        joined.loss += part.loss * sum(map(len, part.answers))
    joined.loss /= max(1, sum(map(len, joined.answers)))
    return joined


def thinned(reference: Reference, kept: int = KEPT) -> Reference:
    """The same reference with fewer tokens named; what the others weigh goes to the rest."""
    logprobs = [
        torch.cat([own[:, :kept], own[:, kept:].logsumexp(-1, keepdim=True)], dim=-1) for own in reference.logprobs
    ]
    tokens = [own[:, :kept].contiguous() for own in reference.tokens]
    return Reference(reference.rows, reference.answers, tokens, logprobs, reference.loss)


@dataclass
class Following:
    """A stand-in: KL(original || edited) along the original's answers, averaged over tokens, then over rows."""

    reference: Reference
    name: str = "divergence"

    def __post_init__(self) -> None:
        pairs = zip(self.reference.rows, self.reference.answers, strict=True)
        self.rows = [Row(list(row), len(answer)) for row, answer in pairs]

    def loss(self, picked: Sequence[int], logprobs: Sequence[Float[Tensor, "output vocab"]]) -> Float[Tensor, ""]:
        """Mean over the rows picked, in nats."""
        tokens, original = (
            torch.cat([part[i] for i in picked]).to(logprobs[0].device)
            for part in (self.reference.tokens, self.reference.logprobs)
        )
        drift = coarse_divergence(torch.cat(list(logprobs)), tokens.long(), original)
        return torch.stack([own.mean() for own in drift.split([len(own) for own in logprobs])]).mean()


def coarse_divergence(
    logprobs: Float[Tensor, "token vocab"],
    tokens: Int[Tensor, "token kept"],
    original: Float[Tensor, "token kept_and_rest"],
) -> Float[Tensor, " token"]:
    """KL(original || model) in nats over the tokens named and the mass of all others, as `reference_divergence` has it.

    What the others weigh is taken from 1: four times as fast, with gradients, as a second sum over the vocabulary.
    """
    named = logprobs.gather(-1, tokens)
    rest = torch.log(-torch.expm1(named.logsumexp(-1, keepdim=True).clamp_max(-LEAST_REST)))
    return (original.exp() * (original - torch.cat([named, rest], dim=-1))).sum(-1)


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

    path: Path | None = None
    key: str = ""
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
        if not (resume and path.is_file()):
            return cls(path, key)
        document, tensors = _read(path, key)
        document.pop("key")
        return cls(path, key, tensors=tensors, **document)

    def save(self) -> None:
        """Write it all down; whole or not at all."""
        if self.path is None:
            return
        from safetensors.torch import save_file

        names = ("key", "step", "prompts", "openings", "history", "best", "seconds")
        document = {name: getattr(self, name) for name in names}
        with whole_file(self.path) as temporary:
            save_file(self.tensors, temporary, metadata={"abliterate.heal": json.dumps(document)})


def _read(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            document = json.loads((file.metadata() or {})["abliterate.heal"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise OutputError(f"{path} can't be read, to go on from: {error}; start anew without --resume") from error
    if document["key"] != key:
        raise OutputError(
            f"{path} was left by a training with another model, prompts or settings; give the same ones to go on, or "
            "start anew without --resume"
        )
    return document, tensors


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
    from abliterate.heal.surroundings import memory_advised

    reporter = reporter or Silent()
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
        lesson = _Lesson(job, handle, lora, teacher, sides, reporter)
        lesson.run()
        lesson.write_adapter()
        training = lesson.training()
    _write_configuration(job, sides, training)
    return training


def _write_configuration(job: Job, sides: Sides, training: Training) -> None:
    """heal.json: the resolved configuration."""
    from importlib.metadata import version

    from abliterate.common.names import public_name

    part = {"target": sides.target, "baseline": sides.baseline}
    document = {
        "preset": job.settings.heal.preset,
        "model": public_name(job.model),
        "original": public_name(job.original or ""),
        "data": {
            name: {
                "source": public_name(splits.source),
                **{
                    split: {"count": len(getattr(splits, split)), "sha256": getattr(splits, split).sha256}
                    for split in ("train", "validation")
                },
            }
            for name, splits in part.items()
        },
        "settings": {**training.resolved, "seed": job.settings.seed},
        "results": training.results,
        "versions": {name: version(name) for name in ("abliterate", "torch", "transformers", "peft")},
    }
    with whole_file(job.folder / CONFIGURATION_FILE) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def open_lessons(settings: HealRunSettings) -> Sides:
    """The prompts to learn from: the settings' own, with as many training prompts as `self` asks for."""
    count = settings.heal.self_teaching.teaching_prompts
    return open_prompts(settings.prompts.model_copy(update={"train_prompts": count}), settings.seed)


def open_teacher(job: Job, sides: Sides, *, handle: Handle | None = None, reporter: Reporter | None = None) -> Teacher:
    """What the original says: from an earlier attempt when `job.resume`, else from the original; kept in `job.folder`.

    Args:
        job: the training.
        sides: its prompts.
        handle: the original where the caller has loaded it; else it is loaded here.
        reporter: told how it goes.

    Raises:
        AbliterateError: when the job names no original, or it answers hardly any baseline prompt.
    """
    path, key = job.checkpoints / TEACHER, training_key(job, sides)
    if job.resume and path.is_file():
        return Teacher.read(path, key)
    if handle is None:
        if job.original is None:
            raise AbliterateError("heal --preset self needs the original model; name it with --original")
        (reporter or Silent()).say(f"loading {job.original}")
        handle = open_model(job.original, job.settings.load)
    tokens = job.settings.heal.self_teaching.answer_tokens
    made = make_teacher(handle, sides, make_judge(job.settings.measure.judge), answer_tokens=tokens, reporter=reporter)
    job.checkpoints.mkdir(parents=True, exist_ok=True)
    made.save(path, key)
    return made


def training_key(job: Job, sides: Sides) -> str:
    """Hash of what the training depends on."""
    settings = job.settings.model_dump(exclude={"resume", "force", "keep_tied"})
    for name in ("save_steps", "log_steps", "report_to"):  # of no consequence for the weights
        settings["heal"].pop(name)
    hashes = [part.sha256 for side in (sides.target, sides.baseline) for part in (side.train, side.validation)]
    return key_of([job.model, job.original, settings, hashes, environment()])


@contextlib.contextmanager
def _lora(handle: Handle, settings: HealRunSettings) -> Iterator[Any]:
    """The model with a fresh LoRA, which does nothing yet; as it was when the block ends."""
    from peft import LoraConfig, get_peft_model

    heal = settings.heal
    named = heal.target_modules
    config = LoraConfig(
        r=heal.rank,
        lora_alpha=heal.alpha,  # type: ignore[arg-type]
        lora_dropout=heal.dropout,
        target_modules=_linear(handle) if named == "all-linear" else [name.strip() for name in named.split(",")],
        task_type="CAUSAL_LM",
    )
    base = handle.model
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going away
        torch.manual_seed(settings.seed)
        try:
            lora = get_peft_model(base, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise AbliterateError(f"--target-modules {named}: {error}") from error
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


class _Lesson:
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
            progress.tensors = self._tensors()
            return
        self.reporter.say(f"going on from step {progress.step} of {self.steps}")
        for name, value in self.kept.items():
            value.copy_(progress.tensors[name])
            self.optimiser.state[value] = {
                "step": torch.tensor(float(progress.step)),
                **{m: progress.tensors[f"{m}.{name}"].clone() for m in MOMENTS},
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
        from abliterate.common.names import public_name

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
