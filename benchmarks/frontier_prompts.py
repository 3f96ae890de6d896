"""The prompts and the chat that both tools and the evaluator get in `frontier.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KL_PROMPTS = 100  # Heretic's default number of baseline prompts it evaluates a trial on
HERETIC_SYSTEM_PROMPT = "You are a helpful assistant."


@dataclass(frozen=True)
class Held:
    """The test split, which neither tool sees."""

    target: tuple[str, ...]
    baseline: tuple[str, ...]


def held_out(most: int | None) -> Held:
    """Test prompts of both sides, at most so many of each; all are 200 and 250."""
    from abliterate.prompts.sets import load_sides

    sides = load_sides("bundled", "bundled", limit_test=most)
    return Held(sides.target.test.texts, sides.baseline.test.texts)


def write_heretic_prompts(folder: Path) -> dict[str, dict[str, str]]:
    """Write the training and validation prompts as Heretic reads them; returns its tables of settings.

    Folders of JSON lines, not text files: some prompts hold more than one line.
    """
    from abliterate.prompts.sets import load_sides

    sides = load_sides("bundled", "bundled")
    sets = {
        "good_prompts": sides.baseline.train.texts,
        "bad_prompts": sides.target.train.texts,
        "good_evaluation_prompts": sides.baseline.validation.texts[:KL_PROMPTS],
        "bad_evaluation_prompts": sides.target.validation.texts,
    }
    tables = {}
    for name, texts in sets.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / name / "train.jsonl").write_text(rows, encoding="utf-8")
        tables[name] = {"dataset": str(folder / name), "split": "train", "column": "text"}
    return tables


def own_system_prompt(model: Path | str) -> str | None:
    """What the chat template writes as the system's turn when there is none; None when it writes none.

    Heretic always sends a system prompt. Sending the template's own makes its chats those of everybody else.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    mark, user = "THE-SYSTEM-PROMPT", {"role": "user", "content": "Hello."}

    def rendered(chat: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    before, _, after = rendered([{"role": "system", "content": mark}, user]).partition(mark)
    plain = rendered([user])
    if len(plain) > len(before) + len(after) and plain.startswith(before) and plain.endswith(after):
        return plain[len(before) : len(plain) - len(after)]
    return None
