"""Where a long job tells how it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
