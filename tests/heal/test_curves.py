"""The picture of a training: what is drawn, in which form, and when there is nothing to draw."""

from __future__ import annotations

import importlib.util

import pytest

from abliterate.heal.curves import PANELS, curve, curves_missing, draw_curves, running_mean

DPO = [
    {"step": s, "loss": 0.7 - s / 100, "rewards/margins": s / 10, "rewards/accuracies": 0.5, "epoch": s / 40}
    for s in range(1, 31)
]
SELF = [{"step": s, "loss": 1 / s, "divergence": 2 / s} for s in range(1, 6)]


def panels(path):
    """Which panels a picture has: matplotlib writes each text into the SVG as a comment."""
    text = path.read_text()
    return [key for key, title in PANELS.items() if f"<!-- {title} -->" in text]


@pytest.mark.parametrize(
    ("history", "expected"), [(DPO, ["loss", "rewards/margins", "rewards/accuracies"]), (SELF, ["loss", "divergence"])]
)
def test_a_panel_for_each_curve_that_there_is(tmp_path, history, expected):
    file = tmp_path / "c.svg"
    assert draw_curves(history, file)
    assert panels(file) == expected


def test_png_and_the_same_bytes_every_time(tmp_path):
    from matplotlib.image import imread

    for name in ("a.png", "b.png", "a.svg", "b.svg"):
        assert draw_curves(DPO, tmp_path / name)
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    picture = imread(tmp_path / "a.png")
    assert picture.shape[0] > 500 < picture.shape[1]
    assert draw_curves(DPO[:20], tmp_path / "b.png")  # another history, another picture
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("history", [[], DPO[:1], [{"step": 1, "epoch": 1}, {"step": 2, "epoch": 2}]])
def test_nothing_to_draw(tmp_path, history):
    assert not draw_curves(history, tmp_path / "c.png")
    assert not list(tmp_path.iterdir())


def test_a_step_done_twice_counts_as_done_last():
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}, {"step": 3, "x": 1.0}]
    assert curve(history, "loss") == ([1, 2], [3.0, 2.0])


def test_running_mean():
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert running_mean([2.0, 4.0], 5) == [2.0, 3.0]


def test_what_is_missing_is_said(monkeypatch):
    assert curves_missing() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'abliterate[heal]'" in (curves_missing() or "")
