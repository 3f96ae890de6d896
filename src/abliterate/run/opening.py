"""How a job begins: the model and the prompts as the settings say, looked at before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from abliterate.common.errors import AbliterateError
from abliterate.common.reporting import Clock, Reporter, Silent
from abliterate.measure.decode import decode
from abliterate.measure.judges import AND, Judge, make_judge
from abliterate.measure.verdicts import Panel
from abliterate.models.folders import check_here
from abliterate.models.handle import Handle, find_prefill
from abliterate.models.loading import load
from abliterate.models.placement import devices_of, offloaded
from abliterate.prompts.behaviour import Behaviour, load_behaviour
from abliterate.prompts.behaviour_prompts import behaviour_sides
from abliterate.prompts.sets import Sides, load_sides
from abliterate.run.beside import Beside
from abliterate.settings.run import LoadSettings, PromptSettings, RunSettings


@dataclass(frozen=True)
class Job:
    """What every stage of a job is given.

    Attributes:
        handle: the loaded original.
        sides: all prompts.
        judge: decides whether an answer shows the behaviour; of refusing: a panel.
        second: for the report alone: a judge of refusing that choosing never sees.
        settings: resolved for the behaviour.
        behaviour: what is changed.
        reporter, clock: told how it goes, and how long it took.
        out: where the output will be.
        beside: what is measured besides the sides.
    """

    handle: Handle
    sides: Sides
    judge: Judge
    second: Judge | None
    settings: RunSettings
    behaviour: Behaviour
    reporter: Reporter
    clock: Clock
    out: Path
    beside: Beside


def opened(
    model: str, out: str | Path, settings: RunSettings, behaviour: Behaviour, reporter: Reporter,
    *, judge: Judge | None = None,
) -> Job:  # fmt: skip
    """Load prompts, then the model, and see that no prompt is too long; random numbers follow the seed from here on.

    The judge is the one that the settings name by default.

    Raises:
        AbliterateError: any that loading gives.
    """
    clock = Clock()
    check_here(model)
    judge = judge or judges(settings, behaviour)
    second = second_judge(settings, behaviour)
    say_judges(settings, judge, second, reporter)
    with clock.stage("prompts"):
        sides = open_prompts(settings.prompts, settings.seed, behaviour)
        beside = Beside(sides, behaviour, settings)
    for note in sides.notes:
        reporter.say(note)
    reporter.say(f"loading {model}")
    with clock.stage("load"):
        handle = open_model(model, settings.load)
    for note in (described(handle), *handle.notes):
        reporter.say(note)
    check_lengths(handle, sides)
    beside.check_lengths(handle)
    torch.manual_seed(settings.seed)
    return Job(handle, sides, judge, second, settings, behaviour, reporter, clock, Path(out), beside)


def judges(settings: RunSettings, behaviour: Behaviour) -> Judge:
    """What decides whether an answer shows the behaviour: of refusing, a panel of the judge named and of evidence.

    Raises:
        AbliterateError: any that making a judge gives.
    """
    judge = make_judge(settings.measure.judge)
    return Panel(judge) if behaviour.words.shows == "refused" and not hasattr(judge, "scores") else judge


def second_judge(settings: RunSettings, behaviour: Behaviour) -> Judge | None:
    """The judge of the report, which choosing never sees; None where there is none, or it isn't about refusing.

    Raises:
        AbliterateError: any that making a judge gives, or where choosing sees it.
    """
    spec = settings.measure.report_judge
    if spec == "none" or behaviour.words.shows != "refused":
        return None
    if spec in settings.measure.judge.split(AND):
        raise AbliterateError(f"--report-judge {spec} is one that choosing sees (--judge); name another, or none")
    return make_judge(spec)


def say_judges(settings: RunSettings, judge: Judge, second: Judge | None, reporter: Reporter) -> None:
    """Say the whole names of judges whose settings leave a part of them open, such as the model behind an endpoint."""
    named = {judge.name: settings.measure.judge} | ({second.name: settings.measure.report_judge} if second else {})
    for name, given in named.items():
        if name != given:
            reporter.say(f"judging by {name}")


def resolve_behaviour(settings: RunSettings, reporter: Reporter | None = None) -> tuple[RunSettings, Behaviour]:
    """The settings with the behaviour's judge and defaults, and the behaviour; says what it changes.

    Raises:
        AbliterateError: when there is no such behaviour, or its file is wrong.
    """
    behaviour = load_behaviour(settings.behaviour)
    settings, notes = behaviour.resolved(settings)
    for note in notes:
        (reporter or Silent()).say(note)
    return settings, behaviour


def open_model(source: str, settings: LoadSettings) -> Handle:
    """Load a model as the settings say."""
    return load(source, **settings.model_dump())


def open_prompts(settings: PromptSettings, seed: int, behaviour: Behaviour | None = None) -> Sides:
    """Load both sides' prompts as the settings say, or else the behaviour.

    Where their number isn't given, twice as many validation prompts are loaded as are used at first: a model that
    refuses only some of the target prompts is judged on all of them (`showing.filtered`).
    """
    given = "validation_prompts" in settings.model_fields_set
    if behaviour is not None and behaviour.name != "refusal":
        return behaviour_sides(behaviour, settings, seed)
    return load_sides(
        settings.target,
        settings.baseline,
        target_column=settings.target_column,
        baseline_column=settings.baseline_column,
        seed=seed,
        limit_train=settings.train_prompts,
        limit_validation=settings.validation_prompts * (1 if given else 2),
        limit_test=settings.test_prompts,
    )


def set_prefill(handle: Handle, prompts: Sequence[str], reporter: Reporter | None = None) -> None:
    """When every answer opens with one reasoning mark, close it at once by a prefill."""
    if handle.prefill is not None:
        return
    ids = handle.prompt_ids(prompts[:4])
    openings = decode(handle, ids, max_new_tokens=8, keep_special=True)
    texts = [handle.tokenizer.decode(row) for row in ids]
    prefill = find_prefill([a.text for a in openings], texts)
    if prefill:
        handle.prefill = prefill
        (reporter or Silent()).say(f"answers open with a reasoning mark; prefilling {prefill!r} (--prefill to change)")


def check_lengths(handle: Handle, sides: Sides) -> None:
    """Raise PromptError, before the work, when a prompt of any split is longer than the context."""
    for side in (sides.target, sides.baseline):
        for part in side:
            handle.prompt_ids(part.texts)


def described(handle: Handle) -> str:
    """A loaded model in one line: class, size, shape, dtype and devices."""
    size = sum(p.numel() for p in handle.model.parameters())
    devices = ", ".join(map(str, devices_of(handle.model)))
    away = "; some weights are brought there for each pass" if offloaded(handle.model) else ""
    return (
        f"{type(handle.model).__name__}, {size / 1e6:,.0f} M parameters, {handle.layers} layers, "
        f"d_model {handle.d_model}, {str(handle.dtype).removeprefix('torch.')} on {devices}{away}"
    )
