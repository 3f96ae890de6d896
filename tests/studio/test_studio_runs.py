"""A run started from the page: watched, stopped cleanly, and its failure told."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from abliterate.common.errors import AbliterateError, OutputError
from abliterate.studio.frontier import drawing, frontier_points, round_values
from abliterate.studio.runs import PASSWORD_VARIABLE, Runs, _Started

SMALL = [
    "--target=bundled", "--baseline=bundled", "--train-prompts=8", "--validation-prompts=8", "--test-prompts=8",
    "--max-new-tokens=4", "--no-filter", "--method=sweep",
]  # fmt: skip


@pytest.fixture
def runs(served):
    made = Runs(served)
    yield made
    made.end()


def until(runs, out, *states):
    """The view of the run once it is in one of these states; however slow the machine, it ends in some state."""
    going = True
    while (view := runs.view(out)).state not in states and going:
        going = view.going
        time.sleep(0.05)
    assert view.state in states, view
    return view


@pytest.mark.slow
def test_a_run_is_watched_to_its_end(runs, served, monkeypatch):
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    monkeypatch.setattr(subprocess, "Popen", seen := mock.Mock(wraps=subprocess.Popen))
    out = served / "new"
    assert runs.view(out).state == "nothing"
    runs.start(str(served / "model"), out, SMALL)
    with pytest.raises(AbliterateError, match="the run of new goes on"):
        runs.start(str(served / "model"), served / "other", SMALL)
    environment = seen.call_args.kwargs["env"]
    assert "PATH" in environment and PASSWORD_VARIABLE not in environment
    view = until(runs, out, "running", "done")
    assert view.ours
    view = until(runs, out, "done")
    assert view.error == ""
    assert (out / "results.json").is_file()
    assert runs.going() is None


@pytest.mark.slow
def test_a_run_is_stopped_and_leaves_nothing(runs, served):
    out = served / "new"
    before = sorted(served.iterdir())
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a studio that a script started in the background
    try:
        runs.start(str(served / "model"), out, [*SMALL, "--max-new-tokens=400", "--test-prompts=200"])
    finally:
        signal.signal(signal.SIGINT, ignored)
    until(runs, out, "running")
    runs.stop(out)
    until(runs, out, "stopped")
    assert sorted(served.iterdir()) == before
    with pytest.raises(AbliterateError, match="no run of new"):
        runs.stop(out)


@pytest.mark.slow
def test_why_a_run_failed_is_told_on_one_line(runs, served):
    out = served / "new"
    runs.start(str(served / "model"), out, ["--target=missing.txt", "--baseline=bundled"])
    view = until(runs, out, "failed")
    assert "missing.txt" in view.error
    assert "\n" not in view.error and "Traceback" not in view.error
    assert not view.going


def test_a_run_into_a_folder_that_is_not_empty_is_refused(runs, served):
    with pytest.raises(OutputError, match="not empty"):
        runs.start(str(served / "model"), served / "out", SMALL)
    assert runs.view(served / "out").state == "done"


def test_a_run_that_lost_its_stop_is_asked_again(runs, served, monkeypatch):
    out = served / "new"
    deaf = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, lambda *_: exit(3)))\n"
        "print(flush=True)\n"
        "time.sleep(10000)"
    )
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    process.stdout.readline()
    runs._started[out] = _Started(process, io.BytesIO())
    until(runs, out, "starting")
    runs.stop(out)
    assert until(runs, out, "stopping").going
    monkeypatch.setattr("abliterate.studio.runs.LOST", 0.1)
    until(runs, out, "stopped")
    process.stdout.close()


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (0.22, [0, 0.05, 0.1, 0.15, 0.2]),
        (1.1, [0, 0.5, 1]),
        (0.1, [0, 0.02, 0.04, 0.06, 0.08, 0.1]),
        (3e-5, [0, 1e-5, 2e-5, 3e-5]),
    ],
)
def test_the_axes_of_a_frontier_have_round_numbers(most, expected):
    assert round_values(most) == expected


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
