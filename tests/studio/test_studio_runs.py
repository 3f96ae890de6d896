"""A run started from the page: watched, stopped cleanly, and its failure told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from abliterate.errors import AbliterateError, OutputError
from abliterate.studio.frontier import drawing, frontier_points
from abliterate.studio.runs import PASSWORD_VARIABLE, Runs
from long import LONG

SMALL = [
    "--target=bundled", "--baseline=bundled", "--train-prompts=8", "--validation-prompts=8", "--test-prompts=8",
    "--max-new-tokens=4", "--no-filter", "--method=sweep",
]  # fmt: skip


@pytest.fixture
def runs(served):
    made = Runs(served)
    yield made
    made.end()


def until(runs, out, *states, seconds=300):
    end = time.monotonic() + seconds
    while (view := runs.view(out)).state not in states and time.monotonic() < end:
        time.sleep(0.05)
    assert view.state in states, view
    return view


@pytest.mark.slow
@LONG
def test_a_run_is_watched_to_its_end(runs, served, monkeypatch):
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    out = served / "new"
    assert runs.view(out).state == "nothing"
    runs.start(str(served / "model"), out, SMALL)
    with pytest.raises(AbliterateError, match="the run of new goes on"):
        runs.start(str(served / "model"), served / "other", SMALL)
    environment = Path(f"/proc/{runs._started[out].process.pid}/environ").read_text()
    assert "PATH=" in environment and "secret" not in environment
    view = until(runs, out, "running", "done")
    assert view.ours
    view = until(runs, out, "done", "failed")
    assert view.state == "done", view.error
    assert (out / "results.json").is_file()
    assert runs.going() is None


@pytest.mark.slow
@LONG
def test_a_run_is_stopped_and_leaves_nothing(runs, served):
    out = served / "new"
    before = sorted(served.iterdir())
    runs.start(str(served / "model"), out, [*SMALL, "--max-new-tokens=400", "--test-prompts=200"])
    until(runs, out, "running")
    runs.stop(out)
    assert until(runs, out, "stopped", "failed").state == "stopped"
    assert sorted(served.iterdir()) == before
    with pytest.raises(AbliterateError, match="no run of new"):
        runs.stop(out)


@pytest.mark.slow
@LONG
def test_why_a_run_failed_is_told_on_one_line(runs, served):
    out = served / "new"
    runs.start(str(served / "model"), out, ["--target=missing.txt", "--baseline=bundled"])
    view = until(runs, out, "failed", "done")
    assert "missing.txt" in view.error
    assert "\n" not in view.error and "Traceback" not in view.error
    assert not view.going


def test_a_run_into_a_folder_that_is_not_empty_is_refused(runs, served):
    with pytest.raises(OutputError, match="not empty"):
        runs.start(str(served / "model"), served / "out", SMALL)
    assert runs.view(served / "out").state == "done"


def test_the_points_of_a_frontier(served):
    points = frontier_points(served / "out")
    assert [(p.refused, p.total, p.divergence, p.chosen) for p in points] == [(1, 8, 0.2, True), (4, 8, 0.1, False)]
    assert points[0].label == "1: 1 of 8 refused, divergence 0.2 nats (chosen)"
    assert all(p.recipe.is_file() for p in points)
    picture = drawing(points, 1)
    assert picture.count('class="point"') == 1 and picture.count('class="picked"') == 1
    (served / "out" / "results.json").write_text("{}")
    with pytest.raises(AbliterateError, match="no frontier"):
        frontier_points(served / "out")


def test_a_run_without_a_frontier_has_one_point(template):
    import json
    import shutil

    out = template.parent / "single"
    shutil.copytree(template / "out", out, dirs_exist_ok=True)
    document = json.loads((out / "results.json").read_text())
    document["frontier"] = []
    (out / "results.json").write_text(json.dumps(document))
    (point,) = frontier_points(out)
    assert point.recipe == out / "recipe.safetensors"
    assert point.refused == document["edited"]["refusal"]["refused"]
