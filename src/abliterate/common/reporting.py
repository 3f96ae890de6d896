"""Where a long job tells how it goes."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

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
_makers: list[Callable[[], Reporter]] = [Silent]


def default_reporter() -> Reporter:
    """Who is told where nobody is named: nobody, but a notebook's page."""
    return _makers[-1]()


def tell_by_default(maker: Callable[[], Reporter]) -> None:
    """Have what this makes told from now on."""
    _makers[:] = [maker]


@contextmanager
def told_by_default(reporter: Reporter) -> Iterator[None]:
    """Have one reporter told, where nobody is named, for as long as the context lasts."""
    before = _makers[-1]
    tell_by_default(lambda: reporter)
    try:
        yield
    finally:
        tell_by_default(before)


Item = TypeVar("Item")


def each(reporter: Reporter, stage: str, items: Sequence[Item]) -> Iterator[Item]:
    """The items one by one, each a step of a stage that is told when the next is asked for."""
    tick = reporter.progress(stage, len(items))
    for item in items:
        yield item
        tick(1)


class _Libraries(io.TextIOBase):
    """What stands in for standard error while a job goes on: whole lines go to `told`, or nowhere.

    One for all jobs of a process, as the handlers that libraries make for their loggers keep the stream of that time.
    """

    told: Callable[[str], None] | None = None
    begun = ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        if self.told:
            for line in lines:
                self.told(line)
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        assert sys.__stderr__ is not None  # for processes that are started meanwhile
        return sys.__stderr__.fileno()


_LIBRARIES = _Libraries()


@contextmanager
def libraries_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Nothing that libraries write on standard error shows: their warnings, loggers and bars.

    They say nothing that a user can mend; what goes wrong is raised. A terminal for progress has to be made before.

    Args:
        tell: called with each line instead.
    """
    kept, before = sys.stderr, _LIBRARIES.told
    sys.stderr, _LIBRARIES.told = _LIBRARIES, tell
    try:
        yield
    finally:
        sys.stderr, _LIBRARIES.told = kept, before


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
