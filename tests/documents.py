"""What every results.json that a job writes must be."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from abliterate.measure.document import RunDocument, SettingsUsed, load_document


def check_document(file: Path) -> RunDocument:
    """A results.json read with the types: it comes out as it went in, and the types know each of its fields."""
    document = load_document(file)
    assert document.to_json() == json.loads(file.read_text())
    assert not unknown(document), unknown(document)
    return document


def unknown(part: object, where: str = "") -> list[str]:
    """The fields that the types don't know; settings and what a preset of healing adds are open."""
    if isinstance(part, list):
        return [name for one in part for name in unknown(one, where)]
    if not isinstance(part, BaseModel) or where in ("settings.measure", "heal", "behaviour", "behaviour.words"):
        return []
    extra = [] if isinstance(part, SettingsUsed) else [f"{where}.{name}" for name in part.model_extra or {}]
    inner = [
        name for key in type(part).model_fields for name in unknown(getattr(part, key), f"{where}.{key}".strip("."))
    ]
    return [*extra, *inner]
