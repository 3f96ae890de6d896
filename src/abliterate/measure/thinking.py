"""What answers with their reasoning left open show besides the verdict on what follows it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from abliterate.measure.decode import Answer
from abliterate.measure.rates import Rate
from abliterate.measure.refusal import is_refusal

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


def refuses_inside(answer: Answer) -> bool:
    """Whether a sentence of the reasoning, taken alone, is a refusal by its words; what follows it need not be."""
    return any(is_refusal(sentence) for sentence in _SENTENCE_END.split(answer.reasoning or "") if sentence.strip())


def thinking_json(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of one side's answers, as results.json has it: those with reasoning, refusing in it, and not out of it."""
    reasoned = [answer for answer in answers if answer.reasoning is not None]
    unclosed = Rate.of([answer.unclosed for answer in answers])
    return {
        "reasoned": Rate(len(reasoned), len(answers)).to_json(),
        "refused_inside": Rate.of([refuses_inside(answer) for answer in reasoned]).to_json("refused"),
        "unclosed": unclosed.to_json(),
    }
