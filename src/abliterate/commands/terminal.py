"""What the command line shows: progress bars in a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from abliterate.common.reporting import Tick, untold
from abliterate.common.watching import ProgressFile

if TYPE_CHECKING:  # not imported before something is shown: some commands take no longer than that
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from abliterate.cards.tables import Table as Results


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
        self._console, self.stream = console, sys.stderr  # that of now: libraries get another meanwhile
        self.quiet, self.log, self.published = quiet, log, published
        self.bars: Progress | None = None
        self.started = time.monotonic()

    @property
    def console(self) -> Console:
        """Where lines and bars go."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(file=self.stream, highlight=False, soft_wrap=True)
        return self._console

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_error: Any) -> None:
        self._clear()
        if self.published:
            self.published.end()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No bars for as long as a person is asked something."""
        self._clear()  # the next stage draws its own
        yield

    def say(self, text: str) -> None:
        """One line about how it goes."""
        stamp = time.monotonic() - self.started
        self.note(text)
        if self.published:
            self.published.say(text)
        if not self.quiet:
            from rich.markup import escape

            self.console.print(f"[dim]{stamp:6.1f}s[/dim]  {escape(text)}")

    def progress(self, stage: str, total: int) -> Tick:
        """A bar for a stage of `total` steps, or one line where there is no terminal and no notebook with widgets."""
        published = self.published
        if published:
            published.stage(stage, total)
        self._clear()
        if self.quiet or not _draws(self.console):
            self.say(f"{stage} ({total})")
            return published.tick if published else untold
        self.note(f"{stage} ({total})")
        bars = self.bars = _bars(self.console)
        task = bars.add_task(stage, total=total)
        bars.start()

        def tick(done: int) -> None:
            bars.advance(task, done)
            if published:
                published.tick(done)
            if bars.finished and self.bars is bars:
                self._clear()  # what comes next may be a result, which a bar's line isn't the place for

        return tick

    def _clear(self) -> None:
        """Take the bar away, if there is one."""
        if self.bars:
            self.bars.stop()
            self.bars = None

    def note(self, text: str) -> None:
        """A line for the log file alone."""
        if self.log:
            self.log.write(f"{time.monotonic() - self.started:8.1f}s  {text}\n")
            self.log.flush()


def _draws(console: Console) -> bool:
    """Whether bars move there; in a notebook rich moves them by ipywidgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


def _bars(console: Console) -> Progress:
    """Bars that say how far, how fast and how long."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Steps per second, or seconds per step where they are slow."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            if not speed:
                return Text("")
            return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), Rate(),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
        redirect_stdout=False, redirect_stderr=False,  # results may go to a file while bars go to the terminal
    )  # fmt: skip


def rows_table(
    rows: Iterable[Sequence[str]], headings: Sequence[str], title: str | None = None, left: int = 1
) -> Table:
    """A table of texts; the first `left` columns lie left, the others, which are numbers, right."""
    from rich.table import Table

    table = Table(title=title, title_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def result_table(found: Results) -> Table:
    """The closing table: a column for each model measured."""
    return rows_table(found.rows, found.header, " against ".join(found.header[1:]))


def run_result(document: dict[str, Any]) -> tuple[Table, str]:
    """What `abliterate run` and `heal` print of a result: the closing table, and how the edit was found and proved."""
    from abliterate.cards.edit import said
    from abliterate.cards.tables import results
    from abliterate.measure.document import RunDocument

    found = RunDocument.model_validate(document)
    return result_table(results(found)), "\n".join(said(found))


def measurement_table(document: dict[str, Any]) -> Table:
    """What `abliterate measure` prints: one column, or two when there is an original to compare with."""
    from abliterate.cards.tables import results
    from abliterate.measure.document import RunDocument

    found = RunDocument.model_validate(document)
    if found.edited is not None:
        return result_table(results(found))
    return rows_table([row for row in results(found).rows if not row[0].startswith("divergence")], ("", "model"))


def places(out: Path, *, original: str | None = None, **names: str) -> str:
    """Where a command's outputs are, a line each; what wasn't written isn't told."""
    there = {what: str(out / name) for what, name in names.items() if (out / name).exists()}
    if original is not None:
        there["original"] = original
    return "\n".join(f"{what + ':':<10}{where}" for what, where in there.items())


def output() -> Console:
    """The console for results."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 120)
