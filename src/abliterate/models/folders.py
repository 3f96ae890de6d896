"""Where a model's files are: the folder, the Hub's snapshot or the converted GGUF that everything is read from."""

from __future__ import annotations

from pathlib import Path

from abliterate.common.errors import ModelError, shorten

_DESCRIBING = (
    "*.json", "*.txt", "*.md", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.bpe", "LICENSE*", "LICENCE*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip


def model_folder(source: str, revision: str | None = None, *, dtype: str = "auto") -> Path:
    """The folder with config, tokenizer and safetensors that a model is loaded from and saved from.

    Args:
        source: folder, Hub id or GGUF file, which is converted once (`gguf.convert`).
        revision: Hub commit, branch or tag.
        dtype: what a GGUF's packed tensors become; "auto" is bfloat16.

    Raises:
        ModelError: when there is no such model, or no weights that are read.
    """
    if not source.strip():
        raise ModelError("the model's name is empty; give a model folder, a GGUF file or a Hub id")
    path = Path(source).expanduser()
    if path.is_dir():
        gguf = _weights_in(path, source)
    elif path.is_file() and path.suffix.lower() != ".gguf":
        raise ModelError(f"model {source} is a file, but not a .gguf; give a model folder, a GGUF file or a Hub id")
    else:
        gguf = path if path.is_file() else None
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
    if (
        model.lower().endswith(".gguf")
        or model.startswith((".", "/", "~"))
        or model.count("/") > 1
        or not model.strip()
    ):
        raise ModelError(f"model {model} not found: no such file or folder; check the path")
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
    ggufs = [name for name in files if name.lower().endswith(".gguf")]
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if "config.json" in files and any(name.endswith(".safetensors") for name in files):
        return None
    if len(ggufs) == 1:
        return folder / ggufs[0]
    if ggufs:
        problem = f"it holds several GGUF files; name one: {', '.join(ggufs)}"
    elif "config.json" not in files:
        problem = "there is no config.json in it; name the folder that holds the model"
    elif pickles:
        problem = (
            f"its weights are pickles ({', '.join(pickles[:3])}), which can run code when they are read; "
            "convert them to safetensors first"
        )
    else:
        problem = "there are no weights (*.safetensors) in it; get the model's files again"
    raise ModelError(f"model folder {source} can't be loaded: {problem}")
