"""The forms in which prompts lie on a disk or come through a pipe."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import threading
from pathlib import Path

import datasets
import pandas
import pytest

from abliterate.common.errors import PromptError
from abliterate.prompts.sets import load_prompts, load_sides
from abliterate.prompts.sources import locate, read_tables

TEXTS = tuple(f"Tell me, please, about the {n}. «rivière» 河." for n in range(12))
ROWS = [{"text": text, "label": 1} for text in TEXTS]


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows)


def frame():
    return pandas.DataFrame(ROWS)


FORMS = {
    "columns.json": json.dumps({"goal": TEXTS, "target": ["x"] * 12}),
    "pandas.json": frame().to_json(),
    "index.json": frame().to_json(orient="index"),
    "ids.json": json.dumps({f"id{n}": row for n, row in enumerate(ROWS)}),
    "columns_of_ids.json": json.dumps({key: {f"id{n}": r[key] for n, r in enumerate(ROWS)} for key in ROWS[0]}),
    "split.json": frame().to_json(orient="split"),
    "table.json": json.dumps({"schema": {"fields": []}, "data": ROWS}),
    "lines.json": lines(ROWS),
    "list.jsonl": json.dumps(ROWS, indent=1),
    "list_in_one_line.jsonl": json.dumps(ROWS),
    "plain.ndjson": lines(TEXTS),
    "crlf.jsonl": "\ufeff" + lines(ROWS).replace("\n", "\r\n") + "\r\n\r\n",
    "nested.jsonl": lines({"data": {"id": 3, "prompt": text}} for text in TEXTS),
    "tab.tsv": frame().to_csv(sep="\t", index=False),
    "semicolon.csv": frame().to_csv(sep=";", index=False),
    "bom.csv": "\ufeff" + frame().to_csv(index=False).replace("\n", "\r\n"),
    "gaps.csv": frame().to_csv(index=False).replace("\n", "\n\n"),
    "list.yaml": "\n".join(f'- "{text}"' for text in TEXTS),
    "notes.md": "# Prompts\n\n" + "\n".join(f"- {text}" for text in TEXTS),
    "numbered.MD": "\n".join(f"{n}. {text}" for n, text in enumerate(TEXTS)),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_read_as_what_it_holds(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name].encode())
    assert load_prompts(str(tmp_path / name)).texts == TEXTS


def test_a_column_of_pandas_json_is_named(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(pandas.DataFrame({"a": TEXTS, "b": ["x"] * 12}).to_json())
    assert load_prompts(f"{path}:a").texts == TEXTS


def test_unicode_text_of_a_spreadsheet(tmp_path):
    (tmp_path / "p.tsv").write_bytes(frame().to_csv(sep="\t", index=False).encode("utf-16"))
    assert load_prompts(str(tmp_path / "p.tsv")).texts == TEXTS


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_packed_files(monkeypatch, tmp_path, ending, pack):
    path = tmp_path / f"p.jsonl.{ending}"
    path.write_bytes(pack(lines(ROWS).encode()))
    assert load_prompts(str(path)).texts == TEXTS
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert load_prompts("-").texts == TEXTS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PromptError, match="can't be unpacked"):
        load_prompts(str(path))
    path.write_text(lines(ROWS))  # unpacked on the way here
    assert load_prompts(str(path)).texts == TEXTS


def test_json_with_a_list_a_split_keeps_them(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"train": ROWS[:8], "test": list(TEXTS[8:])}))
    assert load_prompts(str(path), split="test").texts == TEXTS[8:]
    assert load_prompts(str(path), split="train").texts == TEXTS[:8]


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))


def test_a_folder_and_a_pattern_of_parquet_files(tmp_path):
    (tmp_path / "README.md").write_text("# A data set\n")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.parquet").write_text("not one")
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:5])
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[5:9])
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[9:])
    assert set(read_tables(locate(str(tmp_path), "target", None, None))) == {"train", "test"}
    assert load_prompts(str(tmp_path), split="train").texts == TEXTS[:9]
    assert load_prompts(f"{tmp_path}/data/train-*.parquet:text").texts == TEXTS[:9]
    assert set(load_prompts(str(tmp_path)).texts) == set(TEXTS)


def test_struct_columns_of_parquet_are_found(tmp_path):
    parquet(tmp_path / "p.parquet", [{"row": {"info": {"prompt": text}, "n": 1}} for text in TEXTS])
    assert load_prompts(str(tmp_path / "p.parquet")).texts == TEXTS


def test_a_folder_without_prompts_says_what_is_read(tmp_path):
    (tmp_path / "x.docx").write_text("x")
    with pytest.raises(PromptError, match=r"no files of prompts \(.parquet.*save_to_disk"):
        load_prompts(str(tmp_path))


@pytest.mark.parametrize(
    ("data", "source"),
    [
        ("\n".join(TEXTS), "-"),
        (lines(ROWS), "-"),
        (json.dumps(ROWS, indent=1), "-"),
        (FORMS["semicolon.csv"], "-:text"),
        (FORMS["bom.csv"], "-"),
        (FORMS["tab.tsv"], "-"),
    ],
)
def test_standard_input(monkeypatch, data, source):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    assert load_prompts(source).texts == TEXTS


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_read_and_named_without_its_number(tmp_path):
    os.mkfifo(tmp_path / "63")
    writer = threading.Thread(target=lambda: Path(tmp_path / "63").write_text("\n".join(TEXTS)))
    writer.start()
    sides = load_sides(str(tmp_path / "63"), "bundled")
    writer.join()
    assert {text for part in sides.target for text in part} == set(TEXTS)
    assert sides.target.source == "pipe"


def test_a_comma_outside_quotes_does_not_cut_a_prompt(tmp_path):
    (tmp_path / "p.csv").write_text("text\nfine\nTell me, please\n")
    with pytest.raises(PromptError, match=r"line 3: more fields than the 1 .* in quotes"):
        load_prompts(str(tmp_path / "p.csv"))
    (tmp_path / "p.csv").write_text("text,label\nfine,1,,\n")
    assert load_prompts(str(tmp_path / "p.csv")).texts == ("fine",)
