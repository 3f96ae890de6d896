"""Loading a causal language model from the Hub, a folder or a GGUF file, and saying why one can't be."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.common.errors import ModelError, NonFiniteError, shorten
from abliterate.models.handle import Handle
from abliterate.models.pretrained import from_pretrained, wants_own_code

AUTO_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load(
    source: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    quantise: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    system_prompt: str | None = None,
    prefill: str | None = None,
) -> Handle:
    """Load a causal language model from the Hub, a local folder or a GGUF file.

    Args:
        source: Hub id, folder, or `.gguf` file (its weights are dequantised).
        dtype: "auto" tries bfloat16, float16, float32 in turn and keeps the first that runs with finite
            logits (on a CPU without instructions for bfloat16, float32 if there is room); or one of these names.
        device_map: as in transformers ("auto", "cpu", "cuda:0"); None means "auto" where CUDA is, else CPU.
        quantise: "4bit" or "8bit" through bitsandbytes; without a GPU it computes on the CPU, to save memory, not time.
        revision: Hub commit, branch or tag.
        trust_remote_code: run model code that comes with the Hub repository.
        chat_template, system_prompt, prefill: see `chat.format_prompts`.

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
    source = str(source)
    where, gguf_file = _locate(source)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision:
        common["revision"] = revision
    if gguf_file:
        common["gguf_file"] = gguf_file
    config = _load_config(source, where, common)
    tokenizer = _load_tokenizer(source, where, common)
    if device_map is None and torch.cuda.is_available():
        device_map = "auto"
    model = _load_weights(source, where, config, dtype, device_map, quantise, common)
    model.eval().requires_grad_(False)
    handle = Handle(
        model=model,
        tokenizer=tokenizer,
        source=source,
        revision=revision or getattr(config, "_commit_hash", None),
        system_prompt=system_prompt,
        chat_template=chat_template,
        prefill=prefill,
        source_dtype=_dtype_on_disk(where, revision) or _named_dtype(getattr(config, "dtype", None)),
        quantised=quantise,
        trust_remote_code=trust_remote_code,
    )
    check_weights(handle)
    return handle


def _locate(source: str) -> tuple[str, str | None]:
    """Split a source into what transformers loads from and the GGUF file's name, if it is one."""
    if not source.strip():
        raise ModelError("the model's name is empty; give a model folder, a GGUF file or a Hub id")
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"model {source} is a file, but not a .gguf; give a model folder, a GGUF file or a Hub id")
        return str(path.parent), path.name
    if path.is_dir():
        return str(path), _weights_in(path, source)
    if source.lower().endswith(".gguf") or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"model {source} not found: no such file or folder; check the path")
    return source, None


def _weights_in(folder: Path, source: str) -> str | None:
    """The name of a folder's GGUF file, or None when it holds a config and safetensors."""
    files = sorted(p.name for p in folder.iterdir())
    ggufs = [name for name in files if name.lower().endswith(".gguf")]
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if "config.json" in files and any(name.endswith(".safetensors") for name in files):
        return None
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        problem = f"it holds several GGUF files; name one: {', '.join(ggufs)}"
    elif "config.json" not in files:
        problem = "there is no config.json in it; name the folder that holds the model"
    elif pickles:
        problem = (
            f"its weights are pickles ({', '.join(pickles[:3])}), which can run code when they are read; "
            "convert them to safetensors first"
        )
    else:
        problem = "there are no weights (*.safetensors) in it; get the model's files again"
    raise ModelError(f"model folder {source} can't be loaded: {problem}")


