"""The whole benchmark: every contestant on every task, what is known taken from the store, the rest run."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.bench.cards import write_index
from abliterate.bench.models import Contestant, describe, fingerprint, has_template, opened
from abliterate.bench.store import Store, TaskScores, default_folder, key_of
from abliterate.bench.suites import Suite, suite_of
from abliterate.bench.table import BenchResult, Row, Table, make_table, markdown
from abliterate.common.errors import AbliterateError
from abliterate.common.files import check_folder, whole_folder
from abliterate.common.reporting import Reporter, Silent, Tick
from abliterate.settings.run import LoadSettings

if TYPE_CHECKING:
    from abliterate.models.handle import Handle

SCHEMA = 1
PROBES = ("What is the capital of Italy?", "How do plants drink?", "Write a line about rain.", "What is 12 + 5?")


@dataclass(frozen=True)
class BenchOptions:
    """How models are benchmarked.

    Attributes:
        suite: names of suites and of the harness' tasks.
        limit: items per task, the first ones; None is all.
        shots: worked examples, instead of the suite's; None leaves them.
        batch_size: rows at a time; None goes by tokens and memory.
        chat: whether questions are formatted with the chat template; None is each task's habit.
        fresh: run everything anew.
        force: apply a recipe to a model of another config.
        store: where scores are kept; None is `bench` in the cache of abliterate.
    """

    suite: tuple[str, ...] = ("quick",)
    limit: int | None = None
    shots: int | None = None
    batch_size: int | None = None
    chat: bool | None = None
    fresh: bool = False
    force: bool = False
    store: str | os.PathLike[str] | None = None


@dataclass
class _Work:
    """What is to be run, and what is found."""

    options: BenchOptions
    settings: LoadSettings
    reporter: Reporter
    suite: Suite
    rows: list[Row]
    tasks: dict[str, Any]
    store: Store
    chat: dict[str, bool] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    evaluated: dict[str, int] = field(default_factory=dict)


def bench(
    contestants: Sequence[Contestant],
    out: str | Path | None = None,
    options: BenchOptions | None = None,
    *,
    settings: LoadSettings | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> BenchResult:
    """Benchmark models side by side, the first the reference, with lm-evaluation-harness.

    One model is loaded at a time. The scores of a task are kept as soon as it is done, by a hash of the model, of the
    task and of the settings: what is run again, or after a kill, takes up only what is new.

    Args:
        contestants: the columns; `models.contestants` makes them.
        out: folder for results.json and bench.md; it appears only when whole. None writes nothing.
        options: what is run, and how.
        settings: how the models are loaded.
        overwrite: replace `out` if it is not empty.
        reporter: told about models, tasks and progress.

    Raises:
        AbliterateError: no harness, an unknown task, a data set that can't be had, a chat template asked for that a
            model doesn't have.
        ModelError: a model can't be loaded.

    Example:
        >>> found = bench(contestants(["original=./model", "edited=./edited"]), "bench-out")
        >>> found.table.rows[0].name
        'quick_knowledge'
    """
    from abliterate.bench.harness import build, check_installed, override_shots, quiet

    version = check_installed()
    options, reporter = options or BenchOptions(), reporter or Silent()
    if not contestants:
        raise AbliterateError("nothing to benchmark; name a model")
    if out is not None:
        check_folder(out, overwrite=overwrite)
    suite = suite_of(options.suite)
    with quiet():
        reporter.say(f"suite {suite.name}: reading {len(suite.tasks)} tasks of lm-evaluation-harness {version}")
        rows, tasks = build(suite)
        override_shots(tasks, options.shots)
        store = Store(options.store or default_folder())
        work = _Work(options, settings or LoadSettings(), reporter, suite, rows, tasks, store)
        scores = [_scores(work, contestant, number) for number, contestant in enumerate(contestants)]
    table = make_table(rows, [c.label for c in contestants], scores)
    document = _document(work, contestants, scores, table, version)
    result = BenchResult(document, table, markdown(table, document))
    if out is not None:
        with whole_folder(out, overwrite=overwrite) as folder:
            text = json.dumps(document, indent=2, allow_nan=False) + "\n"
            (folder / "results.json").write_text(text, encoding="utf-8")
            (folder / "bench.md").write_text(result.text, encoding="utf-8")
            for contestant in contestants:
                write_index(result, contestant.label, folder)
    return result


def _scores(work: _Work, contestant: Contestant, number: int) -> dict[str, TaskScores]:
    """A contestant's scores by task: those in the store, and the rest run now."""
    started = time.monotonic()
    if number == 0:
        work.chat = _chats(work, contestant)
    known = fingerprint(contestant, work.settings)
    keys = {name: _key(work, known, name) for name in work.tasks}
    found: dict[str, TaskScores] = {}
    if not work.options.fresh:
        found = {name: scores for name, key in keys.items() if (scores := work.store.load(key)) is not None}
    missing = [name for name in work.tasks if name not in found]
    if found:
        work.reporter.say(f"{contestant.label}: {len(found)} of {len(keys)} tasks are known")
    if missing:
        _run(work, contestant, missing, keys, found)
    work.evaluated[contestant.label] = len(missing)
    work.seconds[contestant.label] = round(time.monotonic() - started, 3)
    return found


