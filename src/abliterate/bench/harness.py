"""lm-evaluation-harness as a library: finding tasks, building them, running one."""

from __future__ import annotations

import difflib
import functools
import logging
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from abliterate.bench.quick import QUICK_TASKS, quick_task
from abliterate.bench.store import TaskScores
from abliterate.bench.suites import SUITES, Suite, SuiteTask
from abliterate.bench.table import Row
from abliterate.common.errors import AbliterateError, shorten

if TYPE_CHECKING:
    from abliterate.bench.scoring import ScoredModel

SEED = 1234  # of the choice of worked examples and of what is sampled, as the harness has it


def check_installed() -> str:
    """The harness' version.

    Raises:
        AbliterateError: it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise AbliterateError("bench needs lm-evaluation-harness: pip install 'abliterate[bench]'") from None


@contextmanager
def quiet() -> Iterator[None]:
    """The harness' and datasets' own bars and warnings off; errors are raised, not logged."""
    import datasets
    from tqdm import tqdm

    init = tqdm.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "disable": True})

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate", "httpx", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = datasets.utils.logging.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        tqdm.__init__ = hidden  # the harness gives no way to turn its own off
        yield
    finally:
        tqdm.__init__ = init
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@functools.cache
def manager() -> Any:
    """The harness' index of tasks; reading it takes some seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def build(suite: Suite) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a suite and the harness' tasks by name, their data sets loaded.

    Raises:
        AbliterateError: a name that the harness doesn't know, or a data set that can't be had.
    """
    rows: list[Row] = []
    tasks: dict[str, Any] = {}
    for wanted in suite.tasks:
        found, group = _load(wanted)
        _check_runs(found)
        _set_shots(found, wanted.shots)
        tasks.update(found)
        if group is None or len(found) == 1 or _by_size(group, wanted.metric):
            rows.append(Row(wanted.name, list(found), wanted.metric, wanted.filter, wanted.chat))
        else:
            rows += [Row(name, [name], wanted.metric, wanted.filter, wanted.chat) for name in found]
    return rows, tasks


def _load(wanted: SuiteTask) -> tuple[dict[str, Any], Any]:
    """A name's tasks, and its group where it is one."""
    if wanted.name in QUICK_TASKS:
        return {wanted.name: quick_task(wanted.name)}, None
    if wanted.name not in manager().all_tasks:
        raise AbliterateError(unknown(wanted.name))
    try:
        loaded = manager().load([wanted.name])
    except ImportError as error:
        what = f"the package {error.name}" if error.name else shorten(str(error), 160)
        raise AbliterateError(
            f"task {wanted.name} needs more of lm-evaluation-harness ({what}): pip install 'lm-eval[ifeval,math]', or "
            "leave the task out"
        ) from error
    except Exception as error:
        raise AbliterateError(_no_data(wanted.name, error)) from error
    return dict(loaded["tasks"]), loaded["groups"].get(wanted.name)


def _check_runs(tasks: dict[str, Any]) -> None:
    """Raise where a task can't be run with text alone, or would run what the model writes."""
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise AbliterateError(
                f"task {name} runs code that the model writes; run it with lm-eval, in a sandbox, and leave it out here"
            )
        if getattr(task, "MULTIMODAL", False):
            raise AbliterateError(f"task {name} shows the model images or sounds; leave it out, text alone is run here")


