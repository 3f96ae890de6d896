"""Which tensors of a checkpoint an edit's writers are: names, shapes and axes as `save_pretrained` writes them.

A writer in memory can be many tensors on disk (transformers fuses the experts of Mixtral when it loads it), have
another name there, or be transposed. Transformers' own save-time conversion is asked, writer by writer, with a
stand-in for the weight whose values vary along d_model alone: the names that come out are the stored ones, and the
dimension that varies in each is its axis. A model that isn't loaded is stood in for by a skeleton: its modules at
their true shapes, every weight a view into one small random buffer.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.common.errors import ModelError, WriterError, shorten
from abliterate.edit.stored_tensor import Shape, StoredGain, StoredTensor
from abliterate.models.handle import Handle
from abliterate.models.pretrained import auto_class, from_config, from_pretrained, wants_own_code
from abliterate.models.writers import Writer, layout


def stored_tensors(
    handle: Handle, sources: Mapping[str, Sequence[str]] | None = None
) -> dict[str, tuple[StoredTensor, ...]]:
    """The tensors that `save_pretrained` writes for each of the model's writers, weights first, then biases.

    Args:
        handle: a loaded model, or a `skeleton`; not a quantised one, whose weights have other shapes.
        sources: parameter name -> the names that a checkpoint at hand has for it (`names_in`), where they may
            differ from those that saving gives.

    Returns:
        Writer name -> its stored tensors; of fused experts, in the order of the experts.

    Raises:
        WriterError: when transformers stores a writer in a form that can't be edited by itself.
    """
    with conversions(handle.model):
        return {writer.name: _stored(handle, writer, sources or {}) for writer in layout(handle).writers}


def _stored(handle: Handle, writer: Writer, sources: Mapping[str, Sequence[str]]) -> tuple[StoredTensor, ...]:
    gain = None
    if writer.gain_from is not None:
        norms = (writer.gain_from, *writer.gain_times)
        places = [_saved(handle, norm, (handle.d_model,), 0, sources)[0].name for norm, _ in norms]
        (name, plus), *times = [(place, plus) for place, (_, plus) in zip(places, norms, strict=True)]
        gain = StoredGain(name, plus, writer.centred, tuple(times))
    elif writer.gain is not None:
        raise WriterError(f"{handle.source}: the norm behind {writer.name} has a gain that is no parameter of it")
    tensors = _saved(handle, writer.name, writer.shape, writer.axis, sources)
    if writer.bias is not None:
        shape = tuple(handle.model.get_parameter(writer.bias).shape)
        biases = _saved(handle, writer.bias, shape, writer.bias_axis, sources)
        tensors += [replace(tensor, bias=True) for tensor in biases]
    return tuple(replace(tensor, gain=gain) for tensor in tensors)


def _saved(
    handle: Handle, name: str, shape: Shape, axis: int, sources: Mapping[str, Sequence[str]]
) -> list[StoredTensor]:
    """What one parameter is in a checkpoint: names in the order of the experts, shapes, axes."""
    from transformers.core_model_loading import revert_weight_conversion

    # one byte an entry: some conversions copy. No two neighbours of d_model are alike, and no two axes.
    pattern = (torch.arange(shape[axis]) % 251).to(torch.uint8)
    view = [1] * len(shape)
    view[axis] = shape[axis]
    saved = revert_weight_conversion(handle.model, {name: pattern.view(view).expand(shape)})
    tensors = []
    for stored, tensor in saved.items():
        found = [a for a, size in enumerate(tensor.shape) if size == len(pattern) and _varies(tensor, a, pattern)]
        if len(found) != 1:
            raise WriterError(
                f"model {handle.source}: {name} is stored as {stored} {list(tensor.shape)}, mixed with others or along "
                "no dimension of its own; it can be edited in memory only (hooks, weights)"
            )
        tensors.append(StoredTensor(stored, tuple(tensor.shape), found[0]))
    names = sources.get(name, ())
    if len(names) == len(tensors):
        tensors = [replace(tensor, name=there) for tensor, there in zip(tensors, names, strict=True)]
    return tensors


def _varies(tensor: Tensor, axis: int, pattern: Tensor) -> bool:
    line = tensor.movedim(axis, -1)
    return torch.equal(line[(0,) * (line.ndim - 1)], pattern)


@contextlib.contextmanager
def conversions(model: Any) -> Iterator[None]:
    """Let transformers look up once, not for every parameter, how it would save this model."""
    if getattr(model, "_weight_conversions", None) is not None:
        yield
        return
    from transformers.conversion_mapping import get_model_conversion_mapping

    # as in revert_weight_conversion: a prefix is put back only where loading took it away
    found = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [c for c in found if type(c).__name__ != "PrefixChange"]
    try:
        yield
    finally:
        del model._weight_conversions


def stored_names(handle: Handle, sources: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
    """What a recipe says of its model's embedding and head: `tied`, and the names `embedding` and `head` in a
    checkpoint, the latter as an untied head is written (None without a head)."""
    with conversions(handle.model):

        def name_of(module: nn.Module | None) -> str | None:
            weight = getattr(module, "weight", None)
            if module is None or not isinstance(weight, Tensor):
                return None
            parameter = f"{handle.module_names[module]}.weight"
            return _saved(handle, parameter, tuple(weight.shape), weight.ndim - 1, sources or {})[0].name

        head = handle.model.get_output_embeddings()
        return {"tied": handle.tied, "embedding": name_of(handle.embedding), "head": name_of(head)}


def names_in(model: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """Parameter name -> the checkpoint's tensors that `from_pretrained` would make it from, in their order.

    As loading does, the model is told which renamings were needed, so that saving would revert these alone.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [c for c in mapping if isinstance(c, WeightRenaming)]
    converters = [c for c in mapping if isinstance(c, WeightConverter)]
    parameters = model.state_dict()
    sources: dict[str, list[str]] = {}
    for name in sorted(names, key=_natural):
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if target not in parameters and name in parameters:
            target = name
        sources.setdefault(target, []).append(name)
    model._weight_conversions = [c for c in mapping if c.was_used()]
    return sources


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers and experts by number."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def skeleton(folder: str | os.PathLike[str]) -> Handle:
    """A model of a folder's config without its weights: every parameter has its true shape and is a view into one
    small random buffer, so that writers can be found on a model of any size.

    Memory: the largest matrix of a block in float32 (of a 70B Llama 0.9 GB); embedding and head share it. There is no
    tokenizer.

    Args:
        folder: with a config.json; weights, generation config and tokenizer need not be there.

    Raises:
        ModelError: when config.json is missing or not that of a causal language model.
    """
    from transformers import AutoConfig
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    source = Path(folder)
    if not (source / "config.json").is_file():
        raise ModelError(f"model folder {source}: there is no config.json in it; name the folder that holds the model")
    try:
        config = from_pretrained(AutoConfig, source)
        return skeleton_of(config, str(folder))
    except Exception as error:
        if wants_own_code(error):
            raise ModelError(
                f"model folder {source} comes with code of its own, which isn't run to look at the model"
            ) from error
        raise ModelError(f"model folder {source}: its config.json can't be used: {shorten(str(error), 300)}") from error


