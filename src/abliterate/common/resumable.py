"""Work written down as it goes, so that what was killed goes on: whole files, each with the hash of what it depends on.

A state is a JSON document, and tensors beside it where the file is a safetensors file. It is read only by the job
that wrote it: one with the same key, which is the hash of everything that the work depends on.

Example:
    >>> key = key_of(["model", 1])
    >>> write_state(path, key, {"done": 3})
    >>> document, _ = read_state(path, key, "a run")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.common.errors import OutputError
from abliterate.common.files import whole_file

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "abliterate.state"


def key_of(parts: Any, as_text: Callable[[Any], str] = str) -> str:
    """Sha256 of what work depends on.

    Args:
        parts: a JSON document.
        as_text: gives the text of what JSON can't hold; the same in every process.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=as_text).encode()).hexdigest()


def write_state(path: Path, key: str, document: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write a state down; whole or not at all.

    Args:
        path: the file; what was there is replaced.
        key: from `key_of`.
        document: what JSON can hold.
        tensors: name -> tensor; None makes a plain JSON file.

    Raises:
        OutputError: when the disk is full, or the folder can't be written.
    """
    text = json.dumps({"key": key, **document})
    with whole_file(path) as temporary:
        if tensors is None:
            temporary.write_text(text, encoding="utf-8")
            return
        from safetensors.torch import save_file

        # cloned: tensors may share memory, which a safetensors file can't say
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, temporary, metadata={METADATA: text})


def read_state(path: Path, key: str, by: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What `write_state` wrote, without its key; None where there is no file.

    Args:
        path: the file; tensors are looked for where its name ends in .safetensors.
        key: from `key_of`.
        by: the job that writes such files, for the error: "a run".

    Raises:
        OutputError: when the file is damaged, or was written with another key.
    """
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {})[METADATA]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        else:
            text = path.read_text(encoding="utf-8")
        document = json.loads(text)
        found = document.pop("key")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path} can't be read, to go on from: {error}; start anew without --resume") from error
    if found != key:
        raise OutputError(
            f"{path} was left by {by} with another model, prompts or settings; give the same ones to go on, or start "
            "anew without --resume"
        )
    return document, tensors


def beside(out: str | Path, ending: str) -> Path:
    """The hidden file beside an output in which a job is written down while it runs.

    Example:
        >>> beside("/work/out", "fit.safetensors")
        PosixPath('/work/.out.fit.safetensors')
    """
    final = Path(out).absolute()
    return final.with_name(f".{final.name}.{ending}")
