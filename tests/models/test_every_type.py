"""Every type that transformers maps to a model of text: proved, live only, or stopped with a reason; never a traceback.

What comes out becomes docs/architectures.md when all of them ran.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import architecture_table
from abliterate.apply.proof import check_proof, prove
from abliterate.apply.weights import bake
from abliterate.common.errors import AbliterateError, WriterError
from abliterate.edit.edit import Edit
from abliterate.models.loading import load
from abliterate.models.writers import find_writers
from architecture_table import LIVE, NOT_TRIED, PROVED, STOPS, Row
from every_type import TYPES, auto_class_of, small_config
from long import LONG
from models import built, handle_of, save_tiny, tiny_tokenizer

MOST_PARAMETERS = 30e6
ENOUGH = 230  # proved or live


@pytest.fixture(scope="module")
def rows():
    measured: list[Row] = []
    yield measured
    if {row.name for row in measured} == set(TYPES):
        architecture_table.write(measured)


def small_model(model_type):
    """A random model of a type; None where its config or its class doesn't take what was guessed."""
    try:
        config, auto_class = small_config(model_type), auto_class_of(model_type)
        with torch.device("meta"):
            size = sum(p.numel() for p in auto_class.from_config(config).parameters())
        return built(config, auto_class=auto_class) if size < MOST_PARAMETERS else None
    except Exception:
        return None


def reason(error: Exception, folder: Path) -> str:
    """What an error says, without the model's name and what follows alike from each."""
    text = str(error).replace(str(folder), "MODEL").partition("; nothing was changed")[0]
    text = re.sub(r"^model MODEL:? |can't tell what writes to the residual stream at [^:]*: ", "", text)
    return " ".join(text.replace("|", "/").split())


def seen(name: str, model, folder: Path) -> Row:
    """What comes out for a type, its model saved to a folder."""
    kind = type(model).__name__
    save_tiny(folder, model, tiny_tokenizer())
    try:
        handle = load(folder, dtype="float32")
    except AbliterateError as error:
        return Row(name, kind, STOPS, reason(error, folder))
    try:
        writers = find_writers(handle)
        check_proof(handle)
    except WriterError as error:
        handle = load(folder, dtype="float32", at_stream=True)
        try:
            check_proof(handle)
        except AbliterateError as live:
            return Row(name, kind, STOPS, f"{reason(error, folder)}; live: {reason(live, folder)}")
        return Row(name, kind, LIVE, reason(error, folder))
    r = torch.randn(handle.d_model, generator=torch.Generator().manual_seed(1))
    bake(handle, Edit.uniform(writers, r))
    baked = prove(handle, r).component
    handle.model.save_pretrained(folder / "edited")
    again = handle_of(auto_class_of(name).from_pretrained(folder / "edited"), handle.tokenizer)
    assert max(baked, prove(again, r).component) < 1e-5
    return Row(name, kind, PROVED, f"{len(writers)} writers")


@LONG
@pytest.mark.parametrize("name", TYPES)
def test_a_type_is_proved_live_or_stopped_with_a_reason(name, rows, tmp_path):
    model = small_model(name)
    rows.append(seen(name, model, tmp_path) if model is not None else Row(name, "", NOT_TRIED, ""))


@LONG
def test_enough_are_proved_or_live(rows):
    if len(rows) < len(TYPES):
        pytest.skip(f"only {len(rows)} of {len(TYPES)} types were tried")
    assert sum(row.verdict in (PROVED, LIVE) for row in rows) >= ENOUGH


ROWS = [Row("qwen3", "BForCausalLM", PROVED, "9 writers"), Row("bert", "AForCausalLM", LIVE, "a norm")]


def test_the_table_is_sorted_and_says_what_models_are_called():
    assert architecture_table.table(ROWS).splitlines()[2:] == [
        "| bert |  | AForCausalLM | live only | a norm |",
        "| qwen3 | Qwen3 | BForCausalLM | proved | 9 writers |",
    ]


def test_the_table_is_written_into_the_page_where_it_changed(tmp_path):
    page = tmp_path / "architectures.md"
    architecture_table.write(ROWS, page)
    assert page.read_text().endswith(architecture_table.table(ROWS))
    assert "Of 2 types: 1 proved, 1 live only, 0 stops, 0 not tried." in page.read_text()
    written = page.stat().st_mtime_ns
    architecture_table.write(ROWS, page)
    assert page.stat().st_mtime_ns == written


@pytest.mark.parametrize(("name", "verdict"), [("bert", LIVE), ("qwen3", PROVED)])
def test_a_row_says_what_came_out(name, verdict, tmp_path):
    row = seen(name, small_model(name), tmp_path)
    assert (row.name, row.verdict) == (name, verdict)
    assert row.said == "9 writers" if verdict == PROVED else "a norm (LayerNorm) runs on the stream itself" in row.said
