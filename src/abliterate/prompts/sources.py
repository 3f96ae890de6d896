"""Reading a source of prompts, bundled, local or on the Hub, into tables: one for each split it names.

pyarrow, datasets and huggingface_hub are imported only by the functions that need them.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from abliterate.common.errors import PromptError, shorten

Role = Literal["target", "baseline"]

BUNDLED = "bundled"
VARIED, SAFE = "bundled-varied", "bundled-xstest"  # a second target set; requests that only look unsafe
_BUNDLED_FILES = {VARIED: "varied.jsonl", SAFE: "xstest.jsonl"}
SHORT_NAMES = {
    "harmful_behaviors": "mlabonne/harmful_behaviors",
    "harmless_alpaca": "mlabonne/harmless_alpaca",
}
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
HUB_TIMEOUT_SECONDS = 4.0


class HubUnreachableError(PromptError):
    """The Hub didn't answer and the data set isn't in the local cache."""


# --- Where a source is ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """A source, taken apart: exactly one of `path` and `dataset` is set."""

    source: str
    label: str
    role: Role
    path: Path | None = None
    dataset: str | None = None
    split: str | None = None
    column: str | None = None

    @property
    def option(self) -> str:
        return f"--{self.role}-column"


def locate(source: str, role: Role, column: str | None, split: str | None) -> Origin:
    """Tell bundled, local and Hub sources apart and split off `:split` and `:column`."""
    if not source.strip():
        raise PromptError(f"the {role} source is empty; give a file, a Hub data set or 'bundled'")
    name, _, of = source.partition(":")
    if name in (BUNDLED, *_BUNDLED_FILES):
        bundled = Path(str(resources.files("abliterate"))) / "data" / _BUNDLED_FILES.get(name, f"{role}.jsonl")
        label = f"bundled {role} prompts" if name == BUNDLED else f"prompt set {name}"
        return Origin(source, label, role, path=bundled, split=split or of or None, column=column)
    head, colon, tail = source.rpartition(":")
    for place, named in ((source, None), (head, tail or None)):
        path = Path(place).expanduser()
        if place and path.exists():
            kind = "folder" if path.is_dir() else "file"
            return Origin(source, f"prompt {kind} {place}", role, path, None, split, column or named)
    path_like = head if colon and _looks_like_path(head) else source
    if _looks_like_path(path_like):
        raise PromptError(
            f"prompt file {path_like} was not found (looked for {Path(path_like).expanduser().absolute()}); "
            "check the path, or give a Hub data set as id[:split[:column]], or 'bundled'"
        )
    # Colons inside brackets belong to a slice: "id:train[:100]:text".
    name, *rest = re.split(r":(?![^\[]*\])", source)
    if len(rest) > 2 or not name:
        raise PromptError(f"{role} source '{source}' can't be read as a Hub data set; write it as id[:split[:column]]")
    named_split, named_column = (*rest, "", "")[:2]
    dataset = SHORT_NAMES.get(name, name)
    return Origin(
        source,
        f"Hub data set {dataset}",
        role,
        dataset=dataset,
        split=split or named_split or None,
        column=column or named_column or None,
    )


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "~", "/")) or "\\" in text or text.count("/") > 1 or Path(text).suffix.lower() in _READERS
    )


# --- Reading tables ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and for each row the words with which an error points at it.

    A plain list of prompts is one column without a name, `""`.
    """

    columns: Mapping[str, Sequence[object]]
    places: Sequence[str]


def _read_text(path: Path, label: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"{label} can't be read: {error.strerror or error}; check its permissions") from error
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"{label} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}, line {line}; "
            "save it as UTF-8"
        ) from error


def _table_of_items(items: Sequence[object], places: Sequence[str], label: str) -> Table:
    """A table of strings or of objects; a key that an object lacks is None in its column."""
    if not any(isinstance(item, Mapping) for item in items):
        return Table({"": items}, places)
    names: dict[str, None] = {}
    for item, place in zip(items, places, strict=True):
        if not isinstance(item, Mapping):
            raise PromptError(
                f"{label}, {place}: {shorten(repr(item))} stands among objects; make every prompt a string "
                "or every one an object"
            )
        names.update(dict.fromkeys(map(str, item)))
    return Table({name: [item.get(name) for item in items] for name in names}, places)  # type: ignore[attr-defined]


def _read_txt(path: Path, label: str) -> Table:
    lines = [(f"line {n}", line.strip()) for n, line in enumerate(_read_text(path, label).split("\n"), 1)]
    kept = [(place, line) for place, line in lines if line]
    return Table({"": [line for _, line in kept]}, [place for place, _ in kept])


def _read_json(path: Path, label: str) -> Table:
    text = _read_text(path, label)
    if not text.strip():
        return Table({"": []}, [])
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"{label} is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}; correct it"
        ) from error
    if isinstance(content, Mapping):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if len(lists) != 1:
            raise PromptError(
                f"{label} is an object with {len(lists)} lists{listed(lists)}; one list of prompts is needed"
            )
        (content,) = lists.values()
    if not isinstance(content, list):
        raise PromptError(f"{label} holds one {type(content).__name__}; a list of strings or of objects is needed")
    return _table_of_items(content, [f"item {n}" for n in range(1, len(content) + 1)], label)


