"""The cache of keys and values (or states) that a model is handed and gives back, whatever it calls it.

transformers has come to call it `cache` and takes the older names until 5.40; code that comes with a model may know an
older one alone. A name that a model doesn't know is swallowed without a word, and what it answers is something else.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from abliterate.common.errors import ModelError

NAMES = ("cache", "past_key_values", "cache_params")
REMEDY = "use a version of transformers that abliterate's requirements allow"


def run_cached(model: nn.Module, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """What a model or its decoder gives, and the cache it gives back.

    Args:
        model: what is run; the signature of its forward pass tells what it calls the cache.
        arguments: of the pass, the cache under `cache`; with `use_cache` one must come back.

    Raises:
        ModelError: when it takes none, or none comes back.
    """
    cache = arguments.get("cache")
    arguments = {key: value for key, value in arguments.items() if key != "cache"}
    if cache is not None:
        takes = inspect.signature(model.forward).parameters
        name = next((name for name in NAMES if name in takes), None)
        if name is None:
            raise ModelError(f"{type(model).__name__} takes no cache ({', '.join(NAMES)}); {REMEDY}")
        arguments[name] = cache
    output = model(**arguments)
    if not arguments.get("use_cache"):
        return output, None
    cache = next((found for name in NAMES if (found := getattr(output, name, None)) is not None), None)
    if cache is None:
        raise ModelError(f"{type(model).__name__} gives no cache back, so no answer can be gone on with; {REMEDY}")
    return output, cache