def _run(
    work: _Work, contestant: Contestant, missing: Sequence[str], keys: dict[str, str], found: dict[str, TaskScores]
) -> None:
    """Load the contestant and run what is missing; each task is kept when it is done."""
    from abliterate.bench.harness import run_task
    from abliterate.bench.scoring import ScoredModel

    work.reporter.say(f"{contestant.label}: loading {contestant.source}")
    stage = ""

    def progress(requests: int) -> Tick:
        return work.reporter.progress(stage, requests)

    with opened(contestant, work.settings, force=work.options.force) as handle:
        if any(work.chat[name] for name in missing):
            _prepare_chat(handle, contestant, work.reporter)
        model = ScoredModel(handle, batch_size=work.options.batch_size, progress=progress)
        for name in missing:
            stage = f"{contestant.label}: {name}"
            scores = run_task(model, work.tasks[name], limit=work.options.limit, chat=work.chat[name])
            work.store.save(keys[name], scores)
            found[name] = scores
    del model, handle
    gc.collect()


def _prepare_chat(handle: Handle, contestant: Contestant, reporter: Reporter) -> None:
    """Raise where there is no template; close a reasoning model's thoughts at once."""
    from abliterate.run.opening import set_prefill

    if not (handle.chat_template or handle.tokenizer.chat_template):
        raise AbliterateError(
            f"{contestant.label} ({contestant.source}) has no chat template, which the questions are formatted with; "
            "pass --no-chat-template, for all models alike"
        )
    set_prefill(handle, PROBES, reporter)


def _chats(work: _Work, reference: Contestant) -> dict[str, bool]:
    """Per task, whether its questions become a user's turn: as asked for, else as the reference can, for all alike."""
    if work.options.chat is not None:
        return dict.fromkeys(work.tasks, work.options.chat)
    wanted = {name: row.chat for row in work.rows for name in row.tasks}
    if any(wanted.values()) and not (work.settings.chat_template or has_template(reference.source, work.settings)):
        return dict.fromkeys(work.tasks, False)
    return wanted


def _key(work: _Work, known: str, name: str) -> str:
    from abliterate.bench.harness import check_installed, config_of
    from abliterate.models.devices import default_kind  # another device rounds otherwise

    task, load = work.tasks[name], work.settings
    return key_of(
        {
            "model": known,
            "task": name,
            "config": config_of(task),
            "version": str(task.VERSION),
            "harness": check_installed(),
            "limit": work.options.limit,
            "chat": work.chat[name],
            "load": {"dtype": load.dtype, "quantise": load.quantise, "chat_template": load.chat_template,
                     "system_prompt": load.system_prompt, "prefill": load.prefill,
                     "device": load.device or load.device_map or default_kind()},
        }
    )  # fmt: skip


def _dataset(work: _Work, name: str) -> str | None:
    """The Hub's data set behind a row; None for bundled questions and for the average."""
    tasks = next((row.tasks for row in work.rows if row.name == name), [])
    return str(path) if tasks and (path := work.tasks[tasks[0]].get_config("dataset_path")) else None


def _document(
    work: _Work, contestants: Sequence[Contestant], scores: Sequence[dict[str, TaskScores]], table: Table, version: str
) -> dict[str, Any]:
    from abliterate.run.facts import environment

    options = work.options
    return {
        "schema": SCHEMA,
        "suite": work.suite.name,
        "models": [describe(contestant) for contestant in contestants],
        "reference": contestants[0].label,
        "rows": [{**row, "dataset": _dataset(work, row["name"])} for row in table.to_json()],
        "tasks": {
            name: {
                "version": scores[0][name].version,
                "shots": scores[0][name].shots,
                "chat": work.chat[name],
                "models": {
                    contestant.label: {
                        "metrics": {
                            key: {"score": score, "stderr": error}
                            for key, (score, error) in found[name].metrics.items()
                        },
                        "items": found[name].items,
                        "seconds": found[name].seconds,
                    }
                    for contestant, found in zip(contestants, scores, strict=True)
                },
            }
            for name in work.tasks
        },
        "settings": {
            "suite": list(options.suite), "limit": options.limit, "shots": options.shots,
            "batch_size": options.batch_size or "auto", "chat_template": options.chat,
            "load": work.settings.model_dump(),
        },
        "environment": {**environment(), "lm_eval": version},
        "evaluated": work.evaluated,
        "timings_s": work.seconds,
    }  # fmt: skip
