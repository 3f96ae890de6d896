"""Where a long job tells how it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Tick = Callable[[int], None]


class Reporter(Protocol):
    """Where a run tells how it goes; `Silent` says nothing."""

    def say(self, text: str) -> None: ...

    def progress(self, stage: str, total: int) -> Tick | None: ...


class Silent:
    """A reporter that says nothing."""

    def say(self, text: str) -> None:
        pass

    def progress(self, stage: str, total: int) -> Tick | None:
        return None
