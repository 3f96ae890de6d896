"""Ranges of bytes read, written and copied between open files, each at its own offset."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from abliterate.common.errors import ModelError

# Other file systems, old kernels, sandboxes: there the kernel can't copy, and bytes go through memory.
_BY_HAND = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}
_BUFFER = 4 * 2**20


def read_into(file: int, start: int, buffer: memoryview) -> None:
    """Fill the buffer from a file at an offset.

    Raises:
        ModelError: when the file ends before (it was changed since its header was checked).
    """
    while buffer:
        done = os.preadv(file, [buffer[: 2**30]], start)
        if not done:
            raise ModelError("a file became shorter while it was read; is something else writing to it?")
        buffer, start = buffer[done:], start + done


def write_from(file: int, start: int, buffer: memoryview) -> None:
    """Write the whole buffer to a file at an offset."""
    while buffer:
        done = os.pwrite(file, buffer[: 2**30], start)
        buffer, start = buffer[done:], start + done


def copy_range(source: int, start: int, target: int, at: int, count: int) -> None:
    """Copy bytes from file to file, in the kernel where it can.

    Args:
        source, target: open file descriptors.
        start: offset in the source.
        at: offset in the target.
        count: bytes.
    """
    in_kernel, buffer = getattr(os, "copy_file_range", None), memoryview(b"")
    while count:
        done = 0
        try:
            done = in_kernel(source, target, count, start, at) if in_kernel else 0
        except OSError as error:
            if error.errno not in _BY_HAND:
                raise
        if not done:  # some file systems copy nothing and say so; a file cut short is found here
            buffer = buffer or memoryview(bytearray(min(count, _BUFFER)))
            in_kernel, done = None, min(count, len(buffer))
            read_into(source, start, buffer[:done])
            write_from(target, at, buffer[:done])
        start, at, count = start + done, at + done, count - done


def spans(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """A range cut into pieces of at most `step`, each from its first to beyond its last."""
    for low in range(start, end, step):
        yield low, min(low + step, end)
