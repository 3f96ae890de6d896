"""What the original teaches the edited model: its distributions along its answers, and the refusals to keep away.

The original's distributions are kept compactly, in a file that a resumed training reads, so that one model is in memory
at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.common.errors import AbliterateError
from abliterate.common.reporting import SILENT, Reporter
from abliterate.common.resumable import key_of, read_state, write_state
from abliterate.heal.training import Job
from abliterate.measure import judged
from abliterate.measure.decode import Answer
from abliterate.measure.divergence import Reference, make_reference
from abliterate.measure.judges import Judge, make_judge
from abliterate.models.handle import Handle
from abliterate.prompts.sets import Sides
from abliterate.run.facts import environment
from abliterate.run.opening import open_model, open_prompts
from abliterate.search.stand_ins import OPENING_TOKENS, Staying
from abliterate.settings.heal import HealRunSettings

KEPT = 256  # likeliest tokens of each distribution that are learnt from; the mass of all others is one more
VALIDATION_TOKENS = 24  # as the divergence in results.json
VERDICT_TOKENS = 32
LEAST_REST = 1e-6  # below it, what float32 says of the mass left is rounding
LEAST_PROMPTS = 8
TEACHER = "teacher.safetensors"
SAID = ("refused", "refusals", "asked", "reads")
Said = list[tuple[str, Answer]]


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
        document = {name: getattr(self, name) for name in SAID}
        tensors: dict[str, Tensor] = {}
        for name, reference in (("lessons", self.lessons), ("held_out", self.held_out)):
            document[name] = {"rows": reference.rows, "answers": reference.answers, "loss": reference.loss}
            tensors[f"{name}.tokens"] = torch.cat(reference.tokens)
            tensors[f"{name}.logprobs"] = torch.cat(reference.logprobs)
        write_state(path, key, document, tensors)

    @classmethod
    def read(cls, path: Path, key: str) -> Teacher | None:
        """What `save` wrote; None where there is no file.

        Raises:
            OutputError: when the file is damaged, or was made with another key.
        """
        found = read_state(path, key, "a training")
        if found is None:
            return None
        document, tensors = found

        def reference(name: str) -> Reference:
            part = document[name]
            sizes = list(map(len, part["answers"]))
            tokens, logprobs = (list(tensors[f"{name}.{what}"].split(sizes)) for what in ("tokens", "logprobs"))
            return Reference(part["rows"], part["answers"], tokens, logprobs, part["loss"])

        return cls(reference("lessons"), reference("held_out"), *(document[name] for name in SAID))


def make_teacher(
    handle: Handle, sides: Sides, judge: Judge, *, answer_tokens: int, reporter: Reporter = SILENT
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

    def reference(said: Said, tokens: int) -> Reference:
        ids = handle.prompt_ids([p for p, _ in said]) if said else []
        return make_reference(handle, ids, [a for _, a in said], answer_tokens=tokens, kept=KEPT, tick=tick)

    return Teacher(
        reference(answered, answer_tokens),
        reference(validation, VALIDATION_TOKENS),
        handle.prompt_ids([p for p, _ in refused]) if refused else [],
        [a.whole[:OPENING_TOKENS] for _, a in refused],
        len(baseline),
        handle.prompt_ids(baseline[:1])[0],
    )


def _asked(
    handle: Handle, prompts: list[str], judge: Judge, tokens: int, reporter: Reporter, stage: str
) -> tuple[Said, Said]:
    """(prompt, answer) where it answers, and where it refuses."""
    tick = reporter.progress(stage, len(prompts))
    answers, refused = judged(handle, prompts, judge, max_new_tokens=tokens, stop_on=(True,), tick=tick)
    said = [(p, a, r) for p, a, r in zip(prompts, answers, refused, strict=True) if a.whole]
    return [(p, a) for p, a, r in said if not r], [(p, a) for p, a, r in said if r]


class Following(Staying):
    """A stand-in: KL(original || edited) along the original's answers, averaged over tokens, then over rows."""

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


def open_lessons(settings: HealRunSettings) -> Sides:
    """The prompts to learn from: the settings' own, with as many training prompts as `self` asks for."""
    count = settings.heal.self_teaching.teaching_prompts
    return open_prompts(settings.prompts.model_copy(update={"train_prompts": count}), settings.seed)


def open_teacher(job: Job, sides: Sides, *, handle: Handle | None = None, reporter: Reporter = SILENT) -> Teacher:
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
    if job.resume and (kept := Teacher.read(path, key)):
        return kept
    if handle is None:
        if job.original is None:
            raise AbliterateError("heal --preset self needs the original model; name it with --original")
        reporter.say(f"loading {job.original}")
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
