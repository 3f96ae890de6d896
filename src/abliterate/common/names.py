"""What models and files are called where others read it: no path of this machine."""

from __future__ import annotations

import re
from pathlib import Path


def is_local(source: str) -> bool:
    """Whether a source is a file or folder of this machine."""
    return Path(source).expanduser().exists()


def public_name(source: str) -> str:
    """A source as others may see it: a Hub id as it is, a local file or folder without its path."""
    return Path(source).expanduser().resolve().name if is_local(source) else source


def public(text: str) -> str:
    """Text in which absolute paths are cut to their last part: a report is shared, this machine's folders are not."""
    return re.sub(r"(?<![\w:/\\.])(?:~|[A-Za-z]:)?[\\/](?:[^\s\\/'\"`]+[\\/])*([^\s\\/'\"`]*)", r"\1", text)


def public_source(source: str) -> str:
    """A model's or prompt set's source: a Hub id as it is, a file or folder without its path."""
    if re.match(r"[~.\\/]|[A-Za-z]:[\\/]", source) or source.count("/") > 1 or Path(source).is_file():
        return re.split(r"[\\/]", source.rstrip("\\/"))[-1] or "model"
    return source
