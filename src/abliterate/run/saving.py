"""What is saved: a copy of the folder that the model was read from, in which the edit's bytes alone are others."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from abliterate.apply.biases import find_switch, lacking
from abliterate.apply.checkpoint.folder import read_config
from abliterate.apply.checkpoint.form import write_folder
from abliterate.apply.checkpoint.merge import merged
from abliterate.apply.checkpoint.repacked import split
from abliterate.apply.checkpoint.work import Work, changed_copy, outputs_of, prepare
from abliterate.apply.forms import ApplyOptions
from abliterate.apply.hooks import attached
from abliterate.apply.weights import bake
from abliterate.common.errors import ModelError
from abliterate.common.files import check_space
from abliterate.common.reporting import Reporter
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe
from abliterate.models.handle import Handle
from abliterate.models.packed import packed_in
from abliterate.models.placement import offloaded, sharded
from abliterate.models.shards import open_checkpoint
from abliterate.models.writers import find_writers
from abliterate.run.facts import recipe_of


def in_force(handle: Handle, edit: Edit, *, keep_tied: bool) -> AbstractContextManager[Any]:
    """The edit as it is measured: attached live; baked where a tied head is edited too, which no hook can."""
    if keep_tied and handle.tied and not handle.quantised:
        bake(handle, edit, keep_tied=True)
        return nullcontext()
    return attached(handle, edit)


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
    if handle.at_stream:
        said = "the stream itself is edited, which no weight holds: there is no model/; measured live"
        return Held(False, None, said)
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


def check_savable(handle: Handle, out: str | Path, *, keep_tied: bool = False) -> None:
    """See, before the work, that the model's files can hold an edit of any writer, and that there is room for a copy.

    Raises:
        ModelError: when they can't: they are packed, or transformers mixes their tensors; or when a tied head is to be
            edited too, for which the weights are changed in memory, and they are not there.
        OutputError: when the disk is too small.
    """
    if handle.at_stream:
        return  # a recipe is all that is saved
    if keep_tied and handle.tied and (offloaded(handle.model) or sharded(handle.embedding.weight)):
        raise ModelError(
            f"--keep-tied measures weights changed in memory, and those of {handle.source} are spread or kept on disk; "
            "leave it out, and apply the recipe with abliterate apply --keep-tied"
        )
    every = Edit.uniform(find_writers(handle), np.ones(handle.d_model))
    work = prepare(recipe_of(handle, every), folder_of(handle), ApplyOptions(), source=handle.source, card="-")
    check_space(out, work.total_bytes() + 32 * 2**20)


def folder_of(handle: Handle) -> Path:
    """Where the model's files are.

    Raises:
        ModelError: when it was made in memory.
    """
    if handle.folder is None:
        raise ModelError(f"{handle.source} was made in memory, and models are saved from their files; save it first")
    return handle.folder


def save_edited(
    handle: Handle, recipe: Recipe, out: Path, card: str, reporter: Reporter, *, keep_tied: bool = False
) -> None:  # fmt: skip
    """Write the model's folder with an edit in its weights: full precision also where the model is loaded in less.

    Args:
        recipe: of this model.
        out: folder to write, nobody's yet.
        card: its README.md.
        keep_tied: edit a tied head with its embedding.

    Raises:
        AbliterateError: any of those of `apply_checkpoint`.
    """
    options = ApplyOptions(keep_tied=keep_tied)
    work = prepare(recipe, folder_of(handle), options, source=handle.source, card=card)
    write_folder(work, out, reporter)
    for note in work.summary["notes"]:
        reporter.say(note)


def save_merged(handle: Handle, adapter: Path, out: Path, card: str, reporter: Reporter) -> None:
    """Write the model's folder with a LoRA merged into its weights.

    Args:
        adapter: folder of a PEFT LoRA for this model.
        out, card: as for `save_edited`.

    Raises:
        WriterError: when the adapter changes what the folder doesn't hold as a tensor of its own.
    """
    checkpoint = open_checkpoint(folder_of(handle))
    packed = packed_in(checkpoint, read_config(checkpoint.folder))
    plain, repacked = split(checkpoint, packed, merged(adapter, handle, checkpoint))
    work: Work = changed_copy(checkpoint, outputs_of(checkpoint, plain, {}, repacked), {})
    work.repacked = repacked
    work.texts["README.md"] = card.encode()
    write_folder(work, out, reporter)
