"""What tests have workers run: in a module that these can import."""

from __future__ import annotations

import os
import time

from abliterate.common.errors import NonFiniteError


def process(handle, common, call):
    return os.getpid()


def failing(handle, common, call):
    raise NonFiniteError("the driver hears this")


def slow(handle, common, call):
    time.sleep(call)
