"""An export that goes on: the page shows how far it is, and can stop it."""

from __future__ import annotations

import time

from abliterate.common.errors import AbliterateError
from abliterate.common.reporting import Tick
from abliterate.common.watching import Progress


class Export:
    """A reporter that keeps what it is told, and ends the work at its next word once it is to stop.

    Attributes:
        state: where the export is.
    """

    def __init__(self) -> None:
        self.state = Progress(started=time.time())
        self._stopping = False

    def stop(self) -> None:
        """Have the export end; outputs appear whole or not at all, so nothing is left of it."""
        self._stopping = True

    def say(self, text: str) -> None:
        """One line about how it goes.

        Raises:
            AbliterateError: when the export is to stop; so does `progress`, and the tick it returns.
        """
        self._check()
        self.state.say(text)

    def progress(self, stage: str, total: int) -> Tick:
        """A stage of `total` steps; call what it returns with the number done."""
        self._check()
        self.state.begin(stage, total)

        def tick(done: int) -> None:
            self._check()
            self.state.done += done

        return tick

    def _check(self) -> None:
        if self._stopping:
            raise AbliterateError("the export was stopped; nothing of it is left")
