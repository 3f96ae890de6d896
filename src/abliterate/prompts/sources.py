"""Where prompts come from: bundled, local or on the Hub; a source taken apart, and read into tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from abliterate.common.errors import PromptError
from abliterate.common.names import hub_name, is_address, pasted
from abliterate.prompts.hub import HOW_TO_NAME, read_hub
from abliterate.prompts.tables import STDIN, Tables, kind_of, read_path

Role = Literal["target", "baseline"]

BUNDLED = "bundled"
VARIED, SAFE = "bundled-varied", "bundled-xstest"  # a second target set; requests that only look unsafe
_BUNDLED_FILES = {VARIED: "varied.jsonl", SAFE: "xstest.jsonl"}
SHORT_NAMES = {
    "harmful_behaviors": "mlabonne/harmful_behaviors",
    "harmless_alpaca": "mlabonne/harmless_alpaca",
}


@dataclass(frozen=True)
class Origin:
    """A source, taken apart: exactly one of `path` and `dataset` is set; `subset` and `revision` are the data set's."""

    source: str
    label: str
    role: Role
    path: Path | None = None
    dataset: str | None = None
    split: str | None = None
    column: str | None = None
    subset: str | None = None
    revision: str | None = None

    @property
    def option(self) -> str:
        return f"--{self.role}-column"


def locate(source: str, role: Role, column: str | None, split: str | None) -> Origin:
    """Tell bundled, local and Hub sources apart and split off `:split` and `:column`."""
    source = pasted(source)
    if not source:
        raise PromptError(f"the {role} source is empty; give a file, a Hub data set or 'bundled'")
    name, _, of = source.partition(":")
    if name in (BUNDLED, *_BUNDLED_FILES):
        bundled = Path(str(resources.files("abliterate"))) / "data" / _BUNDLED_FILES.get(name, f"{role}.jsonl")
        label = f"bundled {role} prompts" if name == BUNDLED else f"prompt set {name}"
        return Origin(source, label, role, path=bundled, split=split or of or None, column=column)
    if name == STDIN:
        return Origin("stdin", "standard input", role, Path(STDIN), None, split, column or of or None)
    head, _, tail = source.rpartition(":")
    for place, named in ((source, None), (head, tail or None)):
        path = Path(place).expanduser()
        if place and (path.exists() or _matches(path)):
            streamed = path.exists() and not (path.is_file() or path.is_dir())
            kind = "pipe" if streamed else "folder" if path.is_dir() else "file"
            called = "pipe" if streamed else source
            return Origin(called, f"prompt {kind} {place}", role, path, None, split, column or named)
    return _on_the_hub(source, role, column, split)


def _on_the_hub(source: str, role: Role, column: str | None, split: str | None) -> Origin:
    # Colons of an address and inside brackets are no separators: "https://hf.co/x", "id:train[:100]:text".
    name, *rest = re.split(r":(?!//)(?![^\[]*\])", source)
    if "://" in name and not is_address(name):
        raise PromptError(f"{role} source '{source}' is an address outside the Hub; download it, and give the file")
    if _looks_like_path(name):
        raise PromptError(
            f"prompt file {name} was not found (looked for {Path(name).expanduser().absolute()}); "
            f"check the path, or give a Hub data set as {HOW_TO_NAME}, or 'bundled'"
        )
    found = hub_name(SHORT_NAMES.get(name, name), "datasets")
    viewed = found.rest[:1] == ("viewer",)  # as the address of a table on the Hub goes on: viewer/subset/split
    parts = found.rest[1:] if viewed else found.rest
    if len(rest) == 3 and not parts:
        parts, rest = (rest[0],), rest[1:]
    if len(parts) > 1 + viewed or len(rest) > 2 or not found.id:
        raise PromptError(f"{role} source '{source}' can't be read as a Hub data set; write it as {HOW_TO_NAME}")
    subset, split = next(iter(parts), None), split or next(iter(parts[1:]), None)
    named_split, named_column = (*rest, "", "")[:2]
    return Origin(
        source,
        f"Hub data set {'/'.join(filter(None, (found.id, subset)))}",
        role,
        dataset=found.id,
        split=split or named_split or None,
        column=column or named_column or None,
        subset=subset,
        revision=found.revision,
    )


def _matches(path: Path) -> bool:
    """Whether a name that is no file's is a pattern that some files match."""
    return any(mark in path.name for mark in "*?") and any(path.parent.glob(path.name))


def _looks_like_path(text: str) -> bool:
    if is_address(text):
        return False
    first = text.split("/")[0]
    return (
        text.startswith((".", "~", "/"))
        or "\\" in text
        or text.count("/") > 2
        or (text.count("/") == 2 and first != "datasets" and Path(first).is_dir())
        or kind_of(Path(text)) is not None
    )


def read_tables(origin: Origin) -> Tables:
    """Tables by the source's own names of splits; `""` where it names none."""
    if origin.dataset is not None:
        return read_hub(origin.dataset, origin.split, origin.subset, origin.revision)
    assert origin.path is not None
    return read_path(origin.path, origin.label, origin.column)
