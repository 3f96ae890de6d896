"""A GGUF as a safetensors folder: made once, tensor by tensor in the file's order, and from then on read as any folder.

What llama.cpp's converter changed (names, rotary rows, Gemma's norms) is undone by the parts of transformers' own
loader. Used whole, that holds every tensor in float32 at once, and reads the metadata four times through the gguf
package, which makes two memory maps of each of a vocabulary's and its merges' strings: 70 of the 80 seconds for 0.5B.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import torch
from gguf.constants import GGUFValueType
from gguf.gguf_reader import GGUFReader
from torch import Tensor

from abliterate.common.errors import ModelError, shorten
from abliterate.common.files import cache, check_space, made_once
from abliterate.models.gguf.file import GgufFile, GgufTensor, open_gguf
from abliterate.models.gguf.types import PLAIN, unpack
from abliterate.models.pretrained import auto_class, from_config, from_pretrained
from abliterate.models.shards import DTYPE_BITS, FLOATS, SINGLE
from abliterate.models.stored import conversions

MADE = 2  # counts up when the same file would be converted otherwise
CHUNK = 2**22  # values unpacked at a time
_NAMES: dict[torch.dtype, str] = {getattr(torch, dtype.name): name for name, dtype in FLOATS.items()}
_ENTRY = 400  # bytes of a header that a tensor may take


def converted(path: Path, dtype: str = "auto") -> Path:
    """The folder in the cache that holds a GGUF's model; made when it isn't there.

    Memory: the largest tensor. Values of F32, F16 and BF16 stay as they are.

    Args:
        path: the file.
        dtype: what packed tensors become: "float32", "float16", "bfloat16", or "auto" for the last.

    Raises:
        ModelError: when the file is damaged, or transformers has no model for it.
        OutputError: when the cache has no room.
    """
    file, stat = open_gguf(path), path.stat()
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    facts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, str(wanted), MADE]
    folder = cache() / "gguf" / f"{path.stem}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}"

    def make(temporary: Path) -> None:
        values = sum(int(np.prod(tensor.shape)) for tensor in file.tensors.values())
        check_space(folder, values * wanted.itemsize)
        _convert(file, temporary, wanted)

    return made_once(folder, make)


def _convert(file: GgufFile, folder: Path, wanted: torch.dtype) -> None:
    from transformers import AutoConfig, AutoTokenizer

    place: dict[str, Any] = {"source": file.path.parent, "gguf_file": file.path.name}
    try:
        with _read_once(file.path):
            config = from_pretrained(AutoConfig, **place)
            tokenizer = from_pretrained(AutoTokenizer, **place)
        _leave_out(config, file)
        if _has_own_way(file.architecture):
            from transformers.utils.quantization_config import GgufConfig

            plain = GgufConfig(dequantize=True)
            model = from_pretrained(auto_class(config), **place, dtype=wanted, quantization_config=plain)
            _forget_quantisation(model)
            model.save_pretrained(folder)
        else:
            with torch.device("meta"):
                model = from_config(auto_class(config), config, dtype=torch.float32)
            config.dtype = _write(file, model, folder / SINGLE, wanted)
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
            model.generation_config.to_json_file(str(folder / "generation_config.json"), use_diff=True)
        tokenizer.save_pretrained(folder)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"GGUF {file.path} can't be loaded: {shorten(str(error), 300)}") from error


def _leave_out(config: Any, file: GgufFile) -> None:
    """Have the config count no blocks that predict further tokens: transformers' classes hold none of a GGUF's."""
    blocks, text = file.number("block_count"), config.get_text_config()
    if file.ahead and blocks is not None and text.num_hidden_layers == blocks:
        text.num_hidden_layers = blocks - file.ahead
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == blocks and "token" not in name:  # what each block is
                setattr(text, name, value[: blocks - file.ahead])


def _write(file: GgufFile, model: Any, path: Path, wanted: torch.dtype) -> torch.dtype:
    """Write a file's tensors under the names of a model's checkpoint; returns the dtype that most of them have."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
    names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    parts: dict[str, set[str]] = defaultdict(set)  # experts' gate and up are two tensors of the file, and one of ours
    beyond = tuple(f"blk.{(file.number('block_count') or 0) - 1 - i}." for i in range(file.ahead))
    for stored, name in names.items():
        parts[name].add(stored.removesuffix(".weight"))
    made: dict[str, dict[str, Tensor]] = {"tensors": {}}
    entries = sum(2 * tensor.shape[0] if len(tensor.shape) > 2 else 1 for tensor in file.tensors.values())
    with conversions(model), Stream(path, _ENTRY * entries) as stream:
        for tensor in sorted(file.tensors.values(), key=lambda t: t.start):
            if tensor.name.startswith(beyond):
                continue
            values = _values(file, tensor, wanted)
            result = processor.process(
                weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=made
            )
            for left in parts.values():
                left.discard(tensor.name.removesuffix(".weight"))
            ready = {name: made["tensors"].pop(name) for name in [*made["tensors"]] if not parts.get(name)}
            if result.name in names:
                ready[names[result.name]] = _as_torch(result.weights)
            for name, whole in ready.items():
                rounded = whole if tensor.kind in PLAIN else whole.to(wanted)
                for stored, part in revert_weight_conversion(model, {name: rounded}).items():
                    stream.add(stored, part)
        if made["tensors"]:
            raise ModelError(f"GGUF {file.path} holds only a part of {min(made['tensors'])}; get the file again")
        return stream.main_dtype


