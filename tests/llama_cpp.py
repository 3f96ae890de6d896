"""Real llama.cpp for tests: its C functions in the library that the xllamacpp wheel carries.

The wheel's own Python interface has neither logits nor control vectors. Structures that llama.h passes by value are
held in rooms larger than they are: what is beyond their end is not looked at.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest


class _Room(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint64 * 128),)


class _Info(ctypes.Structure):
    """common_control_vector_load_info; a std::string of libstdc++ begins with a pointer to its characters, and under
    the ABI of before 2015, which manylinux wheels may have, is that alone."""

    _fields_ = (("strength", ctypes.c_float), ("characters", ctypes.c_void_p))


class _RoomyInfo(ctypes.Structure):
    _fields_ = (*_Info._fields_, ("size", ctypes.c_size_t), ("room", ctypes.c_char * 16))


class _Vector(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("room", ctypes.c_void_p))


class _Loaded(ctypes.Structure):
    _fields_ = (("width", ctypes.c_int), ("data", _Vector))


_CONTROL_VECTOR_LOAD = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_said: list[str] = []


@_LOG
def _listen(_level: int, text: bytes, _data: int) -> None:
    _said.append(text.decode("utf-8", "replace"))


@cache
def library() -> ctypes.CDLL:
    """llama.cpp, or the test is skipped."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = (spec.submodule_search_locations or []) if spec else []
    for file in (f for folder in folders for f in Path(folder).glob("xllamacpp*.so")):
        lib = ctypes.CDLL(str(file))
        pointer, room = ctypes.c_void_p, _Room
        for name, result, arguments in (
            ("llama_model_default_params", room, []),
            ("llama_context_default_params", room, []),
            ("llama_model_load_from_file", pointer, [ctypes.c_char_p, room]),
            ("llama_init_from_model", pointer, [pointer, room]),
            ("llama_batch_get_one", room, [pointer, ctypes.c_int32]),
            ("llama_decode", ctypes.c_int32, [pointer, room]),
            ("llama_get_logits", pointer, [pointer]),
            ("llama_get_logits_ith", pointer, [pointer, ctypes.c_int32]),
            ("llama_get_memory", pointer, [pointer]),
            ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
            ("llama_model_get_vocab", pointer, [pointer]),
            ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]),
            ("llama_model_n_embd", ctypes.c_int32, [pointer]),
            ("llama_model_n_layer", ctypes.c_int32, [pointer]),
            ("llama_adapter_lora_init", pointer, [pointer, ctypes.c_char_p]),
            ("llama_set_adapters_lora", ctypes.c_int32, [pointer, pointer, ctypes.c_size_t, pointer]),
            ("llama_set_adapter_cvec", ctypes.c_int32, [pointer, pointer, ctypes.c_size_t] + [ctypes.c_int32] * 3),
            ("llama_set_n_threads", None, [pointer, ctypes.c_int32, ctypes.c_int32]),
            ("llama_free", None, [pointer]),
            ("llama_model_free", None, [pointer]),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        lib.llama_log_set(_listen, None)
        lib.llama_backend_init()
        return lib
    pytest.skip("needs xllamacpp")


class LlamaCpp:
    """A GGUF loaded in llama.cpp, on one thread.

    Args:
        path: the model.
        lora: a GGUF LoRA and its scale.
        control: a control vector's values [layers * d_model], the first for block 1, as `read_control_vector` gives.
    """

    def __init__(
        self, path: str | Path, lora: tuple[str | Path, float] | None = None, control: np.ndarray | None = None
    ) -> None:
        lib = self.lib = library()
        _said.clear()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        assert self.model, "llama.cpp doesn't load it: " + "".join(_said)[-600:]
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.layers = lib.llama_model_n_layer(self.model)
        self.context = lib.llama_init_from_model(self.model, lib.llama_context_default_params())
        assert self.context, "llama.cpp makes no context: " + "".join(_said)[-600:]
        lib.llama_set_n_threads(self.context, 1, 1)
        if lora is not None:
            adapter = lib.llama_adapter_lora_init(self.model, str(lora[0]).encode())
            assert adapter, "llama.cpp doesn't load the LoRA: " + "".join(_said)[-600:]
            adapters, scales = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(lora[1])
            assert lib.llama_set_adapters_lora(self.context, adapters, 1, scales) == 0
        if control is not None:
            data = np.ascontiguousarray(control, np.float32)
            width = lib.llama_model_n_embd(self.model)
            done = lib.llama_set_adapter_cvec(self.context, data.ctypes.data, data.size, width, 1, self.layers)
            assert done == 0

    def next_logits(self, ids: Sequence[int], *, fresh: bool = True) -> np.ndarray:
        """Logits [vocabulary] after the last of some tokens."""
        lib = self.lib
        if fresh:
            lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        assert lib.llama_decode(self.context, lib.llama_batch_get_one(tokens, len(ids))) == 0
        pointer = ctypes.cast(lib.llama_get_logits_ith(self.context, -1), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (self.vocabulary,)).copy()

    def greedy(self, ids: Sequence[int], count: int, end: frozenset[int]) -> list[int]:
        """The likeliest next tokens, up to an end token."""
        given: list[int] = []
        logits = self.next_logits(ids)
        while len(given) < count and int(logits.argmax()) not in end:
            given.append(int(logits.argmax()))
            logits = self.next_logits(given[-1:], fresh=False)
        return given

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_control_vector(path: str | Path, strength: float = 1.0) -> np.ndarray:
    """What llama.cpp's own `--control-vector-scaled` reads from a file: [layers * d_model]; empty when it refuses."""
    lib = library()
    load = lib[_CONTROL_VECTOR_LOAD]
    name = ctypes.create_string_buffer(str(path).encode())
    pointer = ctypes.cast(name, ctypes.c_void_p).value
    old = hasattr(lib, "_Z15common_tokenizePK11llama_vocabRKSsbb")  # Ss is the old std::string
    info = _Info(strength, pointer) if old else _RoomyInfo(strength, pointer, len(name) - 1, b"")
    start = ctypes.addressof(info)
    infos, loaded = _Vector(start, start + ctypes.sizeof(info), start + ctypes.sizeof(info)), _Loaded()
    load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    load(ctypes.addressof(loaded), ctypes.addressof(infos))  # what it returns goes where the first argument says
    size = (loaded.data.end or 0) - (loaded.data.begin or 0)
    return np.frombuffer(ctypes.string_at(loaded.data.begin, size), np.float32) if size else np.empty(0, np.float32)
