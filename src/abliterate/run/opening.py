"""How a job begins: the model and the prompts as the settings say, looked at before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from abliterate.common.errors import AbliterateError, shorten
from abliterate.common.reporting import Clock, Reporter, Silent
from abliterate.measure.decode import decode
from abliterate.measure.judges import AND, Judge, make_judge
from abliterate.measure.refusal import is_refusal
from abliterate.measure.verdicts import Panel
from abliterate.models.folders import check_here
from abliterate.models.handle import Handle
from abliterate.models.loading import load
from abliterate.models.placement import devices_of, offloaded
from abliterate.prompts.behaviour import Behaviour, load_behaviour
from abliterate.prompts.behaviour_prompts import behaviour_sides
from abliterate.prompts.chat import conversations, render, resolve_chat_template
from abliterate.prompts.reasoning import common_opening, find_prefill, looked_for, opening_tag
from abliterate.prompts.sets import Sides, load_sides
from abliterate.prompts.switches import switched_off
from abliterate.run.beside import Beside
from abliterate.settings.run import LoadSettings, PromptSettings, RunSettings

if TYPE_CHECKING:
    from abliterate.workers.pool import Pool

OPENING_TOKENS, LOOKED_AT = 16, 400  # of answers in which marks of reasoning are looked for, and what closes them


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
    pool = open_pool(settings)
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
        handle = open_model(model, settings.load, pool)
    if pool is not None:
        reporter.say(f"{pool.count} workers, each with a replica")
    for note in (described(handle), *handle.notes):
        reporter.say(note)
    check_lengths(handle, sides)
    beside.check_lengths(handle, reporter)
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


def open_model(source: str, settings: LoadSettings, pool: Pool | None = None) -> Handle:
    """Load a model as the settings say, on the workers too where there are some."""
    handle = load(source, **settings.model_dump())
    if pool is not None:
        pool.replicate(handle, settings.model_dump())
    return handle


def open_pool(settings: RunSettings) -> Pool | None:
    """The workers that the settings ask for, None where they ask for none.

    Raises:
        AbliterateError: any that starting them gives.
    """
    if settings.workers is None and settings.ray is None:
        return None
    if settings.load.tensor_parallel:
        raise AbliterateError("--tensor-parallel spreads one model, --workers and --ray make several; take one of them")
    from abliterate.workers.pool import Pool

    return Pool(settings.workers, settings.ray)


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
    """Where every answer opens with reasoning, close it at once: as the template does it, or by a prefill."""
    if handle.prefill is not None:
        return
    reporter, prompts = reporter or Silent(), list(prompts[:4])
    ids = handle.prompt_ids(prompts)
    answers = _answers(handle, ids, OPENING_TOKENS)
    texts = [handle.tokenizer.decode(row) for row in ids]
    prefill = find_prefill(answers, texts, handle.marks) or _looked_for(handle, ids, answers)
    if prefill is None:
        tag, opening = opening_tag(answers), common_opening(answers)
        if (tag or len(opening.split()) > 2) and not any(map(is_refusal, answers)):
            reporter.say(
                f"all answers open with {shorten(tag or opening, 60)!r}: if that is reasoning, it isn't closed; name "
                "what opens and closes it (--reasoning-marks), or what answers start with (--prefill)"
            )
        return
    template = resolve_chat_template(handle.tokenizer, handle.chat_template)
    off = switched_off(lambda switches: rendered(handle, prompts, switches), template)
    if off is not None:
        switches, after = off
        pairs = zip(rendered(handle, prompts, {}), after, strict=True)
        added = {new.removeprefix(old) if new.startswith(old) else None for old, new in pairs}
        prefill = added.pop() if len(added) == 1 else None
        if prefill is None:
            handle.switches = switches
            said = ", ".join(f"{name}={value!r}" for name, value in switches.items())
            reporter.say(f"answers open with a reasoning mark; the chat template's switch is off ({said})")
            return
    handle.prefill = prefill
    reporter.say(f"answers open with a reasoning mark; prefilling {prefill!r} (--prefill to change)")


def _answers(handle: Handle, ids: Sequence[Sequence[int]], length: int) -> list[str]:
    return [answer.text for answer in decode(handle, ids, max_new_tokens=length, keep_special=True)]


def _looked_for(handle: Handle, ids: Sequence[Sequence[int]], answers: Sequence[str]) -> str | None:
    """A prefill for a mark that isn't known and that all answers open with, where the template or they show its end."""
    opening = opening_tag(answers)
    if opening is None:
        return None
    template = resolve_chat_template(handle.tokenizer, handle.chat_template)
    marks = looked_for(opening, (), template) or looked_for(opening, _answers(handle, ids, LOOKED_AT), template)
    if marks is None:
        return None
    handle.marks += (marks,)
    return marks.closed


def rendered(handle: Handle, prompts: Sequence[str], switches: Mapping[str, Any]) -> list[str]:
    """Prompts as the chat template writes them with some names and values set."""
    return render(handle.tokenizer, conversations(prompts, handle.system_prompt), handle.chat_template, None, switches)


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
