"""Loading a causal language model from the Hub, a folder or a GGUF file, and saying why one can't be."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from abliterate.common.errors import ModelError, NonFiniteError, listed, shorten
from abliterate.models.ahead import read_ahead
from abliterate.models.devices import SPREADING, check_room, largest_block, placing, room_on_disk
from abliterate.models.folders import commit_of, local_folder, meant, model_folder
from abliterate.models.handle import Handle
from abliterate.models.memory import SMALLER, no_room, out_of_memory
from abliterate.models.outputs import changed
from abliterate.models.placement import value
from abliterate.models.pretrained import auto_class, from_config, from_pretrained, wants_own_code
from abliterate.models.quantised import (
    WAY_ROUND,
    bitsandbytes,
    check_method,
    check_unread,
    keep_gradients,
    packed_as,
)
from abliterate.models.shards import FLOATS, INDEX, open_checkpoint, read_index
from abliterate.prompts.reasoning import marks_of

AUTO_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how transformers' classes of decoders are called
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load(
    source: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
    offload_folder: str | None = None,
    tensor_parallel: bool = False,
    quantise: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    system_prompt: str | None = None,
    prefill: str | None = None,
    reasoning_marks: str | None = None,
    at_stream: bool = False,
) -> Handle:
    """Load a causal language model from the Hub, a local folder or a GGUF file.

    Args:
        source: Hub id, folder, or `.gguf` file (its weights are dequantised).
        dtype: "auto" tries bfloat16, float16, float32 in turn and keeps the first that runs with finite
            logits (on a CPU without instructions for bfloat16, float32 if there is room); or one of these names.
        device: "cuda", "cuda:1", "mps", "xpu" or "cpu"; None takes the accelerators there are, else the CPU.
        device_map: as in transformers: "auto", "balanced", "sequential", or a device.
        max_memory: the most bytes of weights on each device, "0=20GiB,cpu=60GiB"; the rest is brought from disk.
        offload_folder: where such weights are kept that the model's own files don't hold as they are used.
        tensor_parallel: spread every matrix over the processes that torchrun started.
        quantise: "4bit" or "8bit" through bitsandbytes; without a GPU it computes on the CPU, to save memory, not time.
        revision: Hub commit, branch or tag.
        trust_remote_code: run model code that comes with the Hub repository.
        chat_template: Jinja template, file or "chatml", in place of the tokenizer's.
        system_prompt: put before every prompt.
        prefill: text that every answer starts with; None finds it for models that reason.
        at_stream: edit the stream itself; see `Handle`.

    Returns:
        The handle, model in evaluation mode with frozen parameters.

    Raises:
        ModelError: unknown model, not a causal language model, no safetensors or GGUF weights, or a dtype
            or device that is not there.
        NonFiniteError: a weight is NaN or infinite; names it.

    Example:
        >>> h = load("Qwen/Qwen3-0.6B")
        >>> h.layers, h.d_model
        (28, 1024)
    """
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if not torch.accelerator.is_available():
        # else an installed DeepSpeed, which transformers imports on saving, prints a warning among our results
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    source, revision = meant(str(source), revision)
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{dtype}'; choose auto, {', '.join(DTYPES)}")
    where = placing(device, device_map, max_memory, tensor_parallel)
    folder = model_folder(source, revision, dtype=dtype)
    if "max_memory" in where and not quantise:
        check_room(source, folder, where["max_memory"], DTYPES[dtype].itemsize if dtype in DTYPES else 2)
    config = load_config(source, folder, trust_remote_code)
    tokenizer = load_tokenizer(source, folder, trust_remote_code)
    model, notes = _load_weights(source, folder, config, dtype, where, offload_folder, quantise, trust_remote_code)
    model.eval().requires_grad_(False)
    handle = Handle(
        model=model,
        tokenizer=tokenizer,
        source=source,
        folder=folder,
        revision=revision or commit_of(folder),
        system_prompt=system_prompt,
        chat_template=chat_template,
        prefill=prefill,
        marks=marks_of(reasoning_marks),
        source_dtype=_dtype_on_disk(folder),
        quantised=packed_as(model),
        trust_remote_code=trust_remote_code,
        at_stream=at_stream,
        notes=notes,
    )
    check_weights(handle)
    read_ahead(handle)
    return handle


def without_weights(
    source: str, *, dtype: str = "auto", device: str | None = None, revision: str | None = None,
    trust_remote_code: bool = False, **how: Any,
) -> Handle:  # fmt: skip
    """A model of which config and tokenizer alone are read, on "meta"; of a Hub id no weights are downloaded.

    Args:
        source, dtype, device, revision, trust_remote_code: as for `load`.
        how: how its prompts are formatted, as for `Handle`.

    Raises:
        ModelError: when there is no such model, or it isn't a causal language model.
    """
    source, revision = meant(source, revision)
    is_gguf = Path(source).expanduser().is_file()
    folder = model_folder(source, dtype=dtype) if is_gguf else local_folder(source, revision, weights=False)
    config = load_config(source, folder, trust_remote_code)
    wanted = DTYPES[dtype] if dtype in DTYPES else _auto_dtypes(folder, {"device_map": device})[0]
    with torch.device("meta"):
        model = from_config(auto_class(config), config, dtype=wanted).eval().requires_grad_(False)
    tokenizer = load_tokenizer(source, folder, trust_remote_code)
    return Handle(model, tokenizer, source, revision, folder=folder, **how)


def load_config(source: str, folder: Path, trust_remote_code: bool) -> Any:
    """A model's config, which is that of a decoder.

    Raises:
        ModelError: when it can't be read, or is that of something else.
    """
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    try:
        config = from_pretrained(transformers.AutoConfig, folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(_explain(source, error)) from error
    architectures = getattr(config, "architectures", None) or []
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    known = known or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    # a class of transformers' own that makes something else of such a config; names that it doesn't know say nothing
    other = [a for a in architectures if hasattr(transformers, a) and not a.endswith(_CAUSAL)]
    if getattr(config, "is_encoder_decoder", False) or not known or (other and len(other) == len(architectures)):
        kind = ", ".join(architectures) or type(config).__name__
        raise ModelError(f"model {source} is {kind}, not a causal language model; only decoders can be edited")
    return config


def load_tokenizer(source: str, folder: Path, trust_remote_code: bool) -> Any:
    """A model's tokenizer, padding on the left and with a pad token.

    Raises:
        ModelError: when it can't be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = from_pretrained(AutoTokenizer, folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        hint = "get its files (tokenizer.json, tokenizer_config.json) from the original"
        raise ModelError(f"tokenizer of {_explain(source, error)}; {hint}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "left"
    return tokenizer


def _notes(model: Any, unread: list[str], unpacked: str | None) -> list[str]:
    """What people should know of tensors that the files hold and the class doesn't read, or reads unpacked."""
    notes = [f"{type(model).__name__} doesn't read {listed(unread)}; what is saved holds them as they are"]
    packed = f"its weights are quantised ({unpacked}): dequantised to {_named(model.dtype)} for the search"
    return notes[: len(unread)] + ([f"{packed}, and packed again in what is saved"] if unpacked else [])


def _load_weights(
    source: str, folder: Path, config: Any, dtype: str, where: dict[str, Any], offload_folder: str | None,
    quantise: str | None, trust_remote_code: bool,
) -> tuple[Any, list[str]]:  # fmt: skip
    """The model, and what people should know of how it was read."""
    unpacked, folder = check_method(source, folder, config, quantise)
    index = read_index(folder)
    if index is not None and not isinstance(index.get("metadata"), dict):
        raise ModelError(
            f'{folder / INDEX} has no "metadata", without which transformers can\'t read it; add it, as {{}}'
        )
    options: dict[str, Any] = {
        "config": config, **where, "low_cpu_mem_usage": True, "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    if quantise:
        options["quantization_config"] = bitsandbytes(quantise)
    failure = ""
    if dtype != "auto":
        candidates: tuple[torch.dtype, ...] = (DTYPES[dtype],)
    else:
        candidates = AUTO_DTYPES if quantise else _auto_dtypes(folder, where)
    for candidate in candidates:
        room = room_on_disk(offload_folder) if where.get("device_map") in SPREADING else None
        extra = {"offload_folder": room.name} if room else {}
        model, unread = _from_pretrained(source, folder, dict(options, dtype=candidate, **extra))
        model.abliterate_offloaded_to = room  # there as long as the model is
        failure = _failure(source, model)
        if not failure:
            return model, _notes(model, unread, unpacked)
        del model
    names = ", ".join(map(_named, candidates))
    remedy = "try --dtype float32" if torch.float32 not in candidates else "get the file again"
    raise NonFiniteError(f"model {source} doesn't run in {names}: {failure}; {remedy}")


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _auto_dtypes(folder: Path, where: Mapping[str, Any]) -> tuple[torch.dtype, ...]:
    """In which dtypes a model is tried: bfloat16 first, but on a CPU without instructions for it, which multiplies
    float32 several times as fast, float32 where a local model then takes at most half of the memory, or a block of
    it what is allowed where weights are brought for each pass."""
    limits = where.get("max_memory", {})
    on_cpu = where.get("device_map") in (None, "cpu") or limits.keys() == {"cpu"}
    if not on_cpu or torch.accelerator.is_available() or _multiplies_bfloat16():
        return AUTO_DTYPES
    if limits:
        return (torch.float32,) if largest_block(folder, 4)[1] <= limits["cpu"] else AUTO_DTYPES
    widened = 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return (torch.float32,) if 0 < widened <= psutil.virtual_memory().total / 2 else AUTO_DTYPES


def _multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it; True where that can't be told."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _from_pretrained(source: str, folder: Path, options: dict[str, Any]) -> tuple[Any, list[str]]:
    try:
        loaded = from_pretrained(auto_class(options["config"]), folder, **options, output_loading_info=True)
    except Exception as error:
        if out_of_memory(error):
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
            raise ModelError(
                f"memory doesn't hold model {source}, {size:.1f} GiB as it is stored; try {SMALLER}"
            ) from error
        raise ModelError(_explain(source, error)) from error
    model, info = loaded
    keep_gradients(model)
    if info["missing_keys"]:
        raise ModelError(
            f"model {source}: its files lack weight {listed(sorted(info['missing_keys']))}; get them again"
        )
    unread = sorted(info["unexpected_keys"])
    check_unread(source, model, folder, unread)
    return model, unread


@torch.inference_mode()
def _failure(source: str, model: Any) -> str:
    """Why two tokens don't go through with finite logits: the first weight or block at fault; empty if they do."""
    bad: list[int] = []
    handle = Handle(model, None, source)
    blocks = list(enumerate(handle.blocks))

    def look(layer: int, stream: Tensor) -> Tensor:
        # squared, because the next norm squares it: what overflows there comes out as zeros, not as NaN
        if isinstance(stream, Tensor) and not bool(stream.float().square().sum(-1).isfinite().all()):
            bad.append(layer)
        return stream

    try:
        _ = handle.d_model  # a config without one is of a class that reads no tokens
        ids = torch.zeros(1, 2, dtype=torch.long, device=handle.device)
        with changed((block, partial(look, layer)) for layer, block in blocks):
            logits = model(input_ids=ids).logits
    except Exception as error:
        if out_of_memory(error):
            raise no_room(handle, "a pass over two tokens") from error
        if isinstance(error, NotImplementedError) or "not implemented for" in str(error):
            return shorten(str(error), 200)  # a kernel missing for this dtype
        raise ModelError(
            f"model {source}: {type(model).__name__} can't run on two tokens by themselves "
            f"({type(error).__name__}: {shorten(str(error), 200)}); only models that go on with a text can be edited"
        ) from error
    if not bad and bool(logits.isfinite().all()):
        return ""
    name = _non_finite_weight(model)
    if name:
        return f"weight {name} holds NaN or infinite values"
    return (f"the activation after layer {bad[0]} is" if bad else "the logits are") + " NaN or infinite, or too large"


def _dtype_on_disk(folder: Path) -> torch.dtype | None:
    """The dtype that most of a model's safetensors hold: configs don't always say, or are wrong."""
    sizes: dict[str, int] = {}
    for shard in open_checkpoint(folder).shards.values():
        for tensor in shard.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    known = {name: size for name, size in sizes.items() if name in FLOATS}
    return getattr(torch, FLOATS[max(known, key=lambda name: known[name])].name) if known else None


def _explain(source: str, error: Exception) -> str:
    """One line for what transformers says in a page."""
    whole = str(error)
    text = shorten(whole, 300)
    if isinstance(error, ImportError) and "quanti" in whole:
        return f"model {source} can't be loaded: {text}; or {WAY_ROUND}"
    if wants_own_code(error):
        return f"model {source} comes with code of its own; read it, then pass --trust-remote-code to run it"
    if "No space left on device" in whole or "File too large" in whole:
        return f"model {source} can't be loaded: the offload folder's disk is full; name another with --offload-folder"
    if "ignore_mismatched_sizes" in whole:
        return f"model {source} can't be loaded: its weights have other shapes than config.json says; get both again"
    if type(error).__name__ == "SafetensorError":
        return f"model {source} can't be loaded: a safetensors file is damaged ({text}); get it again"
    if any(word in whole for word in ("safetensors", ".bin")) and "pickle" not in whole and Path(source).exists():
        return f"model {source} can't be loaded: {text} (only safetensors and GGUF are read)"
    return f"model {source} can't be loaded: {text}"


def check_weights(handle: Handle) -> None:
    """Raise NonFiniteError, naming the parameter, when a weight is NaN or infinite."""
    name = _non_finite_weight(handle.model)
    if name:
        raise NonFiniteError(f"model {handle.source}: weight {name} holds NaN or infinite values; get the file again")


def _non_finite_weight(model: nn.Module) -> str | None:
    """Name of the first parameter with a NaN or infinite value."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        low, high = torch.aminmax(value(model, name))
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            return name
    return None
