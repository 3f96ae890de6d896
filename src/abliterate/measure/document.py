"""results.json as types: what a run, a healing or a measuring found, for whoever writes it or reads it.

A document keeps fields that it doesn't know, so that an older or newer file comes through whole; `to_json` gives
back what was put in and adds nothing. docs/results.schema.json is made of these types:

    python -m abliterate.measure.document > docs/results.schema.json
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from abliterate.common.errors import AbliterateError
from abliterate.measure.numbers import (
    AlsoSet,
    Candidate,
    FrontierPoint,
    Measured,
    ObligationNumbers,
    Part,
    Share,
    Span,
    ThinkingSides,
)

SCHEMA = 1  # of results.json
STATES = ("original", "edited", "healed")


class Component(Part):
    """The largest |r.h|/|h| in the stream, and where; `where` is empty where no place stands out."""

    component: float
    where: str = ""


class Proofs(Part):
    """What speaks for the edit being whole.

    Attributes:
        writers: left of a random direction that is taken out of every writer found.
        edited: left, in the edited model, of that of the edit's directions of which most is left.
    """

    writers: Component
    edited: Component | None = None


class Removed(Part):
    """One direction of an edit, and how much of it the edited model's stream holds.

    A strength a leaves 1 - a of what a writer writes along the direction, so `left` is to be read against `expected`.

    Attributes:
        writers: how many it is taken out of.
        layers: their blocks; without the embedding.
        sides: what they are: embedding, attention, mlp.
        strength: least and largest there.
        before: largest component |r.h|/|h| in the original's stream.
        left: the same in the edited model.
        expected: the same in the original with the edit computed beside it, in the stream's own precision.
        where: the place of `left`.
    """

    writers: int
    layers: list[int]
    sides: list[str]
    strength: Span
    before: float
    left: float
    expected: float
    where: str = ""


class Shift(Part):
    """So much of a unit direction added at a block's output."""

    layer: int
    size: float


class RecipeFacts(Part):
    """The edit, and how it was found.

    Attributes:
        method: fit, tpe, sweep, article or induce.
        direction: the candidate chosen; of a fit or a tpe search, where the two sides part best.
        writers: how many writers something is taken out of.
        strength: least and largest of those that aren't zero.
        tied: "kept" or "untied" for an embedding tied to the head.
        removed: each direction taken out.
        shifts: what is added.
        weights_hold_it, switch: whether the saved weights hold the edit, and the config's field that lets them.
    """

    method: str | None = None
    file: str | None = None
    direction: Candidate | None = None
    writers: int | None = None
    strength: Span | None = None
    proof: Proofs | None = None
    tied: str | None = None
    removed: list[Removed] = Field(default_factory=list)
    shifts: list[Shift] = Field(default_factory=list)
    weights_hold_it: bool | None = None
    switch: str | None = None

    @property
    def induced(self) -> bool:
        """Whether it makes the model show the behaviour, and not leave it."""
        return self.method == "induce"


class ModelFacts(Part):
    """The model measured first: the original where there is one."""

    source: str | None = None
    revision: str | None = None
    class_: str | None = Field(None, alias="class")
    config_hash: str | None = None
    parameters: int | None = None
    layers: int | None = None
    d_model: int | None = None
    dtype: str | None = None
    prefill: str | None = None


class Words(Part):
    """What a behaviour is called in texts."""

    shows: str = "refused"
    rate: str = "refusals"
    over: str = "over-refusals"


class BehaviourFacts(Part):
    """The behaviour that was looked for; docs/behaviours.md."""

    name: str = "refusal"
    about: str = ""
    kind: str = "prompts"
    sign: str = "remove"
    one_set: bool = False
    words: Words = Field(default_factory=Words)
    judge: str | None = None

    @property
    def runs_as_style(self) -> bool:
        """Whether its contrast isn't two sets of prompts, or it is added."""
        return self.kind != "prompts" or self.sign == "add"


class SplitFacts(Part):
    """How many prompts a split has, and the SHA-256 of them."""

    count: int
    sha256: str


class SideFacts(Part):
    """Where a side's prompts come from."""

    source: str
    train: SplitFacts
    validation: SplitFacts
    test: SplitFacts


class FilterFacts(Part):
    """Which training prompts made the directions: targets that show the behaviour, baselines that don't."""

    refused: Share | None = None
    answered: Share | None = None


class WordingFacts(Part):
    """How many refusal wordings were learnt from the original's own answers, and how many no list knew."""

    learnt: int
    unknown: int


class PromptFacts(Part):
    """The prompts, and what the original's answers to them taught."""

    target: SideFacts | None = None
    baseline: SideFacts | None = None
    filter: FilterFacts | None = None
    wordings: WordingFacts | None = None
    validation: dict[str, Share] | None = None
    contrast: dict[str, int] | None = None
    template_date: str | None = None
    template_switches: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


