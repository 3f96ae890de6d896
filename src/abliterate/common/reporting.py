"""Where a long job tells how it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

Tick = Callable[[int], None]
"""Called with how many more steps of a stage are done."""


def untold(done: int) -> None:
    """A tick that nobody hears."""


class Reporter(Protocol):
    """Where a job tells how it goes: in lines, and in stages of so many steps; `Silent` says nothing."""

    def say(self, text: str) -> None: ...

    def progress(self, stage: str, total: int) -> Tick: ...


class Silent:
    """A reporter that says nothing."""

    def say(self, text: str) -> None:
        pass

    def progress(self, stage: str, total: int) -> Tick:
        return untold


SILENT = Silent()


@dataclass
class Clock:
    """How long a job's stages took, in seconds; `started` is a reading of time.monotonic()."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's time to the stage's."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 3)
