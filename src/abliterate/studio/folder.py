"""The chosen folder: nothing outside it is read or written for the page, symbolic links resolved."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from abliterate.common.errors import AbliterateError, OutputError, RecipeError, shorten
from abliterate.common.names import public
from abliterate.edit.recipe import KEY, MOST_BYTES
from abliterate.measure.document import load_document

PROMPT_SUFFIXES = (".txt", ".jsonl", ".csv")
MOST_PROMPT_BYTES = 10 * 10**6
DEPTH = 3
MOST_LISTED = 200
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_PROMPT_SET = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?(:[\w.\[\]%-]{1,60}){0,2}")


class Folder:
    """What the page may touch.

    Args:
        root: the chosen folder.
        granted: sources named on the command line, by the name the page shows: whoever started the studio chose them,
            wherever they are.

    Raises:
        AbliterateError: when there is no such folder.
    """

    def __init__(self, root: str | os.PathLike[str], granted: Mapping[str, str] | None = None) -> None:
        self.root = Path(root).expanduser().resolve()
        self.granted = dict(granted or {})
        if not self.root.is_dir():
            raise AbliterateError(f"folder {root} not found; name one with --folder")

    def within(self, name: str) -> Path:
        """The path of this name, relative to the folder or absolute, links resolved.

        Raises:
            AbliterateError: when it lies outside, also by way of a link.
        """
        text = name.strip()
        if not text or not text.isprintable():
            raise AbliterateError("a name is missing; type one, relative to the studio's folder")
        if len(text) > 1000 or any(len(part.encode()) > 255 for part in text.split("/")):
            raise AbliterateError(f"{shorten(text)} is too long for a name")
        try:
            path = (self.root / text).resolve()
        except (OSError, RuntimeError) as error:  # links in a circle
            raise AbliterateError(f"{shorten(text)} is no path that can be followed") from error
        if not path.is_relative_to(self.root):
            raise AbliterateError(f"{shorten(text)} is outside the studio's folder; start it with another --folder")
        return path

    def shown(self, path: Path) -> str:
        """A path as the page shows it."""
        return path.relative_to(self.root).as_posix()

    def public(self, text: str) -> str:
        """A text for those who use the page: paths in the folder relative to it, others cut to their last part."""
        for name, source in self.granted.items():
            if os.path.isabs(source):
                text = text.replace(source, name)
        return public(text.replace(f"{self.root}{os.sep}", "").replace(str(self.root), "the folder"))

    def output(self, name: str, suffix: str = "") -> Path:
        """Where a new file or folder goes; `suffix` is added when it has none.

        Raises:
            OutputError: when it is the folder itself or hidden.
            AbliterateError: when it lies outside.
        """
        path = self.within(name)
        if path == self.root or any(part.startswith(".") for part in path.relative_to(self.root).parts):
            raise OutputError(
                f"{shorten(name)} can't be written from the page; name a file or folder that isn't hidden"
            )
        if suffix and path.suffix != suffix:
            path = path.with_name(path.name + suffix)
            path = self.within(str(path))  # the longer name may be a link of its own
        return path

    def recipe(self, name: str) -> Path:
        """A recipe's file, or that in a run's folder.

        Raises:
            RecipeError: when it isn't there or isn't a .safetensors file.
        """
        if name in self.granted:
            return Path(self.granted[name])
        path = self.within(name)
        if path.is_dir():
            path = self.within(str(path / "recipe.safetensors"))
        check_upload(path, (".safetensors",), MOST_BYTES)
        return path

    def prompts(self, source: str) -> str:
        """A source of prompts as `abliterate run` takes it: a file in the folder, or a name or Hub id.

        Raises:
            AbliterateError: when it is neither.
        """
        text = source.strip()
        file, colon, column = text.partition(":")
        path = self.within(file)
        if path.suffix in PROMPT_SUFFIXES or path.exists():
            check_upload(path, PROMPT_SUFFIXES, MOST_PROMPT_BYTES)
            return f"{path}{colon}{column}"
        if not _PROMPT_SET.fullmatch(text) or ".." in text:
            raise AbliterateError(
                f"prompts {shorten(text)} are no {', '.join(PROMPT_SUFFIXES)} file here, nor a data set's id"
            )
        return text

    def model(self, name: str) -> str:
        """A model's source: a folder or GGUF file in the folder, one named on the command line, or a Hub id.

        Raises:
            AbliterateError: when it lies outside, or its files lead there.
        """
        text = name.strip()
        if text in self.granted:
            return self.granted[text]
        path = self.within(text)
        if path.exists():
            self._check_leads_inside(path)
            return str(path)
        # a path that is there for the process, but not in the folder, would be read in place of the Hub's
        if not _HUB_ID.fullmatch(text) or ".." in text or Path(text).exists():
            raise AbliterateError(f"model {shorten(text)} is not in the studio's folder, and no Hub id")
        return text

    def run(self, name: str) -> Path:
        """A folder that `abliterate run` wrote.

        Raises:
            AbliterateError: when it isn't one, or its results name recipes elsewhere.
        """
        path = self.within(name)
        results = self.within(str(path / "results.json"))
        try:
            document = load_document(results)
        except AbliterateError:
            raise AbliterateError(f"{shorten(name)} holds no results of `abliterate run`") from None
        recipes = [point.recipe for point in document.frontier if point.recipe]
        for file in ("recipe.safetensors", *recipes, "report-data.json", "report.html"):
            self.within(str(path / file))
        return path

    def _check_leads_inside(self, path: Path) -> None:
        """Raise when a model's files lead out of the folder: by links, an index, or an adapter's base."""
        for file in path.rglob("*") if path.is_dir() else ():
            if file.is_symlink():
                self.within(str(file))
        if (path / "adapter_config.json").exists():
            raise AbliterateError(f"model {self.shown(path)} is an adapter on another model; merge it first")
        for index in path.glob("*.index.json") if path.is_dir() else ():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                plain = all(Path(name).name == name for name in names)
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                plain = False
            if not plain:
                raise AbliterateError(f"model {self.shown(path)}: {index.name} names files that aren't beside it")

    def models(self) -> list[str]:
        """What can be loaded: what was named on the command line, then model folders and GGUF files found here."""
        found = [
            self.shown(entry) for entry in self._entries()
            if entry.suffix.lower() == ".gguf" or (entry / "config.json").is_file()
        ]  # fmt: skip
        return [*(name for name in self.granted if not name.endswith(".safetensors")), *found]

    def recipes(self) -> list[str]:
        """The recipes here, by their header: weights are .safetensors files too."""
        found = [entry for entry in self._entries() if entry.suffix == ".safetensors" and _is_recipe(entry)]
        return [*(name for name in self.granted if name.endswith(".safetensors")), *map(self.shown, found)]

    def runs(self) -> list[str]:
        """The folders that `abliterate run` wrote, the newest first."""
        found = [entry for entry in self._entries() if (entry / "results.json").is_file()]
        return [self.shown(path) for path in sorted(found, key=lambda path: -path.stat().st_mtime)]

    def run_of(self, recipe: str) -> str | None:
        """The run in whose folder a recipe lies; None where it lies in none."""
        try:
            above = self.recipe(recipe).resolve().parents
        except AbliterateError:
            return None
        return next((run for run in self.runs() if (self.root / run).resolve() in above), None)

    def _entries(self) -> Iterator[Path]:
        """Files and folders that aren't hidden, to some depth and number; links are left out."""
        given = 0
        for top, folders, files in os.walk(self.root):
            here = Path(top)
            deep = len(here.relative_to(self.root).parts) >= DEPTH
            folders[:] = [] if deep else sorted(n for n in folders if n[0] not in "._" and not (here / n).is_symlink())
            for name in (*folders, *sorted(files)):
                if given >= MOST_LISTED * 20:
                    return
                given += 1
                if not name.startswith(".") and not (here / name).is_symlink():
                    yield here / name


def check_upload(path: Path, suffixes: tuple[str, ...], most_bytes: int) -> None:
    """Raise RecipeError or AbliterateError when a file isn't there, is of another type, or is too large."""
    kind: type[AbliterateError] = RecipeError if suffixes == (".safetensors",) else AbliterateError
    if path.suffix.lower() not in suffixes:
        raise kind(f"{shorten(path.name)} is not a {' or '.join(suffixes)} file")
    if not path.is_file():
        raise kind(f"{shorten(path.name)} is not in the studio's folder")
    if path.stat().st_size > most_bytes:
        raise kind(f"{shorten(path.name)} has {path.stat().st_size:,} bytes; at most {most_bytes:,} are taken")


def _is_recipe(path: Path) -> bool:
    """Whether a safetensors file's header says it is a recipe; nothing else of it is read."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return False
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return length < MOST_BYTES and f'"{KEY}"'.encode() in file.read(length)
    except OSError:
        return False