class MeasureUsed(Part):
    """How answers were judged."""

    judge: str | None = None
    max_new_tokens: int | None = None


class SettingsUsed(Part):
    """The settings of the run (`settings.run.RunSettings` and its kin, as they were when it was written)."""

    seed: int | None = None
    load: dict[str, Any] = Field(default_factory=dict)
    prompts: dict[str, Any] = Field(default_factory=dict)
    collect: dict[str, Any] = Field(default_factory=dict)
    search: dict[str, Any] = Field(default_factory=dict)
    measure: MeasureUsed = Field(default_factory=MeasureUsed)
    beside: dict[str, Any] = Field(default_factory=dict)
    heal: dict[str, Any] = Field(default_factory=dict)


class HealFacts(Part):
    """How an edited model was healed.

    Attributes:
        model, original: sources of the edited model and of its original.
        settings: every one as it was used.
        steps: of training.
        lessons, held_away: of the preset `self`: prompts learnt from, refusals kept away.
        data: of the preset `dpo`: counts of pairs.
    """

    preset: str
    model: str | None = None
    original: str | None = None
    adapter: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    seconds: float | None = None
    steps: int | None = None
    lessons: int | None = None
    held_away: int | None = None
    data: dict[str, Any] | None = None


class RunDocument(Part):
    """results.json of `abliterate run`, `heal` and `measure`.

    Attributes:
        original, edited, healed: the measurements that there are.
        also: further sets of prompts measured besides.
        obligations: instructions that are kept or aren't.
        thinking: with `--think`, what the reasoning shows, by state.
        kept: what `--keep` was asked to keep, and whether it is; docs/behaviours.md.
        candidates: the directions looked at.
        frontier: the edits that no other beats, where the search leaves some.
        environment: versions and machine.
        timings_s: seconds per stage.
    """

    schema_: int = Field(SCHEMA, alias="schema")
    model: ModelFacts = Field(default_factory=ModelFacts)
    behaviour: BehaviourFacts | None = None
    recipe: RecipeFacts | None = None
    settings: SettingsUsed = Field(default_factory=SettingsUsed)
    prompts: PromptFacts = Field(default_factory=PromptFacts)
    environment: dict[str, Any] = Field(default_factory=dict)
    original: Measured | None = None
    edited: Measured | None = None
    healed: Measured | None = None
    also: list[AlsoSet] = Field(default_factory=list)
    obligations: ObligationNumbers | None = None
    thinking: dict[str, ThinkingSides] = Field(default_factory=dict)
    kept: dict[str, Any] | None = None
    candidates: list[Candidate] = Field(default_factory=list)
    frontier: list[FrontierPoint] = Field(default_factory=list)
    heal: HealFacts | None = None
    timings_s: dict[str, float] = Field(default_factory=dict)

    @property
    def states(self) -> dict[str, Measured]:
        """The measurements that there are, the original first."""
        found = {name: getattr(self, name) for name in STATES}
        return {name: measured for name, measured in found.items() if measured is not None}

    @property
    def about(self) -> BehaviourFacts:
        """The behaviour; refusing where the file doesn't say."""
        return self.behaviour or BehaviourFacts()

    @property
    def induced(self) -> bool:
        """Whether the model was made to show the behaviour by `--induce`."""
        return self.recipe is not None and self.recipe.induced

    def to_json(self) -> dict[str, Any]:
        """The document as plain JSON: the fields that were given, and no others."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write it."""
        Path(file).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


def load_document(file: str | os.PathLike[str]) -> RunDocument:
    """Read a results.json.

    Raises:
        AbliterateError: when it can't be read, or isn't one of abliterate's that this version knows.
    """
    try:
        return RunDocument.model_validate(read_object(file, SCHEMA, SCHEMA))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AbliterateError(f"{file} is not one of abliterate's: {where}: {first['msg']}") from error


def read_object(file: str | os.PathLike[str], schema: int, unsaid: int | None = None) -> dict[str, Any]:
    """Read a JSON object of this schema; `unsaid` is that of a file which doesn't say its own.

    Raises:
        AbliterateError: when the file can't be read, or isn't of that schema.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AbliterateError(f"{file} can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise AbliterateError(f"{file} is not one of abliterate's: it holds no JSON object")
    if found.get("schema", unsaid) != schema:
        raise AbliterateError(f"{file} has schema {found.get('schema')}; this version reads {schema}")
    return found


def schema() -> dict[str, Any]:
    """The JSON schema of results.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunDocument.model_json_schema()}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