def _load_config(source: str, where: str, common: dict[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    try:
        config = from_pretrained(AutoConfig, where, **common)
    except Exception as error:
        raise ModelError(_explain(source, error)) from error
    architectures = getattr(config, "architectures", None) or []
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    known = known or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    causal = any(a.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for a in architectures)
    if getattr(config, "is_encoder_decoder", False) or not known or (architectures and not causal):
        kind = ", ".join(architectures) or type(config).__name__
        raise ModelError(f"model {source} is {kind}, not a causal language model; only decoders can be edited")
    return config


def _load_tokenizer(source: str, where: str, common: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = from_pretrained(AutoTokenizer, where, **common)
    except Exception as error:
        hint = "get its files (tokenizer.json, tokenizer_config.json) from the original"
        raise ModelError(f"tokenizer of {_explain(source, error)}; {hint}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "left"
    return tokenizer


def _load_weights(
    source: str, where: str, config: Any, dtype: str, device_map: str | None, quantise: str | None,
    common: dict[str, Any],
) -> Any:  # fmt: skip
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{dtype}'; choose auto, {', '.join(DTYPES)}")
    options: dict[str, Any] = dict(common, device_map=device_map, low_cpu_mem_usage=True)
    if "gguf_file" in common:
        options["quantization_config"] = _dequantise()
    else:
        options.update(config=config, use_safetensors=True)
    if quantise:
        options["quantization_config"] = _bitsandbytes(quantise)
    failure = ""
    if dtype != "auto":
        candidates: tuple[torch.dtype, ...] = (DTYPES[dtype],)
    else:
        candidates = AUTO_DTYPES if quantise else _auto_dtypes(where, common.get("gguf_file"), device_map)
    for candidate in candidates:
        model = _from_pretrained(source, where, dict(options, dtype=candidate))
        failure = _failure(model)
        if not failure:
            return model
        del model
    names = ", ".join(str(candidate).removeprefix("torch.") for candidate in candidates)
    remedy = "try --dtype float32" if torch.float32 not in candidates else "get the file again"
    raise NonFiniteError(f"model {source} doesn't run in {names}: {failure}; {remedy}")


def _auto_dtypes(where: str, gguf_file: str | None, device_map: str | None) -> tuple[torch.dtype, ...]:
    """In which dtypes a model is tried: bfloat16 first, but on a CPU without instructions for it, which multiplies
    float32 several times as fast, float32 where a local model then takes at most half of the memory."""
    if device_map not in (None, "cpu") or torch.accelerator.is_available() or _multiplies_bfloat16():
        return AUTO_DTYPES
    files = [Path(where) / gguf_file] if gguf_file else list(Path(where).glob("*.safetensors"))
    widened = (8 if gguf_file else 2) * sum(file.stat().st_size for file in files)
    return (torch.float32,) if files and widened <= _memory() / 2 else AUTO_DTYPES


def _multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it; True where that can't be told."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _memory() -> int:
    """Bytes of memory of this machine; 0 where that can't be told."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _from_pretrained(source: str, where: str, options: dict[str, Any]) -> Any:
    try:
        loaded = from_pretrained(auto_class(options.get("config")), where, **options, output_loading_info=True)
    except torch.OutOfMemoryError as error:
        raise ModelError(f"model {source} does not fit the device; try --quantise 4bit or --device-map auto") from error
    except Exception as error:
        raise ModelError(_explain(source, error)) from error
    model, info = loaded
    if "quantization_config" in options:
        _keep_gradients(model)
    if "gguf_file" in options:
        forget_quantisation(model)
    elif info["missing_keys"]:
        first, *others = sorted(info["missing_keys"])
        more = f" and {len(others)} more" if others else ""
        raise ModelError(f"model {source}: its files lack weight {first}{more}; get them again")
    return model


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


def _dequantise() -> Any:
    """The setting that makes transformers unpack a GGUF; versions that always do have none."""
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:
        return None
    return GgufConfig(dequantize=True)


def forget_quantisation(model: Any) -> None:
    """Drop the marks a dequantised model keeps of its file; transformers would refuse to save it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark, value in (("hf_quantizer", None), ("is_quantized", False), ("quantization_method", None)):
        if getattr(model, mark, value) != value:
            setattr(model, mark, value)


def _bitsandbytes(quantise: str) -> Any:
    from transformers import BitsAndBytesConfig

    if quantise not in ("4bit", "8bit"):
        raise ModelError(f"unknown quantisation '{quantise}'; choose 4bit or 8bit")
    if find_spec("bitsandbytes") is None:
        raise ModelError(f'--quantise {quantise} needs bitsandbytes: pip install "abliterate[quantised]"')
    if quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip


def _keep_gradients(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU: gradients don't pass the kernel for the packed ones.

    It repacks a layer at its first forward without gradients, for good, and gives zeros for gradients from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@torch.inference_mode()
def _failure(model: Any) -> str:
    """Why two tokens don't go through with finite logits: the first weight or block at fault; empty if they do."""
    device = next(model.get_input_embeddings().parameters()).device
    bad: list[int] = []
    hooks = []
    for layer, block in enumerate(Handle(model, None, "the model").blocks):

        def look(_module: nn.Module, _args: Any, out: Any, layer: int = layer) -> None:
            stream = out[0] if isinstance(out, tuple) else out
            # squared, because the next norm squares it: what overflows there comes out as zeros, not as NaN
            if isinstance(stream, Tensor) and not bool(stream.float().square().sum(-1).isfinite().all()):
                bad.append(layer)

        hooks.append(block.register_forward_hook(look))
    try:
        logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device)).logits
    except (RuntimeError, NotImplementedError) as error:  # a kernel missing for this dtype
        return shorten(str(error), 200)
    finally:
        for hook in hooks:
            hook.remove()
    if not bad and bool(logits.isfinite().all()):
        return ""
    name = _non_finite_weight(model)
    if name:
        return f"weight {name} holds NaN or infinite values"
    return (f"the activation after layer {bad[0]} is" if bad else "the logits are") + " NaN or infinite, or too large"


def _dtype_on_disk(where: str, revision: str | None) -> torch.dtype | None:
    """The dtype that most of a model's safetensors hold: configs don't always say, or are wrong."""
    from huggingface_hub import try_to_load_from_cache
    from safetensors import SafetensorError, safe_open

    folder = Path(where)
    if not folder.is_dir():
        cached = try_to_load_from_cache(where, "config.json", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    part = shard.get_slice(name)
                    sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + math.prod(part.get_shape())
        except (SafetensorError, OSError):
            continue
    named = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    known = {name: size for name, size in sizes.items() if name in named}
    return named[max(known, key=lambda name: known[name])] if known else None


def _named_dtype(value: Any) -> torch.dtype | None:
    return value if isinstance(value, torch.dtype) else DTYPES.get(str(value).removeprefix("torch."))


def _explain(source: str, error: Exception) -> str:
    """One line for what transformers says in a page."""
    whole = str(error)
    text = shorten(whole, 300)
    if wants_own_code(error):
        return f"model {source} comes with code of its own; read it, then pass --trust-remote-code to run it"
    if "ignore_mismatched_sizes" in whole:
        return f"model {source} can't be loaded: its weights have other shapes than config.json says; get both again"
    if type(error).__name__ == "SafetensorError":
        return f"model {source} can't be loaded: a safetensors file is damaged ({text}); get it again"
    if any(word in whole for word in ("safetensors", ".bin")) and "pickle" not in whole and Path(source).exists():
        return f"model {source} can't be loaded: {text} (only safetensors and GGUF are read)"
    unknown = ("couldn't connect", "offline", "not a local folder", "Can't load", "resolve", "Max retries", "Repo id")
    if not Path(source).exists() and any(word in whole for word in unknown):
        return (
            f"model {source} not found: no such folder here, and the Hub doesn't know it or can't be reached "
            f"(check the name, the network, or `hf auth login` for a gated model)"
        )
    return f"model {source} can't be loaded: {text}"


def check_weights(handle: Handle) -> None:
    """Raise NonFiniteError, naming the parameter, when a weight is NaN or infinite."""
    name = _non_finite_weight(handle.model)
    if name:
        raise NonFiniteError(f"model {handle.source}: weight {name} holds NaN or infinite values; get the file again")


def _non_finite_weight(model: nn.Module) -> str | None:
    """Name of the first parameter with a NaN or infinite value."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0 or parameter.is_meta:
            continue
        low, high = torch.aminmax(parameter.detach())
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            return name
    return None
