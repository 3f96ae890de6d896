"""Are instructions still obeyed: system prompts whose keeping a machine can check, before and after an edit.

Undoing refusals must not undo obedience: an operator's "reply in German" or "speak of cooking only" is not a guardrail.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from abliterate.common.errors import ModelError
from abliterate.common.reporting import Tick, untold
from abliterate.measure.checks import follows
from abliterate.measure.coherence import why_degenerate
from abliterate.measure.decode import BATCH, decode
from abliterate.measure.differences import paired
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle
from abliterate.prompts.chat import check_context


@dataclass(frozen=True)
class Obligation:
    """A system prompt, what is asked under it, and the `checks` that an obedient answer passes."""

    system: str
    prompt: str
    kind: str
    checks: Sequence[Mapping[str, Any]]


@cache
def obligations() -> tuple[Obligation, ...]:
    """The bundled ones; any first few are of different kinds."""
    text = (resources.files("abliterate") / "data" / "obligations.jsonl").read_text(encoding="utf-8")
    return tuple(Obligation(**json.loads(line)) for line in text.splitlines())


def instructed_ids(handle: Handle, given: Sequence[Obligation]) -> tuple[list[list[int]], str]:
    """Token ids of each, and who instructs: "system", or "user" where the chat template knows no system prompt.

    Raises:
        PromptError: the context is too short for one.
    """
    messages = [[{"role": "system", "content": o.system}, {"role": "user", "content": o.prompt}] for o in given]
    role = "system"
    try:
        ids = [handle.conversation_ids(one) for one in messages]
    except ModelError:
        role = "user"
        ids = [handle.conversation_ids([{"role": "user", "content": f"{o.system}\n\n{o.prompt}"}]) for o in given]
    if handle.context_length:
        check_context(ids, handle.context_length, [o.prompt for o in given])
    return ids, role


def obeyed(
    handle: Handle, given: Sequence[Obligation], *, max_new_tokens: int, batch_size: int = BATCH, tick: Tick = untold
) -> list[bool]:
    """Whether a model's greedy answer keeps each obligation; an answer that loops keeps none."""
    ids, _ = instructed_ids(handle, given)
    answers = decode(handle, ids, max_new_tokens=max_new_tokens, batch_size=batch_size, tick=tick)
    return [
        follows(answer.text, one.checks) and why_degenerate(answer.text, finished=False) is None
        for one, answer in zip(given, answers, strict=True)
    ]


def obligations_json(given: Sequence[Obligation], kept: Mapping[str, list[bool]], role: str) -> dict[str, Any]:
    """What results.json says of them.

    Args:
        given: what was asked.
        kept: by state (original, edited), from `obeyed`.
        role: who instructs, from `instructed_ids`.
    """
    kinds: dict[str, dict[str, int]] = {}
    for state, found in kept.items():
        counts: defaultdict[str, int] = defaultdict(int)
        for one, is_kept in zip(given, found, strict=True):
            counts[one.kind] += is_kept
        for kind in dict.fromkeys(one.kind for one in given):
            total = sum(one.kind == kind for one in given)
            kinds.setdefault(kind, {"total": total})[state] = counts[kind]
    facts: dict[str, Any] = {"prompts": len(given), "role": role}
    facts |= {state: Rate.of(found).to_json() for state, found in kept.items()}
    if {"original", "edited"} <= set(kept):
        facts["paired"] = paired(kept["original"], kept["edited"])
    return {**facts, "kinds": kinds}
