"""Tests that take many minutes on two cores; `ABLITERATE_LONG_TESTS=1 make test` runs them too."""

from __future__ import annotations

import os

import pytest

LONG = pytest.mark.skipif(
    not os.environ.get("ABLITERATE_LONG_TESTS"), reason="many minutes on two cores; ABLITERATE_LONG_TESTS=1 runs it"
)
