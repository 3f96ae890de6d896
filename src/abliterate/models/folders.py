"""Where a model's files are: the folder, the Hub's snapshot or the converted GGUF that everything is read from."""

from __future__ import annotations

import re
from pathlib import Path

from abliterate.common.errors import ModelError, shorten
from abliterate.common.names import hub_name, is_address, is_local, pasted

_DESCRIBING = (
    "*.json", "*.txt", "*.md", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.bpe", "LICENSE*", "LICENCE*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?/?(?:@\S+)?")
_OTHERS = {"datasets": "data set", "spaces": "space"}  # what the Hub has besides models, by how their addresses go on


def meant(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """A model's source and revision as they were meant: of a pasted address or `org/name@revision` the Hub id.

    Args:
        source: as for `model_folder`; what is here, or is no Hub id, stays as it is.
        revision: given apart.

    Raises:
        ModelError: when the address is of one file of a model, or two revisions are named.
    """
    if is_local(source) or not (is_address(source) or _ID.fullmatch(pasted(source))):
        return source, revision
    found = hub_name(source)
    kind, _, name = found.id.partition("/")
    if found.rest and kind in _OTHERS:
        raise ModelError(
            f"model {source.strip()} is the address of a {_OTHERS[kind]}, not of a model"
            + (f"; for prompts, give --target {'/'.join((name, *found.rest))}" if kind == "datasets" else "")
        )
    if found.rest:
        raise ModelError(
            f"model {source.strip()} is the address of a file or page; give the model's id, {found.id}, or, for a "
            "GGUF, download the file (hf download) and give its path"
        )
    if revision and found.revision not in (None, revision):
        raise ModelError(f"model {source.strip()} names the revision {found.revision}, and --revision {revision}")
    return found.id, revision or found.revision


def check_here(source: str) -> None:
    """Raise ModelError when a source names a file or folder that isn't there, or holds no model; asks no network."""
    path = Path(source).expanduser()
    if not source.strip():
        raise ModelError("the model's name is empty; give a model folder, a GGUF file or a Hub id")
    if path.is_dir():
        _weights_in(path, source)
    elif path.is_file() and path.suffix.lower() != ".gguf":
        raise ModelError(f"model {source} is a file, but not a .gguf; give a model folder, a GGUF file or a Hub id")
    elif not path.exists() and not _ID.fullmatch(name := meant(source)[0]):
        if re.fullmatch(r"[\w.-]+/[\w.-]+:\S+", name):
            problem = "a revision is written org/name@revision, and of a GGUF on the Hub the downloaded file is given"
        elif "://" in source:
            problem = "it is no address of a model on the Hugging Face Hub; give org/name, or a folder"
        else:
            problem = "no such file or folder; check the path"
        raise ModelError(f"model {source} not found: {problem}")
    elif not path.exists() and source.lower().endswith(".gguf"):
        raise ModelError(f"model {source} not found: no such file or folder; check the path")


def is_described(source: str) -> bool:
    """Whether a source is a folder with a model's config and no weights of any kind."""
    path = Path(source).expanduser()
    weights = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth", "*.ckpt")
    return (path / "config.json").is_file() and not any(any(path.glob(pattern)) for pattern in weights)


def model_folder(source: str, revision: str | None = None, *, dtype: str = "auto") -> Path:
    """The folder with config, tokenizer and safetensors that a model is loaded from and saved from.

    Args:
        source: folder, Hub id or GGUF file, which is converted once (`gguf.convert`).
        revision: Hub commit, branch or tag.
        dtype: what a GGUF's packed tensors become; "auto" is bfloat16.

    Raises:
        ModelError: when there is no such model, or no weights that are read.
    """
    check_here(source)
    path = Path(source).expanduser()
    gguf = _weights_in(path, source) if path.is_dir() else path if path.is_file() else None
    if gguf is not None:
        from abliterate.models.gguf.convert import converted

        return converted(gguf, dtype)
    return local_folder(source, revision)


def local_folder(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The model's folder; of a Hub id, its snapshot in the Hub cache, downloaded if need be.

    Args:
        model: folder or Hub id.
        revision: Hub commit, branch or tag.
        weights: download the safetensors too, not only what describes the model.

    Raises:
        ModelError: when there is no such folder, or the Hub doesn't give it.
    """
    path = Path(model).expanduser()
    if path.is_dir() and model.strip():
        return path
    if path.is_file():
        hint = "use --as gguf, or give the model's folder" if path.suffix == ".gguf" else "give the model's folder"
        raise ModelError(f"model {model} is a file, and the form checkpoint takes a folder with safetensors; {hint}")
    check_here(model)
    model, revision = meant(model, revision)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=[*_DESCRIBING, *(["*.safetensors"] if weights else [])],
            ignore_patterns=["original/*", "consolidated*.safetensors"],
        )  # fmt: skip
    except Exception as error:
        raise ModelError(
            f"model {model} not found: no such folder here, and the Hub doesn't know it or can't be reached "
            f"(check the name, the network, or `hf auth login` for a gated model): {shorten(str(error), 160)}"
        ) from error
    return Path(found)


def commit_of(folder: Path) -> str | None:
    """The commit that a Hub cache's snapshot is of; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _weights_in(folder: Path, source: str) -> Path | None:
    """A folder's GGUF file, or None when it holds a config and safetensors."""
    files = sorted(p.name for p in folder.iterdir())
    ggufs = [name for name in files if name.lower().endswith(".gguf") and "mmproj" not in name.lower()]  # no projector
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if "config.json" in files and any(name.endswith(".safetensors") for name in files):
        return None
    if len(ggufs) == 1:
        return folder / ggufs[0]
    if ggufs:
        problem = f"it holds several GGUF files; name one: {', '.join(ggufs)}"
    elif "config.json" not in files:
        below = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]  # of a Hub cache
        inner = next((f.parent for f in sorted(below)), None)
        problem = f"there is no config.json in it; name {inner or 'the folder that holds the model'}"
    elif pickles:
        problem = (
            f"its weights are pickles ({', '.join(pickles[:3])}), which can run code when they are read; "
            "convert them to safetensors first"
        )
    else:
        problem = "there are no weights (*.safetensors) in it; get the model's files again"
    raise ModelError(f"model folder {source} can't be loaded: {problem}")
