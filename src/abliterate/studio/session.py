"""What one user of the page has: a model, a recipe, strengths, and the answers to the last question."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from abliterate.common.errors import AbliterateError
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe, check_model
from abliterate.studio.conversation import Conversation, Sampling
from abliterate.studio.exporting import Export
from abliterate.studio.models import Loaded

GROUPS = ("attention", "mlp", "embedding")
LEAST_STRENGTH, MOST_STRENGTH = -2.0, 3.0


@dataclass(frozen=True)
class Strengths:
    """Factors on a recipe's strengths: one on everything, and one per kind of writer.

    Attributes:
        overall: 0 is the original, 1 the recipe as it is; shifts follow it alone.
        groups: attention, mlp, embedding -> factor.
    """

    overall: float = 1.0
    groups: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(GROUPS, 1.0))

    @classmethod
    def of(cls, overall: float, *groups: float) -> Strengths:
        """From numbers of the page, in the order of GROUPS.

        Raises:
            AbliterateError: when one is out of range.
        """
        for value in (overall, *groups):
            if not isinstance(value, int | float) or not LEAST_STRENGTH <= value <= MOST_STRENGTH:
                raise AbliterateError(f"strength {value} is not from {LEAST_STRENGTH:g} to {MOST_STRENGTH:g}")
        return cls(float(overall), dict(zip(GROUPS, map(float, groups), strict=True)))

    def words(self) -> str:
        """For people: the overall strength, and the groups that differ from it."""
        others = [f"{name} × {factor:g}" for name, factor in self.groups.items() if factor != 1]
        return ", ".join([f"strength {self.overall:g}", *others])


def grouped(edit: Edit, sides: Mapping[str, str], strengths: Strengths) -> Edit:
    """The edit with each writer's strengths times its group's factor, and everything times the overall one.

    Args:
        edit: its directions stay as they are.
        sides: writer -> its group; a writer that isn't in it follows the overall strength alone.
        strengths: the factors.
    """
    factors = [strengths.groups.get(sides.get(name, ""), 1.0) for name in edit.writers]
    rows = edit.strengths * np.array(factors, np.float32)[:, None] if factors else edit.strengths
    return replace(edit, strengths=rows) * strengths.overall


@dataclass(frozen=True)
class Question:
    """What both models are asked, and how they answer."""

    text: str
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class Answers:
    """Two answers as far as they have come, and the strengths the edited one was given with.

    Attributes:
        whole: both have come to their end; only the grid says so.
    """

    original: str = ""
    edited: str = ""
    strengths: Strengths = field(default_factory=Strengths)
    whole: bool = False


class Session:
    """One user's; several streams of one user never run at once (`streaming`).

    Attributes:
        loaded: the model.
        recipe, recipe_name: what is attached; None for the model as it is.
        strengths: as the sliders stand now.
        question: the last one asked.
        answers: to it.
        stopping: set to have the stream that goes on end.
        export: the last one begun.
    """

    def __init__(self) -> None:
        self.loaded: Loaded | None = None
        self.recipe: Recipe | None = None
        self.recipe_name = ""
        self.strengths = Strengths()
        self.question: Question | None = None
        self.answers = Answers()
        self.stopping = False
        self.export: Export | None = None
        self._busy = False
        self._lock = threading.Lock()

    def __deepcopy__(self, _memo: Any) -> Session:
        return Session()  # gradio copies the value that a user starts with; a lock can't be

    @property
    def model(self) -> Loaded:
        """The model.

        Raises:
            AbliterateError: when none is loaded.
        """
        if self.loaded is None:
            raise AbliterateError("no model is loaded; choose one and press Load")
        return self.loaded

    def use(self, loaded: Loaded, recipe: Recipe | None, name: str = "") -> None:
        """Take a model and a recipe for it, at the recipe's own strengths; what was asked is forgotten.

        Raises:
            RecipeError: when the recipe was made for another model.
            AbliterateError: when it doesn't fit.
        """
        if recipe is not None:
            check_model(recipe, loaded.handle.config_hash)
            loaded.check_fits(recipe.edit)
        self.stopping = True
        self.loaded, self.recipe, self.recipe_name = loaded, recipe, name
        self.strengths, self.question, self.answers = Strengths(), None, Answers()

    def edit(self, strengths: Strengths) -> Edit | None:
        """The recipe's edit at these strengths."""
        return None if self.recipe is None else grouped(self.recipe.edit, self.model.sides, strengths)

    def scaled_recipe(self) -> Recipe:
        """The recipe as the sliders have it; what was measured of another strength is left out.

        Raises:
            AbliterateError: when there is no recipe.
        """
        edit = self.edit(self.strengths)
        if self.recipe is None or edit is None:
            raise AbliterateError("there is no recipe to keep; choose one and press Load")
        if self.strengths == Strengths():
            return self.recipe
        provenance = {k: v for k, v in self.recipe.provenance.items() if k not in ("edited", "validation")}
        earlier = provenance.get("scaled", [])
        now = {"overall": self.strengths.overall, **self.strengths.groups}
        return replace(self.recipe, edit=edit, provenance={**provenance, "scaled": [*earlier, now]})

    @contextmanager
    def streaming(self, *, take_over: bool = False) -> Iterator[bool]:
        """Whether this stream may go on: False when another of this user's does.

        Args:
            take_over: have the other one end first.
        """
        mine = self._begin()
        while take_over and not mine:
            self.stopping = True
            time.sleep(0.02)
            mine = self._begin()
        try:
            yield mine
        finally:
            if mine:
                with self._lock:
                    self._busy = False

    def _begin(self) -> bool:
        with self._lock:
            if self._busy:
                return False
            self._busy, self.stopping = True, False
            return True

    def ask(self, question: Question) -> Iterator[Answers]:
        """Both answers, growing token by token in turn; the edited one begins anew when a strength changes.

        Raises:
            AbliterateError: when no model is loaded, or the question is empty or too long for it.
        """
        check_question(question)
        _ = self.model  # an error before what goes on is stopped
        with self.streaming(take_over=True):
            self.question, self.answers = question, Answers()
            yield from self._answering(question, self.answers, both=True)

    def answer_again(self) -> Iterator[Answers]:
        """The edited answer at the strengths as they are now; nothing when it is, or a stream sees to it."""
        while self.question is not None and self.answers.strengths != self.strengths:
            with self.streaming() as mine:
                if mine:
                    yield from self._answering(self.question, self.answers, both=False)
                    return
            time.sleep(0.05)  # the stream that goes on takes the new strengths up, unless it is just ending

    def _answering(self, question: Question, answers: Answers, *, both: bool) -> Iterator[Answers]:
        original = self._pieces(question, None) if both else iter(())
        edited: Iterator[str] = iter(())
        begun: Strengths | None = None
        while not self.stopping and self.answers is answers:
            if begun != self.strengths:  # a slider moved
                begun = answers.strengths = self.strengths
                answers.edited = ""
                edited = self._pieces(question, self.edit(begun)) if self.recipe is not None else iter(())
            left, right = next(original, ""), next(edited, "")
            answers.original += left
            answers.edited += right
            yield answers  # also an empty one: what stood there before is gone
            if not left and not right and begun == self.strengths:
                break

    def grid(self, texts: Sequence[str], system: str, sampling: Sampling) -> Iterator[list[Answers]]:
        """Both answers to each of several prompts, at the strengths as they are at the start."""
        rows, edit = [Answers(strengths=self.strengths) for _ in texts], self.edit(self.strengths)
        _ = self.model
        with self.streaming(take_over=True):
            for row, text in zip(rows, texts, strict=True):
                question = Question(text, system, sampling)
                check_question(question)
                for name, found in (("original", None), ("edited", edit)):
                    if name == "edited" and edit is None:
                        continue
                    for piece in self._pieces(question, found):
                        if self.stopping:
                            return
                        setattr(row, name, getattr(row, name) + piece)
                        yield rows
                row.whole = True
                yield rows

    def _pieces(self, question: Question, edit: Edit | None) -> Iterator[str]:
        """An answer of its own conversation: nothing but the weights is shared with anybody."""
        loaded = self.model
        system = question.system or loaded.handle.system_prompt
        messages = [{"role": "system", "content": system}] if system else []
        talk = Conversation(loaded.handle, edit, 1.0, question.sampling)
        return loaded.stepping(talk.stream([*messages, {"role": "user", "content": question.text}]))


def check_question(question: Question) -> None:
    """Raise AbliterateError when there is nothing to answer."""
    if not question.text.strip():
        raise AbliterateError("the prompt is empty; type one")