def skeleton_of(config: Any, source: str) -> Handle:
    """The same of a config at hand.

    Args:
        config: a transformers config; it is not changed.
        source: the model's name, for errors.
    """
    config = copy.deepcopy(config)  # building a model notes its dtype there
    with torch.device("meta"):
        model = from_config(auto_class(config), config, dtype=torch.float32)
    _fill(model)
    model.eval().requires_grad_(False)
    return Handle(model, tokenizer=None, source=source)


# An expert's rows start at a multiple of 64 bytes in float32, as grouped matrix products ask.
_STEP = 16
_PERIOD = 1_048_583  # prime


@torch.no_grad()
def _fill(model: Any) -> None:
    """Give a model on the meta device parameters and buffers that run with finite, unlike activations."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    looked_up |= {id(head.weight)} if head is not None else set()
    parameters = dict(model.named_parameters())
    windows = [_window(p.shape, id(p) in looked_up) for p in parameters.values()]
    extents = [sum((n - 1) * step for n, step in zip(p.shape, w, strict=True)) + 1
               for p, w in zip(parameters.values(), windows, strict=True)]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    room = max(extents) + _STEP * len(windows)
    # a period that no row length divides: no two rows of a matrix are alike
    period = torch.randn(min(room, _PERIOD), generator=generator) * model.config.get_text_config().hidden_size ** -0.5
    buffer = torch.empty(room)
    for start in range(0, room, len(period)):
        buffer[start : start + len(period)] = period[: room - start]
    new: dict[int, nn.Parameter] = {}
    for index, ((name, parameter), strides) in enumerate(zip(parameters.items(), windows, strict=True)):
        if parameter.ndim < 2 or "bias" in name:  # a bias may be written to, to see what it does (apply.shifts)
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
        else:
            values = buffer.as_strided(tuple(parameter.shape), strides, index * _STEP)
        new[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            filled = new[id(parameter)]
            if parameter.ndim < 2 and name != "bias" and "bias" not in name:
                filled.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))  # a norm's gain
            filled._is_hf_initialized = True  # type: ignore[attr-defined]
            module._parameters[name] = filled
        for name, buffered in module._buffers.items():
            if buffered is not None and buffered.is_meta:
                module._buffers[name] = torch.zeros_like(buffered, device="cpu")
    model.initialize_weights()  # only the buffers: rotary frequencies and the like


def _window(shape: Sequence[int], looked_up: bool) -> tuple[int, ...]:
    """Strides of a parameter in the shared buffer: matrices lie in it whole, since products need them so; an
    embedding's rows, and stacked experts, overlap."""
    if looked_up:
        return (_STEP,) * (len(shape) - 1) + (1,)
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    if len(shape) == 3:
        strides[0] = _STEP
    return tuple(strides)
