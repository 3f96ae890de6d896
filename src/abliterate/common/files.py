"""Outputs that are whole or not there: written under a temporary name and renamed at the end.

A temporary name says who writes under it: `.NAME.HOST-PID.tmp`. What a process leaves that is killed outright is
cleared away by the next one that writes the same output on the same host, once no such process lives.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from abliterate.common.errors import OutputError

_reading = False  # set in processes that hold a model together with one that writes


def only_read() -> None:
    """Let another process write the outputs: files and folders that this one writes are thrown away."""
    global _reading
    _reading = True


def writes() -> bool:
    """Whether what this process writes stays."""
    return not _reading


def sha256_of(file: Path) -> str:
    """Sha256 (hex) of a file, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def cache() -> Path:
    """The folder for things that can be made again: ABLITERATE_CACHE, or the user's cache."""
    base = os.environ.get("ABLITERATE_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abliterate"


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` when the block ends well, else remove it.

    Raises:
        OutputError: when the disk is full, `path` is a folder, or its folder can't be written.
    """
    final = Path(path)
    check_file(final, overwrite=True)
    clear_leftovers(final)
    temporary = _beside(final, "tmp")
    with explained(final), _writing(temporary):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _as_umask(temporary)
            if writes():
                os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all (`whole_file`)."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """The same for a folder.

    Raises:
        OutputError: when the folder exists and is not empty (unless `overwrite`), when the disk is full,
            or when it can't be written.
    """
    final = Path(path)
    clear_leftovers(final)
    check_folder(final, overwrite=overwrite)
    temporary = _beside(final, "tmp")
    missing = [folder for folder in final.absolute().parents if not folder.exists()]
    with explained(final), _writing(temporary):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                _as_umask(file)
            if writes():
                _put(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in missing:
                with contextlib.suppress(OSError):  # the finished output is in it
                    folder.rmdir()


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A model's folder in the cache, filled by `make` when it isn't there."""
    config = folder / "config.json"
    if not config.is_file():
        try:
            with whole_folder(folder) as temporary:
                make(temporary)
        except OutputError:
            if not config.is_file():  # else another process was quicker
                raise
    return folder


def check_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise OutputError when `path` can't become an output folder."""
    final = Path(path)
    if not final.name:
        raise OutputError(f"output folder {final} has no name to write under; name a new folder with --out")
    if final.exists() and not final.is_dir():
        raise OutputError(f"output {final} is a file; name a folder with --out")
    if Path.cwd().is_relative_to(final.resolve()):
        raise OutputError(f"output folder {final} is where you are, or above; name another with --out")
    if final.is_dir() and any(final.iterdir()) and not overwrite:
        raise OutputError(f"output folder {final} is not empty; name another with --out, or pass --overwrite")
    _check_writable(final)


def check_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise OutputError when `path` can't become an output file."""
    final = Path(path)
    if final.is_dir():
        raise OutputError(f"output {final} is a folder; name a file with --out")
    if final.exists() and not overwrite:
        raise OutputError(f"output {final} exists; name another with --out, or pass --overwrite")
    _check_writable(final)


def _check_writable(final: Path) -> None:
    parent = final.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"output {final} can't be made: {parent} is a file; name another with --out")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"output {final} can't be made: {parent} is not writable; name another with --out")


def check_space(path: str | os.PathLike[str], needed: int) -> None:
    """Raise OutputError when fewer than `needed` bytes are free where `path` will be, leftovers cleared away."""
    clear_leftovers(path)
    parent = Path(path).absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"output {path} needs {needed / 2**30:.2f} GiB, and {parent} has {free / 2**30:.2f} GiB free; "
            "free some or name another folder with --out"
        )


def check_apart(out: str | os.PathLike[str], *sources: str | os.PathLike[str] | None) -> None:
    """Raise OutputError when `out` holds what a job reads: --overwrite would remove it."""
    folder = Path(out).resolve()
    for source in sources:
        path = Path(source or "").expanduser()
        if source and path.exists() and path.resolve().is_relative_to(folder):
            raise OutputError(f"output folder {out} holds {source}, which is read; name another with --out")


def clear_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what processes of this host that live no more left of `path`.

    An old output that such a process had moved out of the way is moved back when nothing has taken its place.
    """
    final = Path(path)
    pattern = re.compile(rf"\.{re.escape(final.name)}\.([0-9a-f]+)-(\d+)\.(tmp|old)")
    try:
        matches = [pattern.fullmatch(name) for name in os.listdir(final.absolute().parent)]
    except OSError:
        return  # no such folder yet, or one that can't be read: there is nothing to clear
    for match in sorted((m for m in matches if m), key=lambda m: m[3]):  # .old before .tmp
        leftover = final.with_name(match[0])
        if match[1] != host_tag() or leftover.absolute() in _open or process_lives(int(match[2]), leftover):
            continue
        with contextlib.suppress(OSError):  # another process clears it away at the same time, or may and we may not
            if match[3] == "old" and not final.exists():
                os.replace(leftover, final)
            elif leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


_open: set[Path] = set()  # temporary names that this process writes under


@contextlib.contextmanager
def _writing(temporary: Path) -> Iterator[None]:
    _open.add(temporary.absolute())
    try:
        yield
    finally:
        _open.discard(temporary.absolute())


def _beside(final: Path, kind: str) -> Path:
    """A hidden name beside `final` that says which process it belongs to."""
    return final.with_name(f".{final.name}.{host_tag()}-{os.getpid()}.{kind}")


@functools.cache
def host_tag() -> str:
    """Eight hex digits for this host, and for the container in it: process ids mean something only there."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def process_lives(pid: int, made: Path) -> bool:
    """Whether the process that made a path lives: one of its id does, and it didn't start after the path was made.

    This process is not taken for the maker: it knows its own.
    """
    if pid == os.getpid():
        return False
    try:
        return psutil.Process(pid).create_time() <= made.stat().st_ctime + 2
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):  # it is somebody else's, or the path is gone
        return True


def _as_umask(path: Path) -> None:
    """Give a file the permissions a plain `open` would: safetensors writes files that only the owner reads."""
    if path.is_file():
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)


def _put(temporary: Path, final: Path) -> None:
    """Rename the finished folder into place, the old one out of the way first."""
    old = _beside(final, "old")
    if final.exists():
        os.replace(final, old)
    try:
        os.replace(temporary, final)
    except BaseException:
        if old.exists():
            os.replace(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def explained(final: Path) -> Iterator[None]:
    """Turn what the disk says while `final` is written into an OutputError, where people can do something about it."""
    full = f"the disk is full; {final} was not written (nothing half-written is left); free some space"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(full) from error
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"a file of {final} is larger than its file system, or a limit set here (ulimit -f), allows; "
                "it was not written"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OutputError(f"{final} can't be written: {error.strerror}") from error
        raise
    except Exception as error:
        # safetensors reports a full disk in an exception of its own
        if "No space left on device" in str(error) or "the disk is full" in str(error):
            raise OutputError(full) from error
        raise
