"""What models and files are called where others read it: no path of this machine."""

from __future__ import annotations

from pathlib import Path


def is_local(source: str) -> bool:
    """Whether a source is a file or folder of this machine."""
    return Path(source).expanduser().exists()


def public_name(source: str) -> str:
    """A source as others may see it: a Hub id as it is, a local file or folder without its path."""
    return Path(source).expanduser().resolve().name if is_local(source) else source
