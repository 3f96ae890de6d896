"""Recipes to share: listed and fetched from a repository of the Hub, a folder, a file or an address; hashes checked."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from abliterate.common.errors import RecipeError, shorten
from abliterate.common.files import whole_file
from abliterate.edit.recipe import MOST_BYTES, Recipe, load_recipe
from abliterate.publish.hub import HubError

SUFFIX = ".safetensors"


class Entry(NamedTuple):
    """A recipe of a gallery.

    Attributes:
        name: its path in the repository or folder.
        place: the file, or its address.
        sha256: as the Hub has it; None where nobody said.
        hub: whether the token goes with the request.
    """

    name: str
    place: str
    sha256: str | None = None
    hub: bool = False


def entries(source: str) -> list[Entry]:
    """The files that may be recipes.

    Args:
        source: USER/NAME of the Hub, a folder, a file, or an https address.

    Raises:
        RecipeError: when there are none.
        HubError: when the Hub can't be asked.
    """
    path = Path(source).expanduser()
    if source.startswith(("https://", "http://127.0.0.1")):
        return [Entry(source.rsplit("/", 1)[-1], source)]
    if path.is_file():
        return [Entry(path.name, str(path))]
    if path.is_dir():
        files = [file for file in sorted(path.rglob(f"*{SUFFIX}")) if file.stat().st_size <= MOST_BYTES]
        found = [Entry(str(file.relative_to(path)), str(file)) for file in files]
    else:
        found = list(_of_hub(source))
    if not found:
        raise RecipeError(f"{source} holds no recipes: no {SUFFIX} file of at most {MOST_BYTES:,} bytes")
    return found


def _of_hub(repo: str) -> Iterator[Entry]:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        for file in HfApi().list_repo_tree(repo, recursive=True):
            size = getattr(file, "size", None)
            if size is not None and file.path.endswith(SUFFIX) and size <= MOST_BYTES:
                lfs = getattr(file, "lfs", None)
                yield Entry(file.path, hf_hub_url(repo, file.path), lfs.sha256 if lfs else None, True)
    except HFValidationError as error:
        raise RecipeError(f"{repo} is neither a file or folder here nor USER/NAME of the Hub") from error
    except Exception as error:  # huggingface_hub lets through what its HTTP library raises, each another
        raise HubError(f"the Hub doesn't list {repo}: {shorten(str(error), 200)}; is it its name?") from error


def fetched(entry: Entry, sha256: str | None = None) -> tuple[bytes, Recipe]:
    """A recipe's bytes, and what they say.

    Args:
        entry: of `entries`.
        sha256: what its hash must be, or begin with, besides what the Hub says.

    Raises:
        RecipeError: when its hash is another, or it isn't a recipe.
        HubError: when it can't be had.
    """
    data = _read(entry)
    found = hashlib.sha256(data).hexdigest()
    for wanted in (sha256, entry.sha256):
        if wanted and not found.startswith(wanted.lower()):
            raise RecipeError(f"{entry.name} has sha256 {found}, wanted is {wanted}; it isn't the file that was meant")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(entry.name).name
        file.write_bytes(data)
        return data, load_recipe(file)


def _read(entry: Entry) -> bytes:
    if "://" not in entry.place:
        return Path(entry.place).read_bytes()
    import requests
    import urllib3
    from huggingface_hub.utils import build_hf_headers

    try:
        headers = build_hf_headers() if entry.hub else {}
        with requests.get(entry.place, headers=headers, timeout=60, stream=True) as reply:
            reply.raise_for_status()
            data = reply.raw.read(MOST_BYTES + 1, decode_content=True)
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise HubError(f"{entry.name} can't be fetched: {shorten(str(error), 200)}") from error
    if len(data) > MOST_BYTES:
        raise RecipeError(f"{entry.name} is larger than a recipe may be: {MOST_BYTES:,} bytes")
    return bytes(data)


def described(entry: Entry, data: bytes, recipe: Recipe) -> dict[str, Any]:
    """What a gallery says of a recipe: name, bytes, sha256, the model it is for, and what was measured."""
    about, numbers = recipe.model, recipe.provenance
    rates = {state: (numbers.get(state) or {}).get("refusal") for state in ("original", "edited")}
    return {
        "name": entry.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
        "model": about.get("source"), "config_hash": about.get("config_hash"),
        "weights_hash": about.get("weights_hash"), "refusal": rates,
    }  # fmt: skip


def keep(data: bytes, out: Path) -> None:
    """Write a recipe that was fetched."""
    with whole_file(out) as temporary:
        temporary.write_bytes(data)
