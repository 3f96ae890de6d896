"""What can be benchmarked: models, adapters and recipes; how each is opened, and by what it is known again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.apply.hooks import attached
from abliterate.apply.weights import bake
from abliterate.common.errors import AbliterateError, ModelError
from abliterate.common.files import sha256_of
from abliterate.models.pretrained import from_pretrained, with_adapter

if TYPE_CHECKING:
    from abliterate.models.handle import Handle
    from abliterate.settings.run import LoadSettings


@dataclass(frozen=True)
class Contestant:
    """A column of the table.

    Attributes:
        label: the column's name.
        source: Hub id, folder or GGUF file of the model.
        recipe: recipe file applied to it.
        adapter: folder of a PEFT adapter attached to it.
    """

    label: str
    source: str
    recipe: Path | None = None
    adapter: Path | None = None

    @property
    def place(self) -> Path | None:
        """The local folder that a card can be written into."""
        if self.recipe:
            return None
        folder = self.adapter or Path(self.source).expanduser()
        return folder if folder.is_dir() else None


def contestants(models: Sequence[str], recipes: Sequence[str] = ()) -> list[Contestant]:
    """Columns out of what the command line names.

    Args:
        models: each a model, a PEFT adapter's folder or a recipe's file, with a label before an equals sign or
            without. The first is the reference, and what adapters and recipes belong to.
        recipes: recipe files, labelled or not; each is a column after the models.

    Raises:
        AbliterateError: when the first is a recipe, or two columns have one label.
    """
    found: list[Contestant] = []
    base = ""
    for text in (*models, *recipes):
        label, place = _labelled(text)
        path = Path(place).expanduser()
        if path.suffix == ".safetensors":
            if not found:
                raise AbliterateError(f"{place} is a recipe; name the model it is for first")
            if not path.is_file():
                raise AbliterateError(f"recipe {place} not found")
            found.append(Contestant(label or path.stem, base, recipe=path))
        elif (path / "adapter_config.json").is_file():
            base = base or _base_of(path)
            found.append(Contestant(label or path.name, base, adapter=path))
        else:
            base = base or place
            found.append(Contestant(label or _name(place), place))
    labels = [contestant.label for contestant in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise AbliterateError(f"two columns are called '{twice}'; give them names: original=MODEL edited=MODEL")
    return found


def _labelled(text: str) -> tuple[str, str]:
    """("NAME", "PATH") of NAME=PATH; ("", text) where there is no name, or where the whole is a path."""
    label, equals, place = text.partition("=")
    if not equals or Path(text).expanduser().exists() or "/" in label:
        return "", text
    if not label.strip() or not place:
        raise AbliterateError(f"'{text}' should look like NAME=MODEL")
    return label.strip(), place


def _name(source: str) -> str:
    path = Path(source).expanduser()
    name = (path.resolve() if path.exists() else path).name.removesuffix(".gguf")
    # the folder `abliterate run` makes of a model is called model, its parent says of which
    return path.resolve().parent.name if name == "model" and path.exists() else name


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError):
        base = None
    if not base:
        raise AbliterateError(f"adapter {adapter} doesn't say which model it is for; name that model first")
    return str(base)


@contextmanager
def opened(contestant: Contestant, settings: LoadSettings, *, force: bool = False) -> Iterator[Handle]:
    """The contestant loaded: a recipe baked in (attached live where the weights are quantised), an adapter attached.

    Raises:
        ModelError: the model or the adapter can't be loaded.
        RecipeError: the recipe is for another model.
    """
    from abliterate.edit.recipe import check_model, load_recipe
    from abliterate.run.opening import open_model

    recipe = load_recipe(contestant.recipe) if contestant.recipe else None
    handle = open_model(contestant.source, settings)
    if contestant.adapter:
        _attach_adapter(handle, contestant.adapter)
    if recipe is None:
        yield handle
        return
    check_model(recipe, handle.config_hash, force=force)
    if handle.quantised:
        with attached(handle, recipe.edit):
            yield handle
    else:
        bake(handle, recipe.edit)
        yield handle


def _attach_adapter(handle: Handle, folder: Path) -> None:
    """Put a PEFT adapter into the model's layers, beside the weights: merging would round it to their type."""
    try:
        with_adapter(handle.model, folder).eval().requires_grad_(False)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise ModelError(f"adapter {folder} doesn't fit {handle.source}: {text}") from error


def fingerprint(contestant: Contestant, settings: LoadSettings) -> str:
    """Sha256 of everything that decides what the model answers: weights, config, tokenizer, adapter, recipe.

    Of a local model, its files' bytes; of one on the Hub, its id and commit.
    """
    digest = hashlib.sha256()
    digest.update(_source_hash(contestant.source, settings).encode())
    if contestant.recipe:
        digest.update(b"recipe" + _file_hash(contestant.recipe).encode())
    if contestant.adapter:
        digest.update(b"adapter" + _folder_hash(contestant.adapter).encode())
    return digest.hexdigest()


def _source_hash(source: str, settings: LoadSettings) -> str:
    path = Path(source).expanduser()
    if path.is_file():
        return _file_hash(path)
    if path.is_dir():
        return _folder_hash(path)
    from transformers import AutoConfig

    try:
        config = from_pretrained(
            AutoConfig, source, revision=settings.revision or "main", trust_remote_code=settings.trust_remote_code
        )
    except Exception:
        return f"{source}@{settings.revision}"  # loading will say what is wrong
    return f"{source}@{getattr(config, '_commit_hash', None) or settings.revision}"


def _folder_hash(folder: Path) -> str:
    """Of the files that models and adapters are made of, not of cards and logs beside them."""
    kept = re.compile(r".*\.(safetensors|gguf|json|jinja|model|txt|py)")
    files = sorted(p for p in folder.iterdir() if p.is_file() and kept.fullmatch(p.name))
    return hashlib.sha256("".join(f"{p.name}\0{_file_hash(p)}\n" for p in files).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error


def has_template(source: str, settings: LoadSettings) -> bool:
    """Whether a model's tokenizer has a chat template; the weights aren't read.

    Raises:
        ModelError: the tokenizer can't be loaded.
    """
    path = Path(source).expanduser()
    if path.is_file():
        from abliterate.models.gguf.file import open_gguf

        return "tokenizer.chat_template" in open_gguf(path, part=True).metadata
    from transformers import AutoTokenizer

    try:
        tokenizer = from_pretrained(
            AutoTokenizer,
            str(path) if path.is_dir() else source,
            revision=settings.revision or "main",
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as error:
        raise ModelError(f"the tokenizer of {source} can't be loaded: {' '.join(str(error).split())[:200]}") from error
    return bool(tokenizer.chat_template)


def describe(contestant: Contestant) -> dict[str, Any]:
    """What results say of a column; of local files the name alone."""
    from abliterate.common.names import public_name

    return {
        "label": contestant.label,
        "source": public_name(contestant.source),
        "recipe": contestant.recipe.name if contestant.recipe else None,
        "adapter": contestant.adapter.name if contestant.adapter else None,
    }
