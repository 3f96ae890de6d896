"""The errors a user can meet, and how they quote. Each says what was wrong, where, and what to do about it."""

from collections.abc import Sequence


class AbliterateError(Exception):
    """Base of every error this package raises on purpose; the command line prints its text and exits."""

    exit_code = 2


class PromptError(AbliterateError):
    """A prompt source is missing, unreadable, empty, or overlaps another."""


class ModelError(AbliterateError):
    """A model can't be loaded or isn't of a kind this package can edit."""


class NonFiniteError(AbliterateError):
    """A weight or an activation is NaN or infinite; the text names the layer."""


class WriterError(AbliterateError):
    """A writer of the residual stream was missed or can't be edited; the text names layer and side."""


class RecipeError(AbliterateError):
    """A recipe file breaks a rule of docs/recipe.md; the text names the rule."""


class OutputError(AbliterateError):
    """An output can't be written: the folder isn't empty, the disk is full, a path isn't writable."""


class NothingToDoError(AbliterateError):
    """The model hardly shows the behaviour, so there is nothing to remove."""

    exit_code = 3


class InterruptedByUserError(AbliterateError):
    """Ctrl-C; what was being written is gone."""

    exit_code = 130


def shorten(text: str, width: int = 80) -> str:
    """The text on one line, cut to `width` characters with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def counted(count: int, what: str) -> str:
    """3 and "weight" as "3 weights"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
