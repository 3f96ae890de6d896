"""Changing the files of a folder in place, so that a kill at any moment leaves all of them old or all of them new.

New files are written beside the old ones under temporary names and synced to the disk. Then the journal is
written, which is one rename and commits the change, and only then does each new file take its old one's name. Found
later, new files without a journal are removed; a journal is carried out, which does no harm if done twice.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from abliterate.common.errors import OutputError

JOURNAL = ".abliterate-apply.json"
_NEW = ".abliterate-new"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other applies out of a folder; a killed process lets go of it.

    Raises:
        OutputError: when another is at work in it.
    """
    try:
        import fcntl
    except ImportError:  # not on this system; then two at once are not noticed
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another process is changing {folder} in place; wait for it to end") from None
        yield
    finally:
        os.close(fd)


def interrupted(folder: Path) -> bool:
    """Whether a change of this folder in place was committed and not carried out: its files may not belong together."""
    return (folder / JOURNAL).exists()


def recover(folder: Path) -> dict[str, Any] | None:
    """End what a killed process began in a folder: carry it out if it was committed, else undo it.

    Returns:
        What `changing` was told of the work when it was carried out here, else None.

    Raises:
        OutputError: when the journal can't be read.
    """
    path = folder / JOURNAL
    work = None
    if path.exists():
        try:
            journal = json.loads(path.read_text(encoding="utf-8"))
            names, work = journal["names"], dict(journal["work"])
            if any(Path(name).name != name or name in ("", ".", "..") for name in names):
                raise ValueError("it names no files of this folder")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} can't be read: {error}; get the model again, or remove that file") from error
        _carry_out(folder, names)
    for stray in folder.glob(f".*{_NEW}"):
        stray.unlink(missing_ok=True)
    return work


@contextlib.contextmanager
def changing(folder: Path, names: Sequence[str], work: dict[str, Any]) -> Iterator[dict[str, Path]]:
    """Give a temporary name for each file; all take their final names when the block ends well, else none does.

    Args:
        folder: where the files are. It should be `locked`, and `recover`ed.
        names: the files to be replaced or made.
        work: what is being done, kept in the journal.

    Raises:
        OSError: when the disk is full; the folder is then as it was.
    """
    temporaries = {name: folder / _temporary(name) for name in names}
    try:
        yield temporaries
        for temporary in temporaries.values():
            _sync(temporary)
        _write_journal(folder, names, work)
    except BaseException:
        (folder / JOURNAL).unlink(missing_ok=True)  # first: with it, files missing here would count as renamed
        for name in (*names, JOURNAL):
            (folder / _temporary(name)).unlink(missing_ok=True)
        raise
    try:
        _carry_out(folder, names)
    except KeyboardInterrupt:
        _carry_out(folder, names)
        raise


def _temporary(name: str) -> str:
    return f".{name}{_NEW}"


def _carry_out(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # renamed before the kill
            os.replace(folder / _temporary(name), folder / name)
    _sync(folder)
    (folder / JOURNAL).unlink(missing_ok=True)


def _write_journal(folder: Path, names: Sequence[str], work: dict[str, Any]) -> None:
    """Write the journal, whole or not at all, and onto the disk."""
    new = folder / _temporary(JOURNAL)
    new.write_text(json.dumps({"schema": 1, "names": list(names), "work": work}), encoding="utf-8")
    _sync(new)
    os.replace(new, folder / JOURNAL)
    _sync(folder)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
