"""An edit's shifts as a control vector in a GGUF, as llama.cpp reads it (`--control-vector`).

Read of llama.cpp (common/common.cpp, src/llama-adapter.cpp): tensors direction.N, float32 [d_model], are added to the
stream at the output of block N, counted from 0, at every token; direction.0 is refused, since llama.cpp keeps no vector
for block 0. By default all blocks from 1 on take part; `--control-vector-scaled FILE SCALE` multiplies.

A control vector adds the same to every token. So it holds a recipe's shifts exactly, and never a removal, which takes
out of every token what that token has.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abliterate.apply.gguf.names import check_model
from abliterate.apply.gguf.write import check_output, refuse, whole_gguf, write_small
from abliterate.common.errors import AbliterateError, ModelError, RecipeError
from abliterate.models.gguf.file import open_gguf

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions
    from abliterate.common.reporting import Reporter
    from abliterate.edit.recipe import Recipe


def apply_control_vector(
    recipe: Recipe, model: str, out: Path, options: ApplyOptions, reporter: Reporter
) -> dict[str, Any]:
    """Write a recipe's shifts as a llama.cpp control vector.

    Args:
        recipe: with shifts; several at one block add up.
        model: a GGUF file or a folder, to check the recipe against and to name in the file; a Hub id or an empty text
            leaves that to what the recipe says.
        out: the GGUF file to write.
        options: with `skip_unsupported` removals, and shifts at block 0, are left out and listed.
        reporter: told how it goes.

    Returns:
        `form`, `out`, `bytes`, `writers`, `seconds`, `notes`, `layers`: the blocks that get a shift, `skipped`.

    Raises:
        AbliterateError: when the recipe has removals, a shift at block 0 or no shift that can be held.
        RecipeError: when the recipe is for another model.
    """
    began = time.monotonic()
    refuse(
        options, "control-vector", norm_preserving="it changes no weight", in_place="name a new file with --out",
        dtype="llama.cpp reads float32 alone", keep_tied="it changes no weight",
    )  # fmt: skip
    edit = recipe.edit
    hint, layers = _context(recipe, model, options.force)
    skipped = list(edit.parts)
    notes = []
    if skipped:
        what = (
            f"the recipe takes directions out of {len(skipped)} writers, which a control vector can't: it adds the "
            "same to every token, a removal takes out what each token has"
        )
        if not options.skip_unsupported:
            raise AbliterateError(f"{what}; use --as gguf or gguf-adapter, or --skip-unsupported for its shifts alone")
        notes.append(f"{what}; left out")
    vectors: dict[int, np.ndarray] = {}
    for shift in edit.shifts:
        vectors[shift.layer] = vectors.get(shift.layer, 0) + shift.vector
    if 0 in vectors:
        if not options.skip_unsupported:
            raise AbliterateError(
                "the recipe shifts at block 0, for which llama.cpp has no control vector; "
                "pass --skip-unsupported to leave that out"
            )
        del vectors[0]
        skipped.append("shift at block 0")
        notes.append("left out the shift at block 0, for which llama.cpp has no control vector")
    beyond = [layer for layer in vectors if layers and layer >= layers]
    if beyond:
        raise RecipeError(f"the recipe shifts at block {max(beyond)}, the model's last is {layers - 1}")
    if not vectors:
        raise AbliterateError("the recipe has no shifts, so there is nothing for a control vector to hold")
    summary: dict[str, Any] = {
        "form": "control-vector", "out": str(out), "writers": 0, "notes": notes, "layers": sorted(vectors),
        "skipped": skipped,
    }  # fmt: skip
    if options.plan:
        return {**summary, "bytes": 4 * edit.d_model * len(vectors), "seconds": 0.0}
    check_output(out, overwrite=options.overwrite)
    # block 0 has none
    metadata = {"controlvector.model_hint": hint, "controlvector.layer_count": (layers or max(vectors) + 1) - 1}
    tensors = {f"direction.{layer}": vectors[layer].astype(np.float32) for layer in sorted(vectors)}
    with whole_gguf(out) as temporary:
        write_small(temporary, "controlvector", metadata, tensors)
    reporter.say(f"wrote shifts at blocks {', '.join(map(str, sorted(vectors)))}")
    return {**summary, "bytes": out.stat().st_size, "seconds": round(time.monotonic() - began, 2)}


def _context(recipe: Recipe, model: str, force: bool) -> tuple[str, int]:
    """The name of the model's architecture and its number of blocks (0 where nothing says it); checked."""
    about = recipe.model
    path = Path(model).expanduser() if model else None
    if path is not None and path.is_file():
        file = open_gguf(path)
        check_model(recipe, file, force=force)
        return file.architecture, file.number("block_count") or 0
    hint, layers = str(about.get("class") or "unknown"), int(about.get("layers") or 0)
    if path is not None and (path / "config.json").is_file():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            text = config.get("text_config") or config
            hint, layers = str(text.get("model_type", hint)), int(text.get("num_hidden_layers", layers))
            width = int(text.get("hidden_size", recipe.edit.d_model))
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"model folder {path}: its config.json can't be read ({error})") from error
        if width != recipe.edit.d_model:
            raise RecipeError(
                f"the recipe is for a model of {recipe.edit.d_model} d_model, {path} has {width}; "
                "is it for another model?"
            )
    return hint, layers
