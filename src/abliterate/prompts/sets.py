"""Prompt sets: from any source to three disjoint splits a side.

A side (target or baseline) is three disjoint sets of prompts: directions are found on `train`, chosen
on `validation` and reported on `test`. `load_sides` gives both sides and holds them apart.

torch, transformers and datasets are imported only by the functions that need them.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, overload

from abliterate.common.errors import PromptError, counted, shorten
from abliterate.prompts.hub import HubUnreachableError
from abliterate.prompts.sources import BUNDLED, SHORT_NAMES, Origin, Role, locate
from abliterate.prompts.tables import listed
from abliterate.prompts.texts import MIN_PROMPTS, read_splits

DEFAULT_SOURCES: dict[Role, str] = {"target": "harmful_behaviors", "baseline": "harmless_alpaca"}
# Directions need the most prompts, the report the next most: its intervals are what people read.
TRAIN_SHARE, VALIDATION_SHARE, TEST_SHARE = 0.5, 0.2, 0.3
VALIDATION_SHARE_OF_TRAIN = 0.25
TEST_SHARE_OF_TRAIN = 0.3


@dataclass(frozen=True)
class PromptSet(Sequence[str]):
    """An ordered set of prompts and where it came from, such as `"data/x.csv (train)"`."""

    source: str
    texts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hex digest of the texts in order; the source's name doesn't enter into it."""
        return hashlib.sha256(json.dumps(self.texts, ensure_ascii=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.texts[index]


@dataclass(frozen=True)
class Splits:
    """One side's prompts: directions are found on `train`, chosen on `validation`, reported on `test`."""

    source: str
    train: PromptSet
    validation: PromptSet
    test: PromptSet

    def __iter__(self) -> Iterator[PromptSet]:
        return iter((self.train, self.validation, self.test))


@dataclass(frozen=True)
class Sides:
    """Target and baseline prompts, and `notes`: lines worth telling the user about how they were made."""

    target: Splits
    baseline: Splits
    notes: tuple[str, ...] = ()


# --- Public: loading -----------------------------------------------------------------------------


def load_prompts(
    source: str, *, role: Role = "target", column: str | None = None, split: str | None = None
) -> PromptSet:
    """Load a source, or one split of it, as one set without repeats.

    Args:
        source: `"bundled[:split]"`, `"bundled-varied"`, `"bundled-xstest"`, a local file, folder or pattern
            (`path[:column]`), `"-"` for standard input, or a Hub data set (`id[/subset][:split[:column]]`, or one of
            `SHORT_NAMES`).
        role: which bundled file to read, and which option errors name.
        column: the column with the prompts; guessed from `COLUMN_NAMES` if None.
        split: load this split only.

    Raises:
        PromptError: the source is missing, unreadable, empty or holds something other than prompts.

    Example:
        >>> len(load_prompts("bundled", split="test"))
        200
    """
    origin = locate(source, role, column, split)
    splits, _ = read_splits(origin)
    texts, _ = _without_repeats(text for part in splits.values() for text in part)
    return PromptSet(f"{source} ({split})" if split else source, texts)


def load_sides(
    target: str | Sequence[str] | None = None,
    baseline: str | Sequence[str] | None = None,
    *,
    target_column: str | None = None,
    baseline_column: str | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    limit_validation: int | None = None,
    limit_test: int | None = None,
) -> Sides:
    """Load both sides, cut into splits where the source has none, and check that nothing overlaps.

    A source that names its splits keeps them; what is missing is cut from its training split. The
    others are shuffled and cut 50/20/30. None stands for the article's data set on the Hub, or for the
    bundled prompts if the Hub can't be reached, and then `notes` says so.

    Args:
        target: source of the prompts that show the behaviour, as for `load_prompts`, or their texts.
        baseline: source of the prompts that don't, or their texts.
        target_column: the target's column with the prompts; guessed if None.
        baseline_column: the baseline's column with the prompts; guessed if None.
        seed: of every cut and of every sample taken to meet a limit.
        limit_train: keep at most this many prompts a side, sampled, in `train`.
        limit_validation: the same in `validation`.
        limit_test: the same in `test`.

    Raises:
        PromptError: a source can't be read, is too small, or shares a prompt with another split or side.

    Example:
        >>> sides = load_sides("bundled", "bundled")
        >>> len(sides.target.train), len(sides.target.validation), len(sides.target.test)
        (117, 60, 200)
    """
    limits = _checked({"train": limit_train, "validation": limit_validation, "test": limit_test})
    sources: dict[Role, str | Sequence[str] | None] = {"target": target, "baseline": baseline}
    columns: dict[Role, str | None] = {"target": target_column, "baseline": baseline_column}
    read, notes = _read_sides(sources, columns)
    unique: dict[Role, dict[str, tuple[str, ...]]] = {}
    for role, (origin, splits) in read.items():
        unique[role], repeat_notes = _disjoint(splits, origin)
        notes += repeat_notes
    _forbid_overlap(
        chain.from_iterable(unique["target"].values()),
        chain.from_iterable(unique["baseline"].values()),
        (read["target"][0].label, read["baseline"][0].label),
    )
    target_splits, baseline_splits = (
        _limited(_cut(unique[role], origin, seed), limits, origin, seed) for role, (origin, _) in read.items()
    )
    return Sides(target_splits, baseline_splits, tuple(notes))


def load_one_set(
    source: str | Sequence[str],
    *,
    column: str | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    limit_validation: int | None = None,
    limit_test: int | None = None,
) -> Sides:
    """One set of prompts as both sides, for a behaviour that any prompt can show; splits as for `load_sides`.

    Raises:
        PromptError: the source can't be read, is too small, or shares a prompt between splits.
    """
    limits = _checked({"train": limit_train, "validation": limit_validation, "test": limit_test})
    read, notes = _read_sides({"baseline": source}, {"baseline": column})
    origin, splits = read["baseline"]
    unique, repeat_notes = _disjoint(splits, origin)
    one = _limited(_cut(unique, origin, seed), limits, origin, seed)
    return Sides(one, one, tuple(notes + repeat_notes))


def _checked(limits: dict[str, int | None]) -> dict[str, int | None]:
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise PromptError(f"the limit of {limit} prompts for the {name} split leaves none; use 1 or more")
    return limits


def normalise(text: str) -> str:
    """The form in which two prompts count as the same: caseless, without punctuation, single spaces."""
    squeezed = " ".join(text.casefold().translate(_PUNCTUATION_TO_SPACE).split())
    return squeezed or text.strip()


# --- From tables to splits -----------------------------------------------------------------------


def _read_sides(
    sources: Mapping[Role, str | Sequence[str] | None], columns: Mapping[Role, str | None]
) -> tuple[dict[Role, tuple[Origin, dict[str, list[str]]]], list[str]]:
    """Read both sides; if a default can't be reached, every default is taken from the bundled prompts."""
    read: dict[Role, tuple[Origin, dict[str, list[str]]]] = {}
    notes: list[str] = []
    # Explicit sources first: their errors shouldn't wait for a download.
    for role in sorted(sources, key=lambda role: sources[role] is None):
        source = sources[role]
        if source is not None and not isinstance(source, str):
            read[role] = (Origin("given as texts", f"the list of {role} prompts", role), {"": list(source)})
            continue
        origin = locate(source or DEFAULT_SOURCES[role], role, columns[role], None)
        try:
            splits, read_notes = read_splits(origin)
        except HubUnreachableError:
            if source is not None:
                raise
            break
        read[role] = (origin, splits)
        notes += read_notes
    else:
        return {role: read[role] for role in sources}, notes
    defaults = [role for role, source in sources.items() if source is None]
    names = " and ".join(SHORT_NAMES[DEFAULT_SOURCES[role]] for role in defaults)
    notes = [f"the Hugging Face Hub can't be reached, so the bundled prompts stand in for {names}"]
    fallback = {role: BUNDLED if source is None else source for role, source in sources.items()}
    # A column named for the Hub's data set isn't the bundled file's.
    kept = {role: None if role in defaults else columns[role] for role in sources}
    bundled, read_notes = _read_sides(fallback, kept)
    return bundled, notes + read_notes


def _without_repeats(texts: Iterable[str]) -> tuple[tuple[str, ...], int]:
    """The texts without later ones that normalise to an earlier one, and how many that were."""
    texts = list(texts)
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(normalise(text), text)
    return tuple(first.values()), len(texts) - len(first)


def _disjoint(splits: Mapping[str, Sequence[str]], origin: Origin) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Splits without repeats inside or between them.

    A prompt in two splits of a local source is an error; in somebody else's data set on the Hub, which
    the user can't correct, it stays in the later split, so that what is reported was not trained on.
    """
    unique: dict[str, tuple[str, ...]] = {}
    repeats = moved = 0
    split_of: dict[str, str] = {}
    for name in sorted(splits, key=["test", "validation", "train", ""].index):
        kept, dropped = _without_repeats(splits[name])
        repeats += dropped
        shared = [text for text in kept if normalise(text) in split_of]
        if shared and origin.dataset is None:
            raise PromptError(
                f"{origin.label}: prompt '{shorten(shared[0])}' is in two splits, '{name}' and "
                f"'{split_of[normalise(shared[0])]}'; keep it in one"
            )
        moved += len(shared)
        unique[name] = tuple(text for text in kept if normalise(text) not in split_of)
        split_of |= {normalise(text): name for text in unique[name]}
    notes = []
    if repeats:
        notes.append(f"{origin.label}: dropped {counted(repeats, 'repeated prompt')}")
    if moved:
        notes.append(f"{origin.label}: dropped {counted(moved, 'prompt')} that a later split has too")
    return unique, notes


def _cut(splits: Mapping[str, tuple[str, ...]], origin: Origin, seed: int) -> dict[str, tuple[str, ...]]:
    """The three splits, with what the source lacks cut from what it has."""
    total = sum(map(len, splits.values()))
    if total < MIN_PROMPTS:
        raise PromptError(
            f"{origin.label} has {counted(total, 'different prompt')} and a side needs at least "
            f"{MIN_PROMPTS}; add some, or use 'bundled'"
        )
    if len(splits) == 1:
        (texts,) = splits.values()
        train, rest = _take(texts, TRAIN_SHARE, seed)
        validation, test = _take(rest, VALIDATION_SHARE / (VALIDATION_SHARE + TEST_SHARE), seed)
        return {"train": train, "validation": validation, "test": test}
    cut = dict(splits)
    if "train" not in cut:
        raise PromptError(
            f"{origin.label} has no split 'train'{listed(splits)}; add one, or name no splits to have them cut"
        )
    for name, share in (("validation", VALIDATION_SHARE_OF_TRAIN), ("test", TEST_SHARE_OF_TRAIN)):
        if name not in cut:
            cut[name], cut["train"] = _take(cut["train"], share, seed)
    for name, texts in cut.items():
        if not texts:
            raise PromptError(
                f"{origin.label} leaves the split '{name}' without a prompt; add some, or name no splits to "
                "have them cut"
            )
    return cut


def _take(texts: Sequence[str], share: float, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A random share of the texts, and the rest, each in the order it had."""
    chosen = set(random.Random(seed).sample(range(len(texts)), round(share * len(texts))))
    return (
        tuple(text for i, text in enumerate(texts) if i in chosen),
        tuple(text for i, text in enumerate(texts) if i not in chosen),
    )


def _limited(
    splits: Mapping[str, tuple[str, ...]], limits: Mapping[str, int | None], origin: Origin, seed: int
) -> Splits:
    """Prompt sets of at most the given sizes, sampled, because a file may be sorted by topic."""
    sets = {}
    for name, texts in splits.items():
        limit = limits[name]
        if limit is not None and limit < len(texts):
            texts, _ = _take(texts, limit / len(texts), seed)
        sets[name] = PromptSet(f"{origin.source} ({name})", texts)
    return Splits(origin.source, **sets)


def _forbid_overlap(target: Iterable[str], baseline: Iterable[str], labels: tuple[str, str]) -> None:
    """Raise if a prompt is on both sides: its activations would cancel out of the direction."""
    targets = {normalise(text) for text in target}
    for text in baseline:
        if normalise(text) in targets:
            raise PromptError(
                f"prompt '{shorten(text)}' is on both sides: in {labels[0]} (target) and in {labels[1]} "
                "(baseline); keep it on one"
            )


# --- Helpers -------------------------------------------------------------------------------------


class _PunctuationToSpace(dict[int, Any]):
    """Maps punctuation to a space for `str.translate`, looking each character up once."""

    def __missing__(self, code: int) -> int | str:
        mapped = " " if unicodedata.category(chr(code)).startswith("P") else code
        self[code] = mapped
        return mapped


_PUNCTUATION_TO_SPACE = _PunctuationToSpace()