def unknown(name: str) -> str:
    """The error for a name that the harness doesn't have, with those that look like it."""
    close = difflib.get_close_matches(name, [*SUITES, *QUICK_TASKS, *manager().all_tasks], n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return (
        f"no suite or task '{name}' (suites: {', '.join(SUITES)}; tasks: `lm-eval ls tasks`, "
        f"of lm-evaluation-harness {check_installed()}){hint}"
    )


def _no_data(task: str, error: Exception) -> str:
    """One line for a data set that didn't come, which it names."""
    text = " ".join(str(error).split())
    named = re.search(r"datasets?[/\s:'\"]+([\w.-]+/[\w.-]+)|'([\w.-]+/[\w.-]+)'|([\w-]+/[\w.-]+)", text)
    data = next((g for g in named.groups() if g), None) if named else None
    data = _data_set(task) or data
    which = f"data set {data} of task {task}" if data else f"the data set of task {task}"
    if "gated" in text.lower() or "401" in text:
        return f"{which} is gated; accept its terms on the Hub and run `hf auth login`"
    offline = ("offline", "connect", "resolve", "max retries", "couldn't reach", "couldn't find", "doesn't exist on")
    if any(word in text.lower() for word in offline) or type(error).__name__ in ("ConnectionError", "gaierror"):
        return (
            f"{which} is not in the cache and the Hub can't be reached; get online once, or use --suite quick, "
            "which is bundled"
        )
    return f"{which} can't be loaded: {text[:300]}"


def _data_set(task: str) -> str | None:
    """The data set that a task, or the first task of a group, is made of, as its configuration has it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    index = manager().task_index
    for _ in range(8):
        entry = index.get(task)
        if entry is None or not entry.yaml_path:
            members = sorted(entry.tags) if entry is not None and entry.tags else []
        else:
            config = load_yaml(entry.yaml_path, resolve_func=False)
            if config.get("dataset_path"):
                return str(config["dataset_path"])
            members = config.get("task") or []
        if not members or isinstance(members, str):
            return None
        first = members[0] if isinstance(members[0], str) else members[0].get("task") or members[0].get("group")
        task = str(first)
    return None


def _by_size(group: Any, metric: str | None) -> bool:
    """Whether the harness weights a group's tasks by their items, so that its score is the mean over all items."""
    listed = group.aggregate_metric_list or []
    return bool(listed) and all(part.weight_by_size for part in listed if metric in (None, part.metric))


def _set_shots(tasks: dict[str, Any], shots: int | None) -> None:
    for task in tasks.values():
        if shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)


def override_shots(tasks: dict[str, Any], shots: int | None) -> None:
    """Give every task so many worked examples, but those whose configuration says there are none."""
    if shots is not None:
        _set_shots(tasks, shots)


def run_task(model: ScoredModel, task: Any, *, limit: int | None, chat: bool) -> TaskScores:
    """Run one task, and keep what each item scores.

    Args:
        model: the model as the harness sees it.
        task: of the harness; its shots are set.
        limit: how many of its items, the first ones; None is all.
        chat: format questions with the chat template, worked examples as turns.
    """
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate

    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    task.set_fewshot_seed(seed=SEED)
    started = time.monotonic()
    name = task.task_name
    found = evaluate(
        lm=model,
        task_dict={"tasks": {name: task}, "groups": {}},
        limit=limit,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        bootstrap_iters=1000,
    )
    assert found is not None
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    metrics = _metrics(found["results"][name])
    items = {key: scores for key in metrics if (scores := _item_scores(samples, *key.split(",", 1))) is not None}
    first = samples[0]["filter"] if samples else "none"
    return TaskScores(
        task=name,
        version=str(found["versions"].get(name)),
        shots=int(found["n-shot"].get(name) or 0),
        chat=chat,
        metrics=metrics,
        items=items,
        hashes=[sample["doc_hash"][:16] for sample in samples if sample["filter"] == first],
        higher_is_better={k: bool(v) for k, v in (found["higher_is_better"].get(name) or {}).items()},
        seconds=round(time.monotonic() - started, 3),
        harness=check_installed(),
    )


def _metrics(results: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """ "metric,filter" -> (score, standard error) out of the harness' flat dictionary."""
    found: dict[str, tuple[float, float | None]] = {}
    for key, value in results.items():
        metric, comma, name = key.partition(",")
        if comma and not metric.endswith("_stderr") and _is_number(value):
            error: Any = results.get(f"{metric}_stderr,{name}")
            found[key] = (float(value), float(error) if _is_number(error) else None)
    return found


def _is_number(value: Any) -> bool:
    """Whether a value is one finite number, of Python or of numpy."""
    single = isinstance(value, int | float) or getattr(value, "ndim", None) == 0
    return single and math.isfinite(float(value))


def _item_scores(samples: Sequence[dict[str, Any]], metric: str, name: str) -> list[float] | None:
    """A metric's score per item; None where an item's isn't one number, as with F1 over a whole set."""
    scores = []
    for sample in samples:
        if sample["filter"] == name:
            value: Any = sample.get(metric)
            if not _is_number(value):
                return None
            scores.append(float(value))
    return scores or None


def config_of(task: Any) -> dict[str, Any]:
    """What of a task's configuration decides its scores; no path of this machine."""
    config = {key: value for key, value in dict(task.dump_config()).items() if key != "custom_dataset"}
    metadata = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
    return {**config, "metadata": metadata}
