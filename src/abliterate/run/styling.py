"""A run of a style: a behaviour that is added, or whose contrast is system prompts or pairs of answers."""

from __future__ import annotations

from typing import Any

from abliterate.common.errors import NothingToDoError
from abliterate.directions.activations import Activations
from abliterate.directions.contrast import ANSWER_TOKENS, Rows, collect_contrast, contrast
from abliterate.directions.keep import Kept
from abliterate.directions.means import Directions
from abliterate.measure import judged
from abliterate.measure.decode import decode
from abliterate.measure.rates import Rate
from abliterate.run.opening import Job
from abliterate.run.stages import decoding
from abliterate.run.strategy import Strategy
from abliterate.search.style_sweep import SweepSizes, remove_style
from abliterate.search.styles import StyleSettings, Taught, fit_style
from abliterate.search.sweep import Choice
from abliterate.settings.run import layer_range

LEAST_TO_REMOVE = 0.15
MOST_TO_ADD = 0.85
CHECK_PROMPTS = 48
MOST_LEARNT = 64  # training prompts besides the contrast's own
MOST_ASKED = 80  # training prompts that the edited model is asked


class Styling(Strategy):
    """Answers in a style against plain ones; an edit is chosen by whole answers."""

    before: Rate
    rows: Rows

    def filter(self, job: Job) -> None:
        """See how often the original shows the style on validation prompts.

        Raises:
            NothingToDoError: when there is nothing to remove, or it is there already; not with --force.
        """
        prompts = list(job.sides.target.validation.texts)[:CHECK_PROMPTS]
        tick = job.reporter.progress("answering validation prompts", len(prompts))
        _, shown = judged(job.handle, prompts, job.judge, stop_on=(), tick=tick, **decoding(job.settings))
        self.before = rate = Rate(sum(shown), len(shown))
        word, adds, source = job.behaviour.words.shows, job.behaviour.adds, job.handle.source
        job.reporter.say(f"validation: {rate.count} of {rate.total} of the original's answers are {word}")
        if job.settings.force:
            return
        low, high = rate.ci95
        said = f"{rate.count} of {rate.total} ({rate.rate:.0%}, 95% interval {low:.0%} to {high:.0%})"
        if not adds and rate.rate < LEAST_TO_REMOVE:
            raise NothingToDoError(
                f"answers of {source} are hardly {word}: {said} in the validation split; there is nothing to "
                "remove. Pass --force to go on, or give prompts that bring it out with --target"
            )
        if adds and rate.rate > MOST_TO_ADD:
            raise NothingToDoError(f"answers of {source} are {word} already: {said}. Pass --force to go on")

    def collect(self, job: Job) -> Activations:
        """Over the contrast of the behaviour's kind; over two prompt sets, for one that is added, as they stand."""
        handle, behaviour = job.handle, job.behaviour
        target, baseline = job.sides.target.train.texts, job.sides.baseline.train.texts
        if behaviour.kind == "prompts":
            self.rows = Rows(handle.prompt_ids(target), handle.prompt_ids(baseline))
        else:
            filters = job.settings.collect.filter
            self.rows = contrast(handle, behaviour, target, job.judge, filter=filters, reporter=job.reporter)
        return collect_contrast(handle, self.rows, job.settings.collect, reporter=job.reporter)

    def search(self, job: Job, directions: Directions, kept: Kept | None) -> Choice:
        search, handle, judge = job.settings.search, job.handle, job.judge
        layers = layer_range(search.layers) if search.layers else None
        tokens, seed = job.settings.measure.max_new_tokens, job.settings.seed
        target, baseline = job.sides.target.validation.texts, job.sides.baseline.validation.texts
        if job.behaviour.adds:  # it has to show where it doesn't: on baseline prompts, which may be the only ones
            options = StyleSettings(layers=layers, tokens=tokens, seed=seed)
            span = kept.span if kept else None
            taught = self._taught(job)
            return fit_style(
                handle, directions, taught, baseline, judge, options, kept=span, reporter=job.reporter
            )  # fmt: skip
        sizes = SweepSizes(
            layers=layers,
            tokens=tokens,
            max_rate=None if search.max_divergence is not None else search.max_refusal_rate,
            max_divergence=search.max_divergence,
        )
        return remove_style(handle, directions, target, baseline, judge, sizes, reporter=job.reporter)

    def _taught(self, job: Job) -> Taught:
        """Answers in the style, behind the prompts as they stand."""
        handle, rows, baseline = job.handle, self.rows, job.sides.baseline.train.texts[:MOST_LEARNT]
        if rows.answers:
            prompts, shown = handle.prompt_ids(rows.prompts), rows.said(0)
        else:  # prompts alone contrast: the model's own answers to them
            prompts = handle.prompt_ids(rows.prompts or baseline)
            own = [a.whole for a in decode(handle, rows.target, max_new_tokens=ANSWER_TOKENS)]
            shown = [own[i % len(own)] for i in range(len(prompts))]
        return Taught(prompts, shown, list(dict.fromkeys([*rows.prompts, *baseline]))[:MOST_ASKED])

    def prompt_facts(self) -> dict[str, Any]:
        return {
            "filter": None,
            "validation": {"original": self.before.to_json("refused")},
            "contrast": {"target": len(self.rows.target), "baseline": len(self.rows.baseline)},
        }
