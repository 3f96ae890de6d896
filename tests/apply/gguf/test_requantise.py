"""Which blocks of an edited matrix keep their bytes."""

from __future__ import annotations

import numpy as np
import pytest

from abliterate.apply.gguf import requantise
from abliterate.edit.algebra import Factors
from abliterate.models.gguf import types as ggml_types


def test_blocks_whose_values_stay_keep_their_bytes() -> None:
    pytest.importorskip("xllamacpp")
    generator = np.random.default_rng(0)
    for kind in ("Q4_0", "BF16", "Q3_K"):  # packing what was unpacked gives Q3_K other bytes
        raw = ggml_types.pack(generator.normal(size=(64, 256)).astype(np.float32), kind)
        r = np.zeros((1, 64), np.float32)
        r[0, :5] = 5**-0.5
        new, _ = requantise.edited(raw, kind, 0, Factors(r, r))
        assert np.array_equal(new[5:], raw[5:]) and not np.array_equal(new[:5], raw[:5])
        nothing = Factors(0 * r, r)
        assert np.array_equal(requantise.edited(raw, kind, 0, nothing)[0], raw)
