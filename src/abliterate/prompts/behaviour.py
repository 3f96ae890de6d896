"""What a behaviour is, and reading one from its TOML file (docs/behaviours.md). No models here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from abliterate.common import toml
from abliterate.common.errors import AbliterateError, PromptError
from abliterate.prompts.style import Style

if TYPE_CHECKING:
    from abliterate.settings.run import RunSettings

BUNDLED = ("refusal", "persona", "slop")
DOCUMENTED = "docs/behaviours.md says what a behaviour's file may hold"
LEAST_PAIRS = 8


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Words(_Table):
    """How tables and cards speak of the behaviour.

    Attributes:
        shows: what an answer that shows it is: "refused", "melancholic".
        rate: the table's row of its rate on target prompts; `over` that on baseline prompts.
    """

    shows: str = Field(min_length=1)
    rate: str = Field(min_length=1)
    over: str = Field(min_length=1)


class PromptSources(_Table):
    """Where the measured prompts come from: two sets, or one (`both`); each a source or a list of texts."""

    target: str | tuple[str, ...] | None = None
    baseline: str | tuple[str, ...] | None = None
    both: str | tuple[str, ...] | None = None
    target_column: str | None = None
    baseline_column: str | None = None


class SystemPrompts(_Table):
    """The two system prompts of a kind "system-prompts", and what is asked under both (the training split if empty)."""

    target: str = Field(min_length=1)
    baseline: str = Field(min_length=1)
    prompts: tuple[str, ...] = ()


class InlinePair(_Table):
    """Two answers to one prompt."""

    prompt: str = Field(min_length=1)
    target: str = Field(min_length=1)
    baseline: str = Field(min_length=1)


class Answers(_Table):
    """The pairs of answers of a kind "answers": in a .jsonl file beside the TOML file, or in it."""

    file: str | None = None
    pairs: tuple[InlinePair, ...] = ()


class JudgeTable(_Table):
    """What decides whether an answer shows the behaviour: `use` names a judge, else words and patterns are a style."""

    use: str | None = None
    words: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    threshold: float = Field(3.0, gt=0)
    distinct: int = Field(2, ge=1)
    least_words: int = Field(25, ge=1)

    @property
    def style(self) -> Style:
        """The style of its words and patterns; an AbliterateError on a pattern that isn't a regular expression."""
        return Style(self.words, self.patterns, self.threshold, self.distinct, self.least_words)


class Defaults(_Table):
    """What a run takes where the user says nothing."""

    method: Literal["fit", "sweep", "article", "tpe"] | None = None
    positions: int | None = Field(None, ge=1)
    max_divergence: float | None = Field(None, ge=0)


class _File(_Table):
    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,40}$")
    about: str = Field(min_length=1)
    kind: Literal["prompts", "system-prompts", "answers"]
    sign: Literal["remove", "add"] = "remove"
    read: Literal["prompt", "answer"] | None = None
    words: Words
    prompts: PromptSources = PromptSources()
    system_prompts: SystemPrompts | None = None
    answers: Answers | None = None
    judge: JudgeTable
    defaults: Defaults = Field(default_factory=lambda: Defaults.model_validate({}))

    @model_validator(mode="after")
    def _fits_its_kind(self) -> _File:
        needs: dict[str, object] = {"system-prompts": self.system_prompts, "answers": self.answers}
        for kind, table in needs.items():
            name = kind.replace("-", "_")
            if self.kind == kind and table is None:
                raise ValueError(f"kind {kind!r} needs a table [{name}]")
            if self.kind != kind and table is not None:
                raise ValueError(f"kind {self.kind!r} has no use for a table [{name}]")
        sources = self.prompts
        both, either = sources.both is not None, sources.target is not None or sources.baseline is not None
        if both and either:
            raise ValueError("[prompts] holds `both` and `target` or `baseline`; it is one set or two")
        if self.kind == "prompts" and both:
            raise ValueError("kind 'prompts' is a contrast of two sets; give `target` and `baseline` in [prompts]")
        if not both and self.name != "refusal" and (sources.target is None or sources.baseline is None):
            raise ValueError("[prompts] needs `target` and `baseline`, or `both`")
        if self.kind == "prompts" and self.read == "answer":
            raise ValueError("read = 'answer' is for kinds 'system-prompts' and 'answers'")
        if self.kind == "answers" and self.read == "prompt":
            raise ValueError("kind 'answers' is read along the answers; leave `read` out")
        if self.judge.use is None and not (self.judge.words or self.judge.patterns):
            raise ValueError("[judge] needs `use`, or `words` or `patterns` of a style")
        if self.judge.use is not None and (self.judge.words or self.judge.patterns):
            raise ValueError("[judge] holds `use` and words of a style; it is one or the other")
        if self.answers and bool(self.answers.file) == bool(self.answers.pairs):
            raise ValueError("[answers] needs `file` or `pairs`, not both")
        return self


