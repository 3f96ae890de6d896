"""The command line's entry point. Thin: every option is a settings field, every result comes from the library."""

from __future__ import annotations

import importlib
import signal
import sys

import typer

from abliterate.commands.common import app
from abliterate.common.errors import AbliterateError

# In the order in which --help lists them.
COMMANDS = (
    "run", "measure", "inspect", "recipes", "apply", "export", "push", "chat", "report", "studio", "watch",
    "heal", "bench", "audit",
)  # fmt: skip

for _name in COMMANDS:
    importlib.import_module(f"abliterate.commands.{_name}")


def main() -> None:
    """Entry point: errors become one line and an exit code; a polite kill cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        app()
    except AbliterateError as error:
        typer.echo(f"abliterate: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
