"""The stages that several jobs share: collecting activations, measuring a model."""

from __future__ import annotations

from collections.abc import Sequence

from abliterate.common.errors import AbliterateError
from abliterate.common.reporting import Reporter, Tick
from abliterate.directions.activations import Activations, collect
from abliterate.measure import Measurement, look_for_relevance, measure
from abliterate.measure.judges import Judge
from abliterate.models.handle import Handle
from abliterate.prompts.sets import Sides
from abliterate.settings.run import CollectSettings, RunSettings


def collected(
    handle: Handle, target: Sequence[str], baseline: Sequence[str], settings: CollectSettings, reporter: Reporter,
    *, keep_vectors: bool = False,
) -> Activations:  # fmt: skip
    """Collect over these prompts as the settings say."""
    return collect(
        handle,
        target,
        baseline,
        positions=settings.positions,
        batch_size=settings.batch_size,
        winsorise=settings.winsorise,
        keep_vectors=keep_vectors,
        tick=reporter.progress("collecting activations", len(target) + len(baseline)),
    )


def measured(
    handle: Handle, sides: Sides, judge: Judge, settings: RunSettings, reporter: Reporter, name: str,
    original: Measurement | None = None, *, second: Judge | None = None, relevance: bool = True,
) -> Measurement:  # fmt: skip
    """Measure a model on the test split as the settings say.

    Args:
        handle, sides, judge, settings, reporter: as in the job.
        name: tells its progress from others'.
        original: the original's measurement, where this isn't the original.
        second: a judge that choosing never saw.
        relevance: look now whether answers are about their prompts, by this model's own probabilities; else the caller
            does by `relevant`, with the original.
    """

    def progress(stage: str, total: int) -> Tick:
        return reporter.progress(f"{name}: {stage}", total)

    found = measure(
        handle,
        sides.target.test.texts,
        sides.baseline.test.texts,
        original=original,
        judge=judge,
        second=second,
        progress=progress,
        **decoding(settings),
    )
    if relevance:
        relevant(handle, found, sides, reporter, name, original)
    return found


def relevant(
    handle: Handle, found: Measurement, sides: Sides, reporter: Reporter, name: str, original: Measurement | None = None
) -> None:
    """Take answers that say nothing about their prompts for evasions; see `measure.look_for_relevance`."""
    if found.verdicts is not None:
        tick = reporter.progress(f"{name}: relevance", 3 * found.verdicts.count("answered"))
        look_for_relevance(handle, found, sides.target.test.texts, sides.baseline.test.texts, original, tick)


def decoding(settings: RunSettings) -> dict[str, int]:
    """How answers are decoded to be measured, as arguments of `judged` and its kin."""
    return {"max_new_tokens": settings.measure.max_new_tokens, "batch_size": settings.measure.batch_size}


def check_same_tokens(handle: Handle, sides: Sides, before: Measurement, model: str, original: str | None) -> None:
    """Raise AbliterateError when models read the prompts as different tokens: no divergence is defined between them."""
    rows = before.reference.rows if before.reference else []
    starts = {tuple(ids) for ids in handle.prompt_ids(sides.baseline.test.texts)}
    lengths = {len(ids) for ids in starts}
    if not all(any(tuple(row[:n]) in starts for n in lengths) for row in rows):
        raise AbliterateError(
            f"{model} reads the prompts as other tokens than {original}, so there is no divergence between them; "
            "leave --original out, or measure with the same tokenizer and chat template"
        )