class Pair(NamedTuple):
    """Two answers to one prompt: one that shows the behaviour, and one that doesn't."""

    prompt: str
    target: str
    baseline: str


@dataclass(frozen=True)
class Behaviour:
    """A behaviour: what contrasts, what judges, whether it is removed or added.

    Attributes:
        definition: the file's tables.
        source: the bundled name or the file's path.
        folder: what paths in the file are relative to.
    """

    definition: _File
    source: str
    folder: Path

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def kind(self) -> str:
        return self.definition.kind

    @property
    def adds(self) -> bool:
        """Whether it is put in rather than taken out."""
        return self.definition.sign == "add"

    @property
    def words(self) -> Words:
        return self.definition.words

    @property
    def along_answers(self) -> bool:
        """Whether activations are means along answers; else they are read at the prompt's last positions."""
        return self.kind == "answers" or (self.kind == "system-prompts" and self.definition.read != "prompt")

    @property
    def is_style(self) -> bool:
        """Whether the judge reads style: it needs whole answers, and openings tell nothing."""
        return self.definition.judge.use is None

    @property
    def one_set(self) -> bool:
        """Whether there is one set of prompts, on which the behaviour shows or doesn't."""
        return self.definition.prompts.both is not None

    @property
    def judge_spec(self) -> str:
        """What `--judge` would be for it."""
        return self.definition.judge.use or f"style:{self.source}"

    def _systems(self) -> dict[str, str]:
        systems = self.definition.system_prompts
        assert systems is not None
        return {"target": systems.target, "baseline": systems.baseline}

    @property
    def own_prompts(self) -> tuple[str, ...]:
        """Prompts that the contrast is made of and that must not be measured: of pairs, or asked under both systems."""
        systems = self.definition.system_prompts
        return (*(pair.prompt for pair in self.pairs), *(systems.prompts if systems else ()))

    @property
    def style(self) -> Style:
        """What counts as showing it, for a judge of style.

        Raises:
            AbliterateError: when it is judged by another judge.
        """
        if not self.is_style:
            raise AbliterateError(f"behaviour {self.source} has no style: its judge is {self.definition.judge.use}")
        return self.definition.judge.style

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of answers of a kind "answers".

        Raises:
            PromptError: when the file is missing, or a line isn't a pair.
        """
        answers = self.definition.answers
        if answers is None:
            return ()
        if answers.file is None:
            found = tuple(Pair(pair.prompt, pair.target, pair.baseline) for pair in answers.pairs)
        else:
            found = tuple(_read_pairs(self.folder / answers.file))
        if len(found) < LEAST_PAIRS:
            raise PromptError(
                f"behaviour {self.source} has {len(found)} pairs of answers; at least {LEAST_PAIRS} are needed"
            )
        return found

    @property
    def runs_as_style(self) -> bool:
        """Whether a run of it is `styling.Styling`: its contrast isn't two prompt sets, or it is added."""
        return self.kind != "prompts" or self.adds

    def resolved(self, settings: RunSettings) -> tuple[RunSettings, list[str]]:
        """A run's settings with this behaviour's judge and defaults where nobody named others; and notes.

        Args:
            settings: as given; what a flag, the environment or a file named is in their `model_fields_set`.

        Raises:
            AbliterateError: when a method was named that can't find it.
        """
        defaults, notes = self.definition.defaults, []
        search, collect, measure = settings.search, settings.collect, settings.measure
        if "judge" not in measure.model_fields_set and self.judge_spec != measure.judge:
            measure = measure.model_copy(update={"judge": self.judge_spec})
        if collect.positions is None and defaults.positions is not None:
            collect = collect.model_copy(update={"positions": defaults.positions})
        if search.max_divergence is None and defaults.max_divergence is not None:
            search = search.model_copy(update={"max_divergence": defaults.max_divergence})
        named = "method" in search.model_fields_set
        only = ("fit" if self.adds else "sweep") if self.runs_as_style else None
        if only and named and search.method != only:
            raise AbliterateError(
                f"behaviour {self.name} can't be found by --method {search.method}: its style shows in whole answers "
                f"only; leave the option out, or take {only}"
            )
        method = only or defaults.method
        if method is not None and method != search.method and not named:
            why = "its style shows in whole answers only" if only else "as its file says"
            notes.append(f"behaviour {self.name}: method {method} instead of {search.method}: {why}")
            search = search.model_copy(update={"method": method})
        return settings.model_copy(update={"search": search, "collect": collect, "measure": measure}), notes

    def to_json(self) -> dict[str, Any]:
        """What results.json says of it."""
        said = self.definition.model_dump(mode="json", exclude_none=True, exclude={"answers", "prompts"})
        text = json.dumps([self.definition.model_dump(mode="json"), self.pairs], sort_keys=True)
        return {
            "name": self.name,
            "about": self.definition.about,
            "kind": self.kind,
            "sign": self.definition.sign,
            "read": "answer" if self.along_answers else "prompt",
            "one_set": self.one_set,
            "words": said["words"],
            "judge": self.judge_spec if self.definition.judge.use else f"style:{self.name}",
            **({"threshold": self.definition.judge.threshold} if self.is_style else {}),
            **({"system_prompts": self._systems()} if self.kind == "system-prompts" else {}),
            **({"pairs": len(self.pairs)} if self.kind == "answers" else {}),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }


