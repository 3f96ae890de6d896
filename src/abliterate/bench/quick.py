"""The bundled tasks, as the harness takes them: questions written for this project, which need no network."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.bench.suites import QUICK_TASKS
from abliterate.measure import checks

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

DATA = Path(__file__).parent.parent / "data" / "bench"
VERSION = 1.0
ANSWER_TOKENS = {"quick_arithmetic": 24, "quick_instructions": 48}


def quick_task(name: str) -> ConfigurableTask:
    """A bundled task, one of QUICK_TASKS, as a task of the harness."""
    from lm_eval.api.task import ConfigurableTask

    config = {
        "task": name,
        "custom_dataset": functools.partial(_dataset, name),
        "test_split": "test",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc",)],
        "metadata": {"version": VERSION, "items": items_hash(name), "scoring": _scoring_hash()},
        **_FORMS[name],
    }
    if config["output_type"] == "multiple_choice":
        config["metric_list"] += [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]
    return ConfigurableTask(config=config)


def items(name: str) -> list[dict[str, Any]]:
    """The questions of a bundled task."""
    text = _file(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def items_hash(name: str) -> str:
    """Sha256 of a bundled task's questions."""
    return hashlib.sha256(_file(name).read_bytes()).hexdigest()


def _scoring_hash() -> str:
    """Sha256 of what scores: scores that it judged otherwise are others."""
    return hashlib.sha256(Path(__file__).read_bytes() + Path(checks.__file__).read_bytes()).hexdigest()


def _file(name: str) -> Path:
    return DATA / f"{name.removeprefix('quick_')}.jsonl"


def _dataset(name: str, **_metadata: Any) -> Any:
    """What the harness asks for instead of a data set of the Hub."""
    from datasets import Dataset, DatasetDict

    rows = items(name)
    if name == "quick_instructions":  # every check has other fields, and a table's column has one type
        rows = [{**row, "checks": json.dumps(row["checks"])} for row in rows]
    return DatasetDict({"test": Dataset.from_list(rows)})


def score_arithmetic(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 when the last number of the answer's first lines is the right one."""
    found = last_number(results[0])
    return {"acc": float(found is not None and abs(found - float(doc["answer"])) < 1e-6)}


def last_number(answer: str) -> float | None:
    """The last number in the first line that has one; commas that part thousands are left out."""
    for line in answer.splitlines():
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", line)
        if numbers:
            return float(numbers[-1].replace(",", ""))
    return None


def score_instructions(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 when the answer passes every check of its question."""
    return {"acc": float(checks.follows(results[0], json.loads(doc["checks"])))}


def _choices(question: str) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": question,
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 0,
    }


def _answers(name: str, **more: Any) -> dict[str, Any]:
    generation = {"until": more.pop("until"), "max_gen_toks": ANSWER_TOKENS[name], "do_sample": False}
    return {"output_type": "generate_until", "generation_kwargs": generation, **more}


WORKED = (
    {"question": "What is 3 + 4?", "answer": "7"},
    {"question": "What is 20 - 6?", "answer": "14"},
    {"question": "What is 6 times 3?", "answer": "18"},
    {"question": "Ann has 5 pens and buys 2 more. How many pens does she have?", "answer": "7"},
)
_FORMS: dict[str, dict[str, Any]] = {
    "quick_knowledge": _choices("Question: {{question}}\nAnswer:"),
    "quick_common_sense": _choices("{{question}}"),
    "quick_reading": _choices("{{passage}}\nQuestion: {{question}}\nAnswer:"),
    "quick_arithmetic": _answers(
        "quick_arithmetic",
        until=["\n\n", "Question:"],
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_target="answer",
        process_results=score_arithmetic,
        num_fewshot=len(WORKED),
        fewshot_config={"sampler": "first_n", "samples": list(WORKED)},
    ),
    "quick_instructions": _answers(
        "quick_instructions",
        until=[],
        doc_to_text="{{prompt}}",
        doc_to_target="",
        process_results=score_instructions,
        num_fewshot=0,
    ),
}
assert set(_FORMS) == set(QUICK_TASKS)
