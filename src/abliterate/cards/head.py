"""The YAML head of a card, which the Hub reads: written, read, and filled with what the base model says of itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abliterate.common.names import is_local, public_name

KEPT_KEYS = ("license", "license_name", "license_link", "language")
_HEAD = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---[^\S\n]*(?:\n|\Z)", re.DOTALL)


def head(metadata: dict[str, Any]) -> str:
    """The head, with its marks."""
    import yaml

    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}\n---\n"


def split(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text; a head that can't be read is left in the text."""
    import yaml

    match = _HEAD.match(card)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        found = None
    return (found, card[match.end() :]) if match and isinstance(found, dict) else ({}, card)


def of_model(source: str, upstream: dict[str, Any], tags: Sequence[str]) -> dict[str, Any]:
    """Metadata of a model made from another: which one, its licence and languages (`find_upstream`)."""
    name = public_name(source)
    return {
        "base_model": upstream.get("base_model", name) if is_local(source) else name,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(tags),
        **{key: value for key, value in upstream.items() if key in KEPT_KEYS},
    }


def below(text: str, name: str, body: str) -> str:
    """A card with the base model's own kept below it."""
    return f"{text}\n# The card of {name}\n\n{body.strip()}\n" if body.strip() else text


def find_upstream(source: str, revision: str | None = None) -> tuple[dict[str, Any], str]:
    """What the base model says of itself: licence, languages, for a local copy the model it is of; and its card's text.

    Read from its own card, or from its GGUF header; empty when unknown.
    """
    path = Path(source).expanduser()
    if path.is_dir() and (path / "README.md").is_file():
        text = (path / "README.md").read_text(encoding="utf-8", errors="replace")
    elif path.is_file():
        return _gguf_licence(path), ""
    elif path.exists():
        return {}, ""
    else:
        text = _hub_card(source, revision)
    metadata, body = split(text)
    return {key: metadata[key] for key in (*KEPT_KEYS, "base_model") if metadata.get(key)}, body


def _gguf_licence(path: Path) -> dict[str, str]:
    from abliterate.models.gguf.file import open_gguf

    licence = open_gguf(path, part=True).metadata.get("general.license")
    return {"license": str(licence)} if licence else {}


def _hub_card(source: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(source, "README.md", revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return ""  # no card, or no network: the licence is unknown, and the card leaves it out
    return Path(file).read_text(encoding="utf-8", errors="replace")