def _read_jsonl(path: Path, label: str) -> Table:
    items, places = [], []
    # Not splitlines(): a prompt may hold U+2028, which JSON allows inside a string.
    for number, line in enumerate(_read_text(path, label).split("\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise PromptError(
                f"{label}, line {number}: not valid JSON at column {error.colno}: {error.msg}; "
                "each line must be one string or one object"
            ) from error
        places.append(f"line {number}")
    return _table_of_items(items, places, label)


def _read_csv(path: Path, label: str) -> Table:
    reader = csv.DictReader(io.StringIO(_read_text(path, label), newline=""), strict=True)
    items, places = [], []
    try:
        names = list(reader.fieldnames or ())
        for row in reader:
            items.append(row)
            places.append(f"line {reader.line_num}")
    except csv.Error as error:
        # line_num is where the last good row ended; an open quote may reach to the file's end.
        line = reader.line_num + 1
        raise PromptError(f"{label}, line {line}: not valid CSV: {error}; correct it") from error
    return Table({name: [row[name] for row in items] for name in names}, places)


def _read_parquet(path: Path, label: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"{label} is not a readable Parquet file: {error}; write it again") from error
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return Table(columns, [f"row {n}" for n in range(1, table.num_rows + 1)])


_READERS: dict[str, Callable[[Path, str], Table]] = {
    ".txt": _read_txt,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _table_of_dataset(dataset: Any) -> Table:
    """The table of a `datasets.Dataset`; its columns are read only when they are used."""
    columns = {name: dataset[name] for name in dataset.column_names}
    return Table(columns, [f"row {n}" for n in range(1, len(dataset) + 1)])


def _tables_of_datasets(loaded: Any) -> dict[str, Table]:
    """Tables by split of a `DatasetDict`; under `""` for a single `Dataset`."""
    if isinstance(loaded, Mapping):
        return {str(name): _table_of_dataset(dataset) for name, dataset in loaded.items()}
    return {"": _table_of_dataset(loaded)}


def _read_folder(path: Path, label: str) -> dict[str, Table]:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise PromptError(
            f"{label} was not written by datasets' save_to_disk (no dataset_dict.json or state.json in it); "
            "give one file of it"
        )
    import datasets

    try:
        return _tables_of_datasets(datasets.load_from_disk(str(path)))
    except (OSError, ValueError, KeyError) as error:
        raise PromptError(f"{label} can't be read: {error}; save it again with save_to_disk") from error


def read_tables(origin: Origin) -> dict[str, Table]:
    """Tables by the source's own names of splits; `""` where it names none."""
    if origin.dataset is not None:
        return _read_hub(origin.dataset, origin.split)
    assert origin.path is not None
    if origin.path.is_dir():
        return _read_folder(origin.path, origin.label)
    reader = _READERS.get(origin.path.suffix.lower())
    if reader is None:
        raise PromptError(
            f"{origin.label} is of no known kind; name it {', '.join(_READERS)} according to what it holds"
        )
    return _divide_by_split_column(reader(origin.path, origin.label))


def _divide_by_split_column(table: Table) -> dict[str, Table]:
    """One table for each value of the column `split`, if that column has names of splits in it."""
    values = table.columns.get("split", ())
    if not any(isinstance(value, str) and value.casefold() in SPLIT_NAMES for value in values):
        return {"": table}
    rows: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        rows.setdefault(str(value), []).append(index)
    others = {name: column for name, column in table.columns.items() if name != "split"}
    return {
        name: Table(
            {key: [column[i] for i in chosen] for key, column in others.items()},
            [table.places[i] for i in chosen],
        )
        for name, chosen in rows.items()
    }


def listed(names: Iterable[str]) -> str:
    names = list(names)
    return f" (it has: {', '.join(map(repr, names))})" if names else ""


# --- The Hub -------------------------------------------------------------------------------------


def _read_hub(dataset: str, split: str | None) -> dict[str, Table]:
    """Download a data set, or take it from the cache if the Hub doesn't answer within seconds."""
    import datasets

    try:
        if hub_answers():
            loaded = datasets.load_dataset(dataset, split=split)
        else:
            with _offline():
                loaded = datasets.load_dataset(dataset, split=split)
    except Exception as error:
        if _is_connection_failure(error):
            raise HubUnreachableError(
                f"the Hugging Face Hub can't be reached and data set {dataset} is not in the local cache; "
                "check the network and HF_HUB_OFFLINE, or give a local file or 'bundled'"
            ) from error
        if not isinstance(error, (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)):
            raise
        raise PromptError(
            f"Hub data set {dataset}{f', split {split!r},' if split else ''} can't be loaded: "
            f"{shorten(str(error), 300)}; check its name (id[:split[:column]]), "
            "or download it and give the file"
        ) from error
    return _tables_of_datasets(loaded)


def hub_answers() -> bool:
    """Whether the Hub answers anything at all within HUB_TIMEOUT_SECONDS.

    huggingface_hub retries for half a minute before it gives up, and resolving a name has no timeout of
    its own, so one request is made in a thread that may be left behind.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"} or constants.HF_HUB_OFFLINE:
        return False
    answers: list[object] = []

    def ask() -> None:
        # Whatever fails here fails again, with its reason, when the data set is asked for.
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS))
        except Exception:
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS)
    return bool(answers)


@contextmanager
def _offline() -> Iterator[None]:
    """Hold datasets and huggingface_hub in offline mode, in which they read the cache and don't wait."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _is_connection_failure(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is a connection, a timeout or the Hub's own failure."""
    while error is not None:
        # By name: huggingface_hub has used requests, httpx and httpx2, each with classes of its own.
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"ConnectionError", "Timeout", "TimeoutError", "TransportError"}:
            return True
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status == 429 or status >= 500:
            return True
        error = error.__cause__ or error.__context__
    return False
