"""The one door to transformers' and PEFT's loaders: code that comes with a model is run only on request.

Where nothing is said, transformers asks at a terminal whether to run such code, and runs it on a `y`.
"""

from __future__ import annotations

import os
from typing import Any


def from_pretrained(
    kind: Any, source: str | os.PathLike[str], *, trust_remote_code: bool = False, **options: Any
) -> Any:
    """What a class of transformers loads from a folder or the Hub.

    Args:
        kind: AutoConfig, AutoTokenizer, AutoModelForCausalLM, ...
        source: folder or Hub id.
        trust_remote_code: run the code that comes with it; without it such a source is an error, or, where
            transformers has a class of its own for the model, that class is taken.
        options: as the class takes them.

    Raises:
        Whatever the class raises; `wants_own_code` tells the case of a source that only its own code can load.
    """
    return kind.from_pretrained(os.fspath(source), trust_remote_code=trust_remote_code, **options)


def from_config(kind: Any, config: Any, **options: Any) -> Any:
    """A model of a class of transformers without weights; never by code that the config names."""
    return kind.from_config(config, trust_remote_code=False, **options)


def auto_class(config: Any) -> Any:
    """The class that loads all of a model: a multimodal one keeps its vision part where the config names it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if config is None or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    whole: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and whole.__name__ not in (config.architectures or []):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model."""
    return getattr(config, "get_text_config", lambda: config)()


def with_adapter(model: Any, folder: str | os.PathLike[str]) -> Any:
    """A loaded model with a PEFT adapter put into its layers; no code comes with an adapter's tensors."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, os.fspath(folder))


def wants_own_code(error: Exception) -> bool:
    """Whether loading failed because the source can be loaded by its own code alone."""
    return "trust_remote_code" in str(error)
