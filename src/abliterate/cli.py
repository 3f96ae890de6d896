"""The command line's entry point. Thin: every option is a settings field, every result comes from the library."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import traceback

import typer

from abliterate.commands.common import app
from abliterate.common.errors import AbliterateError

# In the order in which --help lists them.
COMMANDS = (
    "run", "measure", "inspect", "recipes", "gallery", "apply", "export", "push", "chat", "report", "studio", "watch",
    "heal", "bench", "audit",
)  # fmt: skip

# Before torch: threads that wait don't keep a core busy, which made a piped chat four times slower beside other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Large pages for large tensors: widening a weight that is brought from disk takes a quarter of the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

for _name in COMMANDS:
    importlib.import_module(f"abliterate.commands.{_name}")


LONGEST = 300  # characters of an unforeseen error's text
UNFORESEEN = 70  # the exit code, EX_SOFTWARE of sysexits.h


def main() -> None:
    """Entry point: errors become one line and an exit code; a polite kill cleans up as Ctrl-C does.

    An error that nobody foresaw becomes one line too; its trace goes to a file that the line names.
    """
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        app()
    except AbliterateError as error:
        typer.echo(f"abliterate: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]
        typer.echo(f"abliterate: unforeseen {said}; {_traced()}", err=True)
        sys.exit(UNFORESEEN)


def _traced() -> str:
    """Write the trace of the error at hand to a file; says where, and what to do with it."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="abliterate-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{' '.join(sys.argv)}\n{traceback.format_exc()}")
    except OSError:
        return "no file for its trace could be written"
    return f"its trace is in {path}: please report it to abliterate's makers with that file, once you have read it"


if __name__ == "__main__":
    main()
