"""Which tasks of lm-evaluation-harness a suite holds, with how many examples, and by which metric each is read.

This module knows names only; nothing of the harness is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What a task is read by when its suite doesn't say: the first of these that it gives.
METRICS = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc", "em", "f1", "pass@1", "mc2")


@dataclass(frozen=True)
class SuiteTask:
    """A task or group of tasks of the harness.

    Attributes:
        name: as the harness has it.
        shots: worked examples before each question; None leaves the task's own number.
        metric: what it is read by; None takes the first of METRICS that the task gives.
        filter: which of the task's answer extractions counts; None takes the first.
        chat: whether questions become a user's turn where the model has a chat template and nothing else is asked for.
    """

    name: str
    shots: int | None = None
    metric: str | None = None
    filter: str | None = None
    chat: bool = False


@dataclass(frozen=True)
class Suite:
    """A named list of tasks.

    Attributes:
        name: what --suite takes.
        tasks: in the order of the table.
        about: one line for people.
    """

    name: str
    tasks: tuple[SuiteTask, ...]
    about: str


QUICK_TASKS = ("quick_knowledge", "quick_common_sense", "quick_reading", "quick_arithmetic", "quick_instructions")
BIG_BENCH = (
    "causal_judgment", "date_understanding", "disambiguation_qa", "geometric_shapes", "logical_deduction",
    "movie_recommendation", "navigate", "reasoning_about_colored_objects", "ruin_names",
    "salient_translation_error_detection", "snarks", "sports_understanding", "temporal_sequences",
    "tracking_shuffled_objects",
)  # fmt: skip

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "quick",
            tuple(SuiteTask(name, chat=name == "quick_instructions") for name in QUICK_TASKS),
            "210 bundled questions, offline, minutes on a CPU",
        ),
        Suite(
            "openllm",
            (
                SuiteTask("arc_challenge", 25, "acc_norm"),
                SuiteTask("hellaswag", 10, "acc_norm"),
                SuiteTask("mmlu", 5, "acc"),
                SuiteTask("truthfulqa_mc2", 0, "acc"),
                SuiteTask("winogrande", 5, "acc"),
                SuiteTask("gsm8k", 5, "exact_match", "strict-match"),
            ),
            "the first Open LLM Leaderboard's six, with its shots",
        ),
        Suite(
            "openllm2",
            (
                SuiteTask("leaderboard_ifeval", None, "prompt_level_strict_acc", chat=True),
                SuiteTask("leaderboard_bbh", None, "acc_norm", chat=True),
                SuiteTask("leaderboard_math_hard", None, "exact_match", chat=True),
                SuiteTask("leaderboard_gpqa", None, "acc_norm", chat=True),
                SuiteTask("leaderboard_musr", None, "acc_norm", chat=True),
                SuiteTask("leaderboard_mmlu_pro", None, "acc", chat=True),
            ),
            "the second Open LLM Leaderboard's six",
        ),
        # As mlabonne/llm-autoeval lists them. Its harness, a fork of 2023, had BIG-bench's objects (three, five,
        # seven) as tasks of their own; the harness of today has them together.
        Suite(
            "nous",
            (
                SuiteTask("agieval_nous", None, "acc_norm"),
                SuiteTask("hellaswag", None, "acc_norm"),
                SuiteTask("openbookqa", None, "acc_norm"),
                SuiteTask("winogrande", None, "acc"),
                SuiteTask("arc_easy", None, "acc_norm"),
                SuiteTask("arc_challenge", None, "acc_norm"),
                SuiteTask("boolq", None, "acc"),
                SuiteTask("piqa", None, "acc_norm"),
                SuiteTask("truthfulqa_mc2", None, "acc"),
                *(SuiteTask(f"bigbench_{name}_multiple_choice", None, "acc") for name in BIG_BENCH),
            ),
            "AGIEval, GPT4All's set, TruthfulQA and a part of BIG-bench",
        ),
    )
}  # fmt: skip


def suite_of(names: Sequence[str]) -> Suite:
    """One suite out of the names of suites and of the harness' tasks, each task once.

    A task that a suite holds is taken as the suite has it, but for its shots and what it is read by: alone, these are
    the task's own.

    Args:
        names: of suites, tasks or groups; each may hold several, separated by commas.
    """
    parts = [part for name in names for part in name.split(",") if part]
    if len(parts) == 1 and parts[0] in SUITES:
        return SUITES[parts[0]]
    chats = {task.name for suite in SUITES.values() for task in suite.tasks if task.chat}
    tasks: dict[str, SuiteTask] = {}
    for part in parts:
        alone = (SuiteTask(part, chat=part in chats),)
        for task in SUITES[part].tasks if part in SUITES else alone:
            tasks.setdefault(task.name, task)
    return Suite("+".join(parts), tuple(tasks.values()), "")
