"""Reading prompts from local files and streams into tables: one for each split that they name.

pyarrow, datasets and yaml are imported only by the functions that need them.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.common.errors import PromptError, shorten

SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
STDIN = "-"
# Usual names of the column with the prompts, the likeliest first: `text` is often all of a row, answer and all.
COLUMN_NAMES = (
    *("instruction", "prompt", "messages", "conversations", "text", "question", "goal", "query"),
    *("input", "request", "behavior", "content"),
)
# How packed bytes begin, by what packed files are called: downloads keep that name where they were unpacked on the way.
_UNPACKED: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    ".gz": (rb"\x1f\x8b\x08", gzip.decompress),
    ".bz2": (rb"BZh[1-9]1AY&SY", bz2.decompress),
    ".xz": (rb"\xfd7zXZ\x00", lzma.decompress),
}
_SPLIT_OF_FILE = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and for each row the words with which an error points at it.

    A plain list of prompts is one column without a name, `""`.
    """

    columns: Mapping[str, Sequence[object]]
    places: Sequence[str]


Tables = dict[str, Table]


def read_path(path: Path, label: str, column: str | None = None) -> Tables:
    """Tables of a file, a folder, a pattern of files, a pipe or standard input, by the names of their splits.

    Args:
        path: `-` is standard input; a name with `*` or `?` that is no file's stands for those that it matches.
        label: what errors call it.
        column: the column wanted, where a form is only told by it: a stream of CSV, a JSON object of columns.

    Raises:
        PromptError: it can't be read, or is not what it is named.
    """
    if path.is_dir():
        return _read_folder(path, label)
    if str(path) == STDIN or (path.exists() and not path.is_file()):
        return _read_stream(path, label, column)
    if not path.exists():
        return _read_several([Path(name) for name in sorted(glob.glob(str(path)))], label)
    kind = kind_of(path)
    if kind is None:
        raise PromptError(f"{label} is of no known kind; name it {', '.join(KINDS)} according to what it holds")
    return divided(KINDS[kind](_bytes(path, label), label))


def kind_of(path: Path) -> str | None:
    """The suffix by which a file is read, that of its packing left out; None where there is none such."""
    name = path.name.lower()
    name = name.removesuffix(next((packed for packed in _UNPACKED if name.endswith(packed)), ""))
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def divided(tables: Tables) -> Tables:
    """A table whose column `split` has names of splits in it as one table for each; others as they are."""
    table = tables.get("", Table({}, ()))
    values = table.columns.get("split", ())
    if not any(isinstance(value, str) and value.casefold() in SPLIT_NAMES for value in values):
        return tables
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


def tables_of_datasets(loaded: Any) -> Tables:
    """Tables by split of a `DatasetDict`; under `""` for a single `Dataset`. Columns are read only when used."""
    if isinstance(loaded, Mapping):
        return {str(name): tables_of_datasets(dataset)[""] for name, dataset in loaded.items()}
    loaded = loaded.flatten()
    columns = {name: loaded[name] for name in loaded.column_names}
    return {"": Table(columns, [f"row {n}" for n in range(1, len(loaded) + 1)])}


def listed(names: Iterable[str]) -> str:
    names = list(names)
    return f" (it has: {', '.join(map(repr, names))})" if names else ""


# --- Bytes and text ------------------------------------------------------------------------------


def _bytes(path: Path, label: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"{label} can't be read: {error.strerror or error}; check its permissions") from error
    return _unpacked(data, label)


def _unpacked(data: bytes, label: str) -> bytes:
    unpack = next((unpack for begins, unpack in _UNPACKED.values() if re.match(begins, data)), None)
    try:
        return unpack(data) if unpack else data
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise PromptError(f"{label} can't be unpacked: {error}; get it again") from error


def _text(data: bytes, label: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")  # as Excel writes "Unicode text"
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"{label} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}, line {line}; "
            "save it as UTF-8"
        ) from error


# --- Forms ---------------------------------------------------------------------------------------


def _read_txt(data: bytes, label: str) -> Tables:
    lines = [(f"line {n}", line.strip()) for n, line in enumerate(_text(data, label).split("\n"), 1)]
    kept = [(place, line) for place, line in lines if line]
    return {"": Table({"": [line for _, line in kept]}, [place for place, _ in kept])}


def _read_md(data: bytes, label: str) -> Tables:
    """A line a prompt, as in a text file; marks of lists are not a part of it, and headings are none."""
    table = _read_txt(data, label)[""]
    rows = [(line, place) for line, place in zip(table.columns[""], table.places, strict=True)]
    kept = [(re.sub(r"^(?:[-*+]|\d+[.)])\s+", "", str(line)), place) for line, place in rows if str(line)[0] != "#"]
    return {"": Table({"": [line for line, _ in kept]}, [place for _, place in kept])}


