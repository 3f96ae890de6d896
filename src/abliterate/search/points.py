"""How a fit's points are judged: by decoded answers to validation prompts, with three verdicts, and one is chosen."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from abliterate.common.reporting import Reporter
from abliterate.edit.edit import Edit
from abliterate.measure import Judged, reference_of
from abliterate.measure.divergence import Divergence, Reference
from abliterate.measure.judges import Judge, LexicalJudge
from abliterate.measure.rates import Rate
from abliterate.measure.verdicts import Panel, baseline_floor, irrelevant
from abliterate.measure.wordings import stock
from abliterate.models.handle import Handle
from abliterate.search import objectives
from abliterate.search.examples import Examples
from abliterate.search.fit_settings import FitSettings
from abliterate.search.frontier import FrontierPoint, Moment, choose

VALIDATION_TOKENS = 24


def panel_of(judge: Judge | None, train: Examples, reporter: Reporter) -> Panel:
    """The judge as a panel that has learnt the original's refusal wordings."""
    panel = judge if isinstance(judge, Panel) else Panel(judge or LexicalJudge())
    if not panel.learnt:
        reporter.say(panel.learn([a.text for a in train.refusals], [a.text for a in train.answers]))
    return panel


class PointJudge:
    """Judges a fit's points on validation prompts.

    Args:
        handle: the original.
        train, validation: prompts with the original's answers.
        panel: gives the verdicts.
        settings: sizes and limits.
        points: those judged so far; `choose` corrects what it finds evaded.

    Attributes:
        share: of the target prompts that points are judged on, those that the original refuses.
        answers: the answers of points judged in this process, by the point's place, and whether each is none.
    """

    def __init__(
        self, handle: Handle, train: Examples, validation: Examples, panel: Panel, settings: FitSettings,
        points: list[FrontierPoint],
    ) -> None:  # fmt: skip
        self.handle, self.train, self.validation, self.panel = handle, train, validation, panel
        self.settings, self.points = settings, points
        self.asked = validation.judged_on[: settings.validation_prompts]
        refused = set(validation.target)
        self.share = sum(p in refused for p in self.asked) / max(1, len(self.asked))
        self.answers: dict[int, Judged] = {}
        self.held_out = reference_of(handle, validation.baseline, validation.answers, tokens=VALIDATION_TOKENS)

    def judge(self, edit: Edit, **found: Any) -> FrontierPoint:
        """The next point: an edit and what it does; `found` says how it was come to."""
        answers, drift = self._answers(edit, self.held_out)
        assert drift is not None
        self.answers[len(self.points)] = answers
        texts = [a.text for a in answers.answers]
        verdicts = self.panel.verdicts(self.asked, texts)
        said = [text for text, verdict in zip(texts, verdicts, strict=True) if verdict != "refused"]
        alike = sum(stock(said)) / max(1, len(said)) if self.panel.forms else 0.0
        return FrontierPoint(
            edit, Rate(verdicts.count("refused"), len(verdicts)), drift.first_token, found=Moment.now(),
            divergence_along=drift.answer, evaded=verdicts.count("evaded"),
            collapse=max(0.0, alike - 2 * self._alike_before), **found,
        )  # fmt: skip

    def choose(self, reporter: Reporter) -> tuple[FrontierPoint, str]:
        """The point to take, and why; its answers must say something of their prompts, or the choice is made again."""
        settings, looked = self.settings, set[int]()
        while True:
            chosen, why = choose(
                self.points, settings.max_refusal_rate, settings.max_divergence,
                free_divergence=settings.free_divergence,
            )  # fmt: skip
            place = next(i for i, point in enumerate(self.points) if point is chosen)
            if place in looked:
                return chosen, why
            looked.add(place)
            if place not in self.answers:  # judged by an earlier process
                self.answers[place] = self._answers(chosen.edit)[0]
            answers = self.answers[place].answers
            verdicts = self.panel.verdicts(self.asked, [a.text for a in answers])
            tick = reporter.progress("reading answers behind other prompts", verdicts.count("answered"))
            found = irrelevant(self.handle, self.asked, answers, verdicts, self._floor, tick)
            self.points[place] = replace(chosen, evaded=found.count("evaded"))

    def _answers(self, edit: Edit, reference: Reference | None = None) -> tuple[Judged, Divergence | None]:
        tokens = self.settings.decode_tokens
        return objectives.tried(self.handle, edit, self.asked, self.panel.strict, reference, max_new_tokens=tokens)

    @cached_property
    def _alike_before(self) -> float:
        """Share of the original's baseline answers that are alike."""
        alike = stock([a.text for a in self.train.answers])
        return sum(alike) / max(1, len(alike))

    @cached_property
    def _floor(self) -> float:
        """How relevant an answer must be, by the original's baseline answers."""
        return baseline_floor(self.handle, self.validation.baseline, self.validation.answers)
