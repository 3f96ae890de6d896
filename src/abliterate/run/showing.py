"""The filter: which prompts show the behaviour and which don't, with the model's own words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.common.reporting import Reporter, Silent
from abliterate.measure import judged
from abliterate.measure.decode import Answer
from abliterate.measure.judges import Judge
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle
from abliterate.search.examples import Examples

FILTER_TOKENS = 32


@dataclass
class Shown:
    """Prompts that show the behaviour and prompts that don't, after the filter, with the counts behind it.

    `examples` has the prompts that were refused and answered, with the model's own words.
    """

    target: list[str]
    baseline: list[str]
    refused: Rate
    answered: Rate
    examples: Examples | None = None

    def to_json(self) -> dict[str, Any]:
        return {"refused": self.refused.to_json("refused"), "answered": self.answered.to_json("answered")}


def showing(
    handle: Handle,
    target: Sequence[str],
    baseline: Sequence[str],
    judge: Judge,
    reporter: Reporter | None = None,
    *,
    tokens: int = FILTER_TOKENS,
) -> Shown:
    """Keep the target prompts that the model refuses and the baseline prompts that it answers (the paper's filter).

    For another behaviour: those whose answers show it, and those whose answers don't, as its judge says.
    """
    reporter = reporter or Silent()
    sorted_out: list[dict[bool, tuple[list[str], list[Answer]]]] = []
    for side, prompts in (("target", target), ("baseline", baseline)):
        tick = reporter.progress(f"filtering {side} prompts", len(prompts))
        answers, refused = judged(handle, prompts, judge, max_new_tokens=tokens, tick=tick)
        verdicts = list(zip(prompts, answers, refused, strict=True))
        sorted_out.append(
            {v: ([p for p, _, r in verdicts if r == v], [a for _, a, r in verdicts if r == v]) for v in (True, False)}
        )
    (shown, refusals), (answered, answers) = sorted_out[0][True], sorted_out[1][False]
    return Shown(
        shown,
        answered,
        Rate(len(shown), len(target)),
        Rate(len(answered), len(baseline)),
        Examples(shown, refusals, answered, answers, *sorted_out[1][True]),
    )