def _read_json(data: bytes, label: str) -> Tables:
    text = _text(data, label)
    if not text.strip():
        return {"": Table({"": []}, [])}
    try:
        return _tables_of(json.loads(text), label)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\n" in text.strip():
            return _read_jsonl(data, label)  # lines of JSON, whatever it is called
        raise PromptError(
            f"{label} is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}; correct it"
        ) from error


def _read_jsonl(data: bytes, label: str) -> Tables:
    items, places = [], []
    text = _text(data, label)
    # Not splitlines(): a prompt may hold U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError as error:
            if not items and text.lstrip()[0] == "[":
                return _read_json(data, label)  # one list over several lines, whatever it is called
            raise PromptError(
                f"{label}, line {number}: not valid JSON at column {error.colno}: {error.msg}; "
                "each line must be one string or one object"
            ) from error
        places.append(f"line {number}")
    if len(items) == 1 and isinstance(items[0], list):
        return _tables_of(items[0], label)
    return {"": _table_of_items(items, places, label)}


def _read_yaml(data: bytes, label: str) -> Tables:
    import yaml

    try:
        return _tables_of(yaml.safe_load(_text(data, label)) or [], label)
    except yaml.YAMLError as error:
        raise PromptError(f"{label} is not valid YAML: {shorten(str(error), 160)}; correct it") from error


def _read_csv(data: bytes, label: str, delimiter: str | None = None) -> Tables:
    text = _text(data, label)
    head = re.sub(r'"[^"]*"', "", text.lstrip().partition("\n")[0])
    delimiter = delimiter or next((mark for mark in ",;\t|" if mark in head), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    items, places = [], []
    try:
        names = list(reader.fieldnames or ())
        for row in reader:
            items.append(row)
            places.append(f"line {reader.line_num}")
            if any(row.get(None) or ()):  # type: ignore[call-overload]
                raise PromptError(
                    f"{label}, {places[-1]}: more fields than the {len(names)} of the first line; put prompts that "
                    f"hold '{delimiter}' in quotes"
                )
    except csv.Error as error:
        # line_num is where the last good row ended; an open quote may reach to the file's end.
        line = reader.line_num + 1
        raise PromptError(f"{label}, line {line}: not valid CSV: {error}; correct it") from error
    return {"": Table({name: [row[name] for row in items] for name in names}, places)}


def _read_tsv(data: bytes, label: str) -> Tables:
    return _read_csv(data, label, "\t")


def _read_parquet(data: bytes, label: str) -> Tables:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
        while any(pyarrow.types.is_struct(field.type) for field in table.schema):
            table = table.flatten()
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"{label} is not a readable Parquet file: {error}; write it again") from error
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return {"": Table(columns, [f"row {n}" for n in range(1, table.num_rows + 1)])}


KINDS: dict[str, Callable[[bytes, str], Tables]] = {
    ".txt": _read_txt,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".ndjson": _read_jsonl,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".md": _read_md,
}
_DATA = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".ndjson", ".txt")  # of a folder's files: those of one kind


def _read_stream(path: Path, label: str, column: str | None) -> Tables:
    """What comes through a pipe: JSON, lines of JSON, a table where its head or a column is named, or lines of text."""
    data = _unpacked(sys.stdin.buffer.read(), label) if str(path) == STDIN else _bytes(path, label)
    if data[:4] == b"PAR1":
        return divided(_read_parquet(data, label))
    text = _text(data, label).lstrip()
    if text[:1] in ("[", "{"):
        return divided(_read_json(data, label))
    head = re.split(r"[,;\t|]", text.partition("\n")[0].casefold())
    has_head = column or any(name.strip('" \r') in COLUMN_NAMES for name in head)
    return divided(_read_csv(data, label) if has_head else _read_txt(data, label))


def _read_folder(path: Path, label: str) -> Tables:
    """A folder of datasets' `save_to_disk`, or one of files of one kind, such as a data set downloaded from the Hub."""
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        files = [f for f in sorted(path.rglob("*")) if not any(p.startswith(".") for p in f.relative_to(path).parts)]
        kinds = {f: kind_of(f) for f in files if f.is_file() and f.stem not in ("dataset_infos", "LICENSE", "config")}
        kind = next((kind for kind in _DATA if kind in kinds.values()), None)
        if kind is None:
            raise PromptError(
                f"{label} holds no files of prompts ({', '.join(_DATA)}) and was not written by datasets' "
                "save_to_disk; name a file"
            )
        return _read_several([f for f, found in kinds.items() if found == kind], label, path)
    import datasets

    try:
        return tables_of_datasets(datasets.load_from_disk(str(path)))
    except (OSError, ValueError, KeyError) as error:
        raise PromptError(f"{label} can't be read: {error}; save it again with save_to_disk") from error


