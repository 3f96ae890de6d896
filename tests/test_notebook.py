"""The notebooks are executed at smaller sizes, and their key cells gave what their text says."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from abliterate.measure.refusal import is_refusal
from long import LONG

NOTEBOOK = Path(__file__).parent.parent / "examples" / "walkthrough.ipynb"
QUICK = NOTEBOOK.with_name("quickstart.ipynb")
SIZES = {"TRAIN": 16, "VALIDATION": 10, "TEST": 10, "TOKENS": 16, "TRIED": 3, "DECODED": 2}
nbformat = pytest.importorskip("nbformat", reason="nbformat isn't installed")


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.parametrize("path", [NOTEBOOK, QUICK], ids=lambda path: path.stem)
def test_outputs_are_stripped_and_every_cell_is_explained(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for before, cell in zip([None, *notebook.cells], notebook.cells, strict=False):
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            assert before is not None and before.cell_type == "markdown" and len(before.source) > 40, cell.source


def parameters(notebook):
    """The cell with the sizes, as papermill would find it."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    return cell


def test_the_sizes_stand_in_one_cell(notebook):
    found: dict[str, int] = {}
    exec(parameters(notebook).source, found)
    assert {name for name in found if name.isupper()} == set(SIZES)
    assert all(found[name] > size for name, size in SIZES.items())
    rest = "".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert all(rest.count(name) > 1 for name in SIZES)


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


def numbers(pattern: str, text: str) -> list[float]:
    match = re.search(pattern, text)
    assert match, f"{pattern} isn't in {text!r}"
    return [float(group) for group in match.groups()]


@pytest.mark.slow
def test_it_runs_and_says_what_it_should(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient isn't installed")
    pytest.importorskip("ipykernel", reason="ipykernel isn't installed")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebook's own folder goes
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    parameters(notebook).source = "\n".join(f"{name} = {size}" for name, size in SIZES.items())
    for cell in notebook.cells:  # the layers about the one that the sweep over all of them finds
        cell.source = cell.source.replace("SweepSettings(screen", "SweepSettings(layers=range(14, 18), screen")
    nbclient.NotebookClient(
        notebook, timeout=1800, startup_timeout=600, iopub_timeout=600, raise_on_iopub_timeout=True,
        kernel_name="python3", resources={"metadata": {"path": tmp_path}},
    ).execute()  # fmt: skip
    said = {
        name: printed(cell)
        for cell in notebook.cells
        if cell.cell_type == "code"
        for name in KEYS
        if KEYS[name] in cell.source
    }
    assert set(said) == set(KEYS)
    assert numbers(rf"train: (\d+) of {SIZES['TRAIN']} target", said["filter"])[0] > 0.8 * SIZES["TRAIN"]
    assert numbers(r"left: (\S+)", said["proof"])[0] < 0.05
    (refused, total) = numbers(r"refused: (\d+) of (\d+);", said["before"])
    assert refused / total > 0.8
    assert "chosen: layer" in said["sweep"]
    original, total = numbers(r"original: (\d+) of (\d+) refused", said["after"])
    edited, _ = numbers(r"edited: (\d+) of (\d+) refused", said["after"])
    assert original == refused
    assert edited / total < 0.4
    first, along = numbers(r"divergence: (\S+) nats at the first token, (\S+) along", said["after"])
    assert 0 < first < 1.5
    assert 0 < along < 1.5
    for name in ("first answer", "edited answer", "reloaded"):
        assert len(said[name]) > 80
        assert not is_refusal(said[name])
    # the file holds what was baked; its rounding may turn a word late in the answer
    assert said["reloaded"].splitlines()[1][:40] == said["edited answer"].splitlines()[1][:40]
    (out,) = tmp_path.glob("abliterate-walkthrough-*")
    assert (out / "report.html").stat().st_size > 100_000
    assert (out / "model" / "config.json").is_file()
    assert os.environ.get("TMPDIR") == str(tmp_path)
    assert_no_target_answers(notebook)


@LONG
def test_the_quick_start_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient isn't installed")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(QUICK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('_prompts": 40', '_prompts": 12').replace('tokens": 48', 'tokens": 24')
    there = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=there).execute()
    (ran,) = (printed(cell) for cell in notebook.cells if "ab.run(" in cell.source)
    before, after = numbers(r"^refusal: (\d+) -> (\d+) of", ran)
    assert before > 8 and after < before / 2
    assert (tmp_path / "quickstart-out" / "report.html").is_file()
    assert_no_target_answers(notebook)


KEYS = {
    "filter": "showing(h, prompts.target.train", "proof": "proof = ab.prove(h)", "before": "before = ab.measure",
    "sweep": "choice = ab.sweep", "after": "after = ab.measure", "first answer": "original_answer =",
    "edited answer": "edited_answer =", "reloaded": "reloaded_answer =",
}  # fmt: skip


def assert_no_target_answers(notebook) -> None:
    """No target prompt, and so no answer to one, is among what was printed."""
    from abliterate.prompts.sets import load_prompts

    shown = "\n".join(printed(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert not any(text in shown for text in load_prompts("bundled", role="target"))
