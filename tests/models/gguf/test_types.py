"""ggml's library and the gguf package pack and unpack alike."""

from __future__ import annotations

import numpy as np
import pytest

from abliterate.models.gguf import types as ggml_types
from gguf_files import K_QUANTS, SIMPLE


def test_the_library_and_the_gguf_package_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    values = np.random.default_rng(0).normal(size=(32, 512)).astype(np.float32)
    for kind in (*SIMPLE, *K_QUANTS):
        packed = ggml_types.pack(values, kind)
        unpacked = ggml_types.unpack(packed, kind)
        with monkeypatch.context() as patch:
            patch.setattr(ggml_types, "_ggml", lambda: None)
            assert np.array_equal(ggml_types.unpack(packed, kind), unpacked), kind
            if kind in SIMPLE:
                assert np.array_equal(ggml_types.pack(values, kind), packed), kind
                again = ggml_types.pack(unpacked, kind)
                assert np.array_equal(again, packed), kind  # on the grid already