def _values(file: GgufFile, tensor: GgufTensor, wanted: torch.dtype) -> np.ndarray[Any, Any]:
    """A tensor's values: as they are stored, or unpacked some rows at a time; experts in float32, as transformers
    takes them."""
    raw = file.raw(tensor)
    if tensor.kind in PLAIN:
        plain = np.array(raw).view(FLOATS[tensor.kind])
        return plain.astype(np.float32) if len(tensor.shape) > 2 else plain
    values = np.empty(tensor.shape, np.float32 if len(tensor.shape) > 2 else FLOATS[_NAMES[wanted]])
    rows, out = raw.reshape(-1, raw.shape[-1]), values.reshape(-1, tensor.shape[-1])
    step = max(1, CHUNK // tensor.shape[-1])
    for low in range(0, len(rows), step):
        out[low : low + step] = unpack(rows[low : low + step], tensor.kind)
    return values


def _as_torch(values: np.ndarray[Any, Any]) -> Tensor:
    values = np.ascontiguousarray(values)
    if values.dtype == FLOATS["BF16"]:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


class Stream:
    """A safetensors file written tensor by tensor: the header is filled in last, where room was left for it."""

    def __init__(self, path: Path, room: int) -> None:
        self._path, self._room, self._at = path, -(-room // 8) * 8, 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}

    def __enter__(self) -> Stream:
        self._file = self._path.open("wb")
        self._file.seek(8 + self._room)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self._header:
            raise ValueError(f"two of its tensors are {name}")
        kind, size = _NAMES[tensor.dtype], tensor.numel() * tensor.dtype.itemsize
        offsets = [self._at, self._at + size]
        self._header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        self._file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        self._at += size

    @property
    def main_dtype(self) -> torch.dtype:
        sizes: dict[str, float] = defaultdict(float)
        for entry in (entry for name, entry in self._header.items() if name != "__metadata__"):
            low, high = entry["data_offsets"]
            sizes[entry["dtype"]] += (high - low) / DTYPE_BITS[entry["dtype"]]
        most = max(sizes, key=lambda kind: sizes[kind])
        return next(dtype for dtype, kind in _NAMES.items() if kind == most)

    def __exit__(self, *_: object) -> None:
        with self._file as file:
            text = json.dumps(self._header, separators=(",", ":")).encode()
            if len(text) > self._room:
                raise ValueError("its tensors' names are too long")
            file.seek(0)
            file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))


class _Quick(GGUFReader):
    """The gguf package's reader, an array's values cut out of the file at once."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        kind, count, at = GGUFValueType(int(head[0][0])), int(head[1][0]), orig_offs + 12
        if kind == GGUFValueType.STRING:
            data, parts = memoryview(self.data), []  # type: ignore[arg-type]
            for _ in range(count):
                start = at + 8
                at = start + int.from_bytes(data[at:start], "little")
                parts.append(data[start:at])
        else:
            values = self._get(at, self.gguf_scalar_to_np[kind], count)
            at, parts = at + values.nbytes, list(np.array(values).reshape(-1, 1))
        return (
            at - orig_offs,
            [*head, *parts],
            list(range(2, 2 + count)),
            [GGUFValueType.ARRAY, kind][: 1 + bool(count)],
        )


@contextlib.contextmanager
def _read_once(path: Path) -> Iterator[None]:
    """Have transformers read a file's metadata by our reader, and once."""
    reader = _Quick(path)
    package.GGUFReader, plain = (lambda *_: reader), package.GGUFReader  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        package.GGUFReader = plain  # type: ignore[misc]


def _has_own_way(architecture: str) -> bool:
    """Whether transformers loads this architecture by conversions of its own, lazily, and not by what is used here."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:
        return False
    return bool(is_gguf_arch_supported(architecture))


def _forget_quantisation(model: Any) -> None:
    """Drop the marks a dequantised model keeps of its file; transformers would refuse to save it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark, value in (("hf_quantizer", None), ("is_quantized", False), ("quantization_method", None)):
        if getattr(model, mark, value) != value:
            setattr(model, mark, value)