def load_behaviour(name: str | os.PathLike[str]) -> Behaviour:
    """A behaviour by the name of a bundled one ("refusal", "persona", "slop") or from a TOML file.

    Raises:
        AbliterateError: when there is no such file, it isn't TOML, or a table or key in it is wrong; names it.

    Example:
        >>> load_behaviour("slop").kind
        'answers'
    """
    text = str(name)
    if text in BUNDLED:
        return _load(Path(str(resources.files("abliterate"))) / "data" / "behaviours" / f"{text}.toml", text)
    path = Path(text).expanduser()
    if path.suffix.lower() != ".toml" or not path.is_file():
        problem = "not found" if path.suffix.lower() == ".toml" else "is neither bundled nor a .toml file"
        raise AbliterateError(f"behaviour {text} {problem}; bundled: {', '.join(BUNDLED)}")
    return _load(path, text)


def _load(path: Path, source: str) -> Behaviour:
    where = f"behaviour file {source}"
    try:
        tables = toml.loads(path.read_text(encoding="utf-8"))
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AbliterateError(f"{where} is not valid TOML: {error}") from error
    except OSError as error:
        raise AbliterateError(f"{where} can't be read: {error.strerror}; check its permissions") from error
    try:
        definition = _File.model_validate(tables)
    except ValidationError as error:
        raise AbliterateError(f"{where}: {_first(error.errors()[0])}; {DOCUMENTED}") from error
    if definition.judge.use is None:
        try:
            _ = definition.judge.style
        except AbliterateError as error:
            raise AbliterateError(f"{where}, table [judge]: {error}") from error
    return Behaviour(definition, source, path.parent)


def _first(error: Any) -> str:
    """One of pydantic's errors as what and where."""
    path = [str(part) for part in error["loc"]]
    if error["type"] == "missing":
        return f"{_place(path[:-1])}needs a key `{path[-1]}`"
    if error["type"] == "extra_forbidden":
        return f"{_place(path[:-1])}knows no key `{path[-1]}`"
    message = error["msg"].removeprefix("Value error, ")
    if not path:
        return message
    return f"{_place(path[:-1])}`{path[-1]}` = {error['input']!r}: {message}"


def _place(path: Sequence[str]) -> str:
    return f"table [{'.'.join(path)}]: " if path else "it "


def _read_pairs(path: Path) -> list[Pair]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise PromptError(
            f"file of answer pairs {path} not found; its name in [answers] is relative to the TOML file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"file of answer pairs {path} can't be read as UTF-8 text: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = Pair(*(row[key] for key in Pair._fields))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PromptError(
                f"file of answer pairs {path}, line {number}: {error!r}; each line is an object with prompt, target "
                "and baseline"
            ) from error
        for key, value in zip(Pair._fields, pair, strict=True):
            if not isinstance(value, str) or not value.strip():
                raise PromptError(f"file of answer pairs {path}, line {number}: {key} is {value!r}; text is needed")
        pairs.append(pair)
    return pairs
