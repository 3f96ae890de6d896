"""What models and files are called where others read it: no path of this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

_ADDRESS = re.compile(r"hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
UNSEEN = "\u200b\u200c\u200d\u2060\ufeff\u00a0 \t\r\n"  # what pages put around a name that is copied from them
DEMO_FOLDER = "demo-model-"  # with a hash behind it: the demo model's folder in the cache


def is_demo(name: str) -> bool:
    """Whether a public name is the demo model's, which the command line calls "demo"."""
    return name.startswith(DEMO_FOLDER)


def is_local(source: str) -> bool:
    """Whether a source is a file or folder of this machine."""
    return Path(source).expanduser().exists()


def public_name(source: str) -> str:
    """A source as others may see it: a Hub id as it is, a local file or folder without its path."""
    path = Path(source).expanduser()
    if not path.exists():
        return source
    return path.resolve().name if path.is_file() or path.is_dir() else "pipe"  # whose number is another each time


def public(text: str) -> str:
    """Text in which absolute paths are cut to their last part: a report is shared, this machine's folders are not."""
    return re.sub(r"(?<![\w:/\\.])(?:~|[A-Za-z]:)?[\\/](?:[^\s\\/'\"`]+[\\/])*([^\s\\/'\"`]*)", r"\1", text)


def public_source(source: str) -> str:
    """A model's or prompt set's source: a Hub id as it is, a file or folder without its path."""
    if re.match(r"[~.\\/]|[A-Za-z]:[\\/]", source) or source.count("/") > 1 or Path(source).is_file():
        return re.split(r"[\\/]", source.rstrip("\\/"))[-1] or "model"
    return source


def pasted(text: str) -> str:
    """A name as it was meant, without the quotes and brackets that are copied with it, or a file's address."""
    text = text.strip(UNSEEN)
    while len(text) > 1 and text[0] + text[-1] in ("''", '""', "``", "<>", "‘’", "“”"):
        text = text[1:-1].strip(UNSEEN)
    return unquote(text.removeprefix("file://")) if text.startswith("file:///") else text


class HubName(NamedTuple):
    """A Hub id as it was typed or pasted: the id, the revision named with it, and what followed the id."""

    id: str
    revision: str | None = None
    rest: tuple[str, ...] = ()


def is_address(text: str) -> bool:
    """Whether a text is an address of the Hub's, as browsers show it."""
    return _ADDRESS.match(pasted(text)) is not None


def hub_name(text: str, kind: str = "models") -> HubName:
    """What a text means as the name of a model or data set of the Hub.

    Args:
        text: "org/name", "org/name@revision", or an address: "https://huggingface.co/org/name/tree/main", "hf.co/...".
        kind: "models" or "datasets": a word that addresses have before the id.

    Example:
        >>> hub_name(" https://huggingface.co/org/name/tree/main?library=peft ")
        HubName(id='org/name', revision='main', rest=())
    """
    text = pasted(text)
    address = _ADDRESS.match(text)
    if address:
        text = unquote(re.split(r"[?#]", text[address.end() :])[0]).removesuffix(".git")
    text, _, revision = text.partition("@")
    parts = [part for part in text.split("/") if part]
    if parts[:1] == [kind] and (address or len(parts) > 2):
        parts = parts[1:]
    name, rest = "/".join(parts[:2]), tuple(parts[2:])
    if address and rest[:1] in (("tree",), ("commit",)):
        revision, rest = revision or "/".join(rest[1:]), ()
    return HubName(name, revision.strip("/") or None, rest)
