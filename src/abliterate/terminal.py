"""What the command line shows: progress bars in a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from abliterate.watching import ProgressFile

Tick = Callable[[int], None]


class Terminal:
    """A reporter on standard error; results go to standard output.

    Use as a context manager, so that bars are cleared whatever happens.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        log: IO[str] | None = None,
        published: ProgressFile | None = None,
    ) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet, self.log, self.published = quiet, log, published
        self.bars: Progress | None = None
        self.started = time.monotonic()
        self.open: TaskID | None = None

    def __enter__(self) -> Terminal:
        if not self.quiet and self.console.is_terminal:
            self.bars = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), _Rate(),
                TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, transient=True,
            )  # fmt: skip
            self.bars.start()
        return self

    def __exit__(self, *_error: Any) -> None:
        if self.bars:
            self.bars.stop()
        if self.published:
            self.published.end()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No bars for as long as a person is asked something."""
        if self.bars:
            self.bars.stop()
        try:
            yield
        finally:
            if self.bars:
                self.bars.start()

    def say(self, text: str) -> None:
        """One line about how it goes."""
        stamp = time.monotonic() - self.started
        if self.log:
            self.log.write(f"{stamp:8.1f}s  {text}\n")
            self.log.flush()
        if self.published:
            self.published.say(text)
        if not self.quiet:
            self.console.print(f"[dim]{stamp:6.1f}s[/dim]  {_escape(text)}")

    def progress(self, stage: str, total: int) -> Tick | None:
        """A bar for a stage of `total` steps, or one line where there is no terminal."""
        published = self.published
        if published:
            published.stage(stage, total)
        if self.bars is None:
            self.say(f"{stage} ({total})")
            return published.tick if published else None
        bars = self.bars
        if self.open is not None:
            bars.remove_task(self.open)
        task = self.open = bars.add_task(stage, total=total)

        def tick(done: int) -> None:
            bars.advance(task, done)
            if published:
                published.tick(done)

        return tick


class _Rate(ProgressColumn):
    """Steps per second, or seconds per step where they are slow."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


def result_table(rows: list[tuple[str, str, str]]) -> Table:
    """The closing table: original against edited."""
    table = Table(title="original against edited", title_style="bold")
    table.add_column("")
    table.add_column("original", justify="right")
    table.add_column("edited", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def measurement_table(document: dict[str, Any]) -> Table:
    """What `abliterate measure` prints: one column, or two when there is an original to compare with."""
    from abliterate.publish.card import result_rows

    if document["edited"] is not None:
        return result_table(result_rows(document))
    table = Table()
    table.add_column("")
    table.add_column("model", justify="right")
    for name, value, _ in result_rows({**document, "edited": document["original"]}):
        if not name.startswith("divergence"):
            table.add_row(name, value)
    return table


def plan_table(rows: list[tuple[str, str]]) -> Table:
    """What `abliterate run --plan` prints."""
    table = Table(title="what the run would take here", title_style="bold")
    table.add_column("")
    table.add_column("planned", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def output() -> Console:
    """The console for results."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 120)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
