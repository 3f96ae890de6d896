"""What of a folder or file goes to the Hub: found, checked to be whole, and free of what should not be published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.common.errors import ModelError, OutputError, RecipeError, shorten

INDEX = "model.safetensors.index.json"
# Half-written: by files.py, by downloads, by editors.
TEMPORARY = re.compile(r"(\.tmp|\.old|\.part|\.partial|\.incomplete|\.crdownload|\.lock|~)$")
# May hold answers, or code that runs when it is read; no part of a model's safetensors.
LEFT_OUT = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"), "a pickle"),
    **dict.fromkeys((".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".db", ".html", ".log"), "may hold answers"),
}
ANSWERS = frozenset({
    "completion", "completions", "answer", "answers", "response", "responses", "reply", "replies", "output", "outputs",
    "generation", "generations", "generated", "generated_text", "transcript", "transcripts",
})  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A file to send: where it goes, and a file here or its bytes."""

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass
class Parcel:
    """What a push sends.

    Attributes:
        kind: "model", "adapter", "recipe" or "gguf".
        items: the files, in the order of their names.
        left_out: (name, why) of files beside them that stay here.
        notes: what whoever pushes should know.
        made_card: whether README.md was made for this push, so that one on the Hub is better.
    """

    kind: str
    items: list[Item]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    made_card: bool = False

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items)


def pack(path: Path) -> Parcel:
    """Find what to send of a path, and check it.

    Args:
        path: what `abliterate run` wrote (its model, recipe and results go), a model folder, an adapter folder, a
            folder of GGUF files, a recipe or a GGUF file.

    Returns:
        The parcel. A recipe or GGUF without README.md gets a card made for it.

    Raises:
        OutputError: when there is nothing to send, something is missing, damaged or half-written, or a file holds
            answers of a model; the text names the file.
    """
    path = path.expanduser()
    if path.is_file():
        parcel = _of_file(path)
    elif path.is_dir():
        parcel = _of_folder(path)
    else:
        raise OutputError(f"{path} not found; name a model, adapter or output folder, a recipe or a GGUF file")
    parcel.items.sort(key=lambda item: item.path)
    for item in parcel.items:
        _check_answers(item)
    parcel.notes += _local_paths(parcel.items)
    if not any(item.path == "README.md" for item in parcel.items):
        parcel.notes.append("there is no README.md, so the repository gets no card")
    return parcel


def _of_file(path: Path) -> Parcel:
    if path.suffix.lower() not in (".gguf", ".safetensors"):
        raise OutputError(f"{path} is neither a recipe (.safetensors) nor a GGUF file; name one, or a folder")
    parcel = Parcel("gguf" if path.suffix.lower() == ".gguf" else "recipe", [Item(path.name, path)])
    _add_card(parcel, [path])
    return parcel


def _of_folder(folder: Path) -> Parcel:
    names = {p.name for p in folder.iterdir()}
    if "model" in names and "recipe.safetensors" in names:
        return _of_run(folder)
    parcel = _everything_in(folder)
    files = {item.path for item in parcel.items}
    if "adapter_config.json" in names:
        parcel.kind = "adapter"
        _check_adapter(folder, files)
    elif any(f.endswith(".gguf") for f in files) and not any(f.endswith(".safetensors") for f in files):
        parcel.kind = "gguf"
        _add_card(parcel, [folder / file for file in sorted(files) if file.endswith(".gguf")])
    elif "recipe.safetensors" in names and "config.json" not in names and not (names & {"model.safetensors", INDEX}):
        parcel.kind = "recipe"
        _add_card(parcel, [folder / "recipe.safetensors"])
    else:
        _check_model(folder, files)
        if not files & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}:
            parcel.notes.append("there is no tokenizer in it; those who load it need the base model's")
    return parcel


def _add_card(parcel: Parcel, paths: list[Path]) -> None:
    """Make a card for a recipe or for GGUF files, from the header of the first, where there is none.

    Raises:
        OutputError: when one of them is damaged or something else.
    """
    from abliterate.cards.others import gguf_card, recipe_card
    from abliterate.models.gguf.file import open_gguf

    if any(item.path == "README.md" for item in parcel.items):
        return
    if parcel.kind == "recipe":
        text = recipe_card(_recipe_of(paths[0]), paths[0].name)
    else:
        try:
            headers = [open_gguf(path, part=True).metadata for path in paths]
        except ModelError as error:
            raise OutputError(str(error)) from error
        text = gguf_card(paths[0], headers[0])
    parcel.items.append(Item("README.md", text.encode()))
    parcel.made_card = True


def _of_run(folder: Path) -> Parcel:
    """The output folder of `run`: its model at the top, with the recipe and the results beside it."""
    parcel = _of_folder(folder / "model")
    _recipe_of(folder / "recipe.safetensors")
    parcel.items.append(Item("recipe.safetensors", folder / "recipe.safetensors"))
    if (folder / "results.json").is_file():
        parcel.items.append(Item("results.json", _without_paths(folder / "results.json")))
    sent = {"model", "recipe.safetensors", "results.json"}
    for path in sorted(folder.iterdir()):
        if path.name not in sent:
            _check_temporary(path, folder)
            parcel.left_out.append((path.name, "not part of the model"))
    return parcel


