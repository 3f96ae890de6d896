"""Putting an edit into the weights that are saved, and writing a model's folder."""

from __future__ import annotations

import copy
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from abliterate.apply.biases import find_switch, lacking
from abliterate.apply.hooks import attached
from abliterate.apply.weights import bake
from abliterate.common.reporting import Reporter
from abliterate.edit.edit import Edit
from abliterate.models.handle import Handle
from abliterate.models.loading import DTYPES
from abliterate.run.opening import open_model
from abliterate.settings.run import RunSettings


def bakes_in_place(handle: Handle) -> bool:
    """Whether the loaded weights are what will be saved; else a fresh copy in the source's dtype is edited."""
    return handle.quantised is None and handle.source_dtype in (None, handle.dtype)


def attach_or_bake(
    handle: Handle, edit: Edit, settings: RunSettings, reporter: Reporter
) -> AbstractContextManager[Any]:
    """Bake the edit where these weights will be saved; else attach it live for measuring."""
    if bakes_in_place(handle) or (settings.keep_tied and handle.tied and not handle.quantised):
        # hooks can't edit the head with the embedding
        reporter.say("baking the edit into the weights")
        bake(handle, edit, keep_tied=settings.keep_tied)
        return nullcontext()
    precision = "full precision" if handle.quantised else str(handle.source_dtype).removeprefix("torch.")
    reporter.say(f"measuring with the edit attached live; a copy in {precision} will be edited and saved")
    return attached(handle, edit)


def to_save(handle: Handle, edit: Edit, settings: RunSettings) -> Handle:
    """The handle whose weights hold the edit in the dtype the source has on disk."""
    if bakes_in_place(handle):
        return handle
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtype = names.get(handle.source_dtype or handle.dtype, "auto")
    plain = settings.load.model_copy(update={"dtype": dtype, "quantise": None, "device_map": "cpu"})
    copy = open_model(handle.source, plain)
    bake(copy, edit, keep_tied=settings.keep_tied)
    return copy


class Held(NamedTuple):
    """Whether a model's weights can hold an edit.

    Attributes:
        weights: they can.
        switch: the config's field that gives the class the biases it takes; None where it needs none.
        said: all this in words.
    """

    weights: bool
    switch: str | None
    said: str


def held(handle: Handle, edit: Edit) -> Held:
    """Whether the weights can hold the edit: a shift wants a bias at its block's output."""
    layers = sorted({shift.layer for shift in edit.shifts})
    if not layers:
        return Held(True, None, "the weights hold the edit")
    one = len(layers) == 1
    blocks = f"block {layers[0]}" if one else f"blocks {layers[0]} to {layers[-1]}"
    hold = "holds the shift" if one else "hold the shift"
    if handle.quantised is None and not lacking(handle, layers):
        return Held(True, None, f"{'a bias' if one else 'biases'} of {blocks} {hold}")
    switch = find_switch(handle.model.config, handle.source, layers)
    if switch is not None:
        gives = f"{switch.field} in its config gives the class biases"
        return Held(True, switch.field, f"{gives}; {'one' if one else 'those'} of {blocks} {hold}")
    where = f"{blocks}'s output" if one else f"the output of {blocks}"
    said = (
        f"{type(handle.model).__name__} has no bias at {where}, so there is no model/; measured live; abliterate apply "
        "has the forms adapter and, from block 1 on, control-vector"
    )
    return Held(False, None, said)


def bytes_to_write(handle: Handle) -> int:
    """About how large the model's folder will be, its head untied."""
    size = sum(p.numel() for p in handle.model.parameters())
    embedding = handle.vocabulary * handle.d_model if handle.tied else 0
    per_weight = (handle.source_dtype or handle.dtype).itemsize
    return int(1.02 * (size + embedding) * per_weight) + 32 * 2**20


def save_model(handle: Handle, folder: Path) -> None:
    """Write weights, tokenizer, chat template and generation config, as plain transformers loads them."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    model, generation = handle.model, getattr(handle.model, "generation_config", None)
    if generation is not None:
        model.generation_config = type(generation)()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = generation
    if generation is not None:
        # Past transformers' checks: it refuses to save what some models are published with, such as a
        # temperature without sampling.
        generation.to_json_file(str(folder / "generation_config.json"), use_diff=True)
    written = _tokenizer_as_given(handle).save_pretrained(folder)
    source = Path(handle.source).expanduser()
    images = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # multimodal
    for file in (Path(name) for name in (*written, "generation_config.json", *images)):
        if (source / file.name).is_file():  # what a local source has stays as it is, byte for byte
            shutil.copyfile(source / file.name, folder / file.name)


def _tokenizer_as_given(handle: Handle) -> Any:
    """The tokenizer without what loading set: padding on the left, a pad token, where its files are."""
    tokenizer = copy.deepcopy(handle.tokenizer)
    given = tokenizer.init_kwargs
    tokenizer.padding_side = given.get("padding_side", type(tokenizer).padding_side)
    tokenizer.pad_token = given.get("pad_token")
    for mark in ("is_local", "local_files_only"):
        given.pop(mark, None)
    return tokenizer
