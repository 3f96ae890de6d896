"""The main job: find the direction, choose an edit by measurement, remove it, prove the result, write it down."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from abliterate.run.pipeline import run

    return run