def _everything_in(folder: Path) -> Parcel:
    parcel = Parcel("model", [])
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        _check_temporary(path, folder)
        if not path.is_file():
            continue
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
        why = "hidden" if hidden and name != ".gitattributes" else LEFT_OUT.get(path.suffix.lower())
        if why:
            parcel.left_out.append((name, why))
        else:
            parcel.items.append(Item(name, path))
    return parcel


def _check_temporary(path: Path, folder: Path) -> None:
    if TEMPORARY.search(path.name) and ".cache" not in path.relative_to(folder).parts:
        raise OutputError(
            f"{folder} looks incomplete: {path.name} is half-written; finish what writes it, or remove it"
        )


def _check_model(folder: Path, files: set[str]) -> None:
    """Raise unless config and all weights are there and whole."""
    if "config.json" not in files:
        raise OutputError(
            f"{folder} looks incomplete: there is no config.json in it (nor a recipe, an adapter or a GGUF file)"
        )
    _read_json(folder / "config.json")
    weights = {f for f in files if f.endswith(".safetensors")}
    if INDEX in files:
        index = _read_json(folder / INDEX)
        shards = set(index.get("weight_map", {}).values()) if isinstance(index.get("weight_map"), dict) else set()
        missing = sorted(shards - weights)
        if missing or not shards:
            lacks = missing[0] if missing else f"{INDEX} has no weight_map"
            raise OutputError(f"{folder} looks incomplete: {lacks} is missing" if missing else f"{folder}: {lacks}")
    elif "model.safetensors" not in weights:
        raise OutputError(f"{folder} looks incomplete: there are no weights (model.safetensors or {INDEX}) in it")
    for name in sorted(weights):
        _check_whole(folder / name)


def _check_adapter(folder: Path, files: set[str]) -> None:
    if "adapter_model.safetensors" not in files:
        raise OutputError(f"{folder} looks incomplete: there is no adapter_model.safetensors in it")
    _read_json(folder / "adapter_config.json")
    _check_whole(folder / "adapter_model.safetensors")


def _check_whole(path: Path) -> None:
    """Raise unless a safetensors file has all the bytes its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise OutputError(f"{path} is damaged or half-written ({shorten(str(error))}); write it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} is damaged ({shorten(str(error))}); write it again") from error
    if not isinstance(document, dict):
        raise OutputError(f"{path} is damaged: it holds no JSON object; write it again")
    return document


def _recipe_of(path: Path) -> Any:
    from abliterate.edit.recipe import load_recipe

    try:
        return load_recipe(path)
    except RecipeError as error:
        raise OutputError(f"{error}; only recipes, models, adapters and GGUF files are pushed") from error


def _check_answers(item: Item) -> None:
    """Raise when a JSON file holds texts under a name that answers go by."""
    if not item.path.endswith(".json") or item.path.startswith("tokenizer") or item.path == INDEX:
        return
    content = item.content if isinstance(item.content, bytes) else item.content.read_bytes()
    try:
        document = json.loads(content)
    except ValueError as error:
        raise OutputError(f"{item.path} is damaged ({shorten(str(error))}); write it again") from error
    for key in _keys_of_texts(document):
        if key.lower() in ANSWERS:
            raise OutputError(
                f"{item.path} holds texts under '{key}', which look like answers of a model; "
                "completions to harmful prompts are not published: remove them first"
            )


def _keys_of_texts(value: Any) -> Iterator[str]:
    """Every key, at any depth, whose value is a text or a list with one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            texts = inner if isinstance(inner, list) else [inner]
            if any(isinstance(text, str) and text for text in texts):
                yield key
            yield from _keys_of_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys_of_texts(inner)


def _without_paths(path: Path) -> bytes:
    """A JSON file's content, where files and folders of this machine go by their names alone."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [named(inner) for inner in value]
        return Path(value).name if isinstance(value, str) and _is_local_path(value) else value

    return (json.dumps(named(_read_json(path)), indent=2) + "\n").encode()


def _is_local_path(text: str) -> bool:
    return text.startswith(("/", "~")) and len(text) < 4096 and "\n" not in text and len(Path(text).parts) > 1


def _local_paths(items: Iterable[Item]) -> list[str]:
    """Notes on files that tell a path of this machine."""
    notes = []
    for item in items:
        if item.path in ("config.json", "adapter_config.json", "generation_config.json") and isinstance(
            item.content, Path
        ):
            for key, value in _read_json(item.content).items():
                if isinstance(value, str) and _is_local_path(value):
                    notes.append(f"{item.path} names {key} by a path of this machine ({value}); a Hub id is better")
    return notes