def _read_several(files: Sequence[Path], label: str, folder: Path | None = None) -> Tables:
    """The tables of several files one after the other; a file whose name begins with a split's is of that split."""
    parts: dict[str, list[Table]] = {}
    for file in files:
        named = _SPLIT_OF_FILE.match(file.name)
        for split, table in read_path(file, f"{label}, {file.name}").items():
            called = file.relative_to(folder) if folder else file.name
            places = [f"{called}, {place}" for place in table.places]
            parts.setdefault(split or (named[1].lower() if named else ""), []).append(Table(table.columns, places))
    if len(parts) > 1 and "" in parts:  # some names say nothing: then none does
        parts = {"": [table for tables in parts.values() for table in tables]}
    joined: Tables = {}
    for split, tables in parts.items():
        names = dict.fromkeys(name for table in tables for name in table.columns)
        columns = {
            name: [value for t in tables for value in t.columns.get(name, [None] * len(t.places))] for name in names
        }
        joined[split] = Table(columns, [place for table in tables for place in table.places])
    return joined


# --- JSON ----------------------------------------------------------------------------------------


def _tables_of(content: object, label: str) -> Tables:
    """A list of prompts or of objects; an object with one such list, one a split, or one a column, as pandas writes."""
    if isinstance(content, Mapping):
        content = _pandas_rows(content)
    if isinstance(content, Mapping):
        lists = {str(key): value for key, value in content.items() if isinstance(value, list)}
        if lists and all(key.casefold() in SPLIT_NAMES for key in lists):
            return {key: _table_of_list(value, label, f"'{key}' ") for key, value in lists.items()}
        sizes = {len(value) for value in lists.values()}
        if len(lists) > 1 and len(sizes) == 1 and len(lists) == len(content):
            return {"": Table(lists, [f"item {n}" for n in range(1, sizes.pop() + 1)])}
        if len(lists) != 1:
            raise PromptError(
                f"{label} is an object with {len(lists)} lists{listed(lists)} of different lengths, or with other "
                "things beside them; give one list of prompts, or columns alone"
                if lists
                else f"{label} is an object with 0 lists; one list of prompts is needed"
            )
        (content,) = lists.values()
    if not isinstance(content, list):
        raise PromptError(f"{label} holds one {type(content).__name__}; a list of strings or of objects is needed")
    return {"": _table_of_list(content, label)}


def _pandas_rows(content: Mapping[Any, Any]) -> object:
    """The rows of an object as pandas' to_json writes tables (orient columns, index or split); others as they are."""
    if isinstance(content.get("columns"), list) and isinstance(content.get("data"), list):
        return [dict(zip(content["columns"], row, strict=False)) for row in content["data"]]
    inner = list(content.values())
    if not inner or not all(isinstance(part, Mapping) and part.keys() == inner[0].keys() for part in inner):
        return content
    outer, within = ({str(key).casefold() for key in keys} for keys in (content, inner[0]))
    numbered = all(map(str.isdigit, outer)) and not all(map(str.isdigit, within))
    if numbered or (within & {*COLUMN_NAMES} and not outer & {*COLUMN_NAMES}):
        return inner  # a row each
    return [{name: column[row] for name, column in content.items()} for row in inner[0]]


def _table_of_list(items: Sequence[object], label: str, of: str = "") -> Table:
    return _table_of_items(items, [f"{of}item {n}" for n in range(1, len(items) + 1)], label)


def _table_of_items(items: Sequence[object], places: Sequence[str], label: str) -> Table:
    """A table of strings or of objects; a key that an object lacks is None in its column, objects in them are
    columns of their own, `outer.inner`."""
    if not any(isinstance(item, Mapping) for item in items):
        return Table({"": items}, places)
    rows: list[dict[str, object]] = []
    for item, place in zip(items, places, strict=True):
        if not isinstance(item, Mapping):
            raise PromptError(
                f"{label}, {place}: {shorten(repr(item))} stands among objects; make every prompt a string "
                "or every one an object"
            )
        rows.append(_flat(item))
    names = dict.fromkeys(name for row in rows for name in row)
    return Table({name: [row.get(name) for row in rows] for name in names}, places)


def _flat(item: Mapping[Any, Any], before: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in item.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return found
