"""An edit applied to a checkpoint on disk, folder to folder: no model is made, nothing is run, memory stays small.

Every byte that the edit doesn't touch is copied in the kernel: shards keep their names, headers, order and
metadata. Importing torch takes longer than copying some GiB, so nothing here does, but for recipes that don't say
which tensors their writers are or that hold shifts, for which a skeleton of the model is made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.apply.checkpoint.check import check_written
from abliterate.apply.checkpoint.folder import check_config
from abliterate.apply.checkpoint.journal import changing, interrupted, locked, recover
from abliterate.apply.checkpoint.pieces import run_pieces
from abliterate.apply.checkpoint.plan import plan_checkpoint
from abliterate.apply.checkpoint.repacked import said_of
from abliterate.apply.checkpoint.work import Work, prepare
from abliterate.common.errors import AbliterateError, ModelError, OutputError
from abliterate.common.files import check_folder, check_space, explained, whole_folder
from abliterate.edit.recipe import Recipe
from abliterate.models.folders import local_folder

if TYPE_CHECKING:
    from abliterate.apply.forms import ApplyOptions
    from abliterate.common.reporting import Reporter
    from abliterate.edit.recipe import Recipe


def apply_checkpoint(
    recipe: Recipe, model: str, out: Path, options: ApplyOptions, reporter: Reporter
) -> dict[str, Any]:
    """Write a copy of a safetensors checkpoint with the edit in its weights, or change it in place.

    Args:
        recipe: its edit is applied as it is (already scaled by `options.strength`).
        model: folder or Hub id.
        out: folder to write; with `options.in_place` the model's own.
        options: `dtype` is refused: tensors keep theirs.
        reporter: told how it goes; progress is in MiB.

    Returns:
        `form`, `out`, `bytes` written, `writers`, `tensors` edited, `untied`, `left_out`, `notes`, `seconds`; with
        `options.plan` what `plan_checkpoint` says.

    Raises:
        ModelError: when the checkpoint is damaged, quantised where it would be edited, or none.
        RecipeError: when the recipe is for another model.
        WriterError: when a shift has no bias to go into.
        NonFiniteError: when a value is, or becomes, NaN or infinite.
        OutputError: when the output is in the way, is the model itself, or doesn't fit on the disk.
    """
    started = time.monotonic()
    if options.dtype is not None:
        raise AbliterateError("the form checkpoint keeps every tensor's dtype; leave out --dtype")
    folder = local_folder(model, options.revision, weights=not options.plan)
    if options.plan:
        return plan_checkpoint(recipe, folder, out, options)
    if options.in_place:
        if not out.exists() or not out.samefile(folder) or not Path(model).expanduser().is_dir():
            raise OutputError(f"--in-place changes a local model folder; leave out --out, or name {model} itself")
        summary = _in_place(recipe, folder, options, reporter)
    else:
        check_apart(folder, out)
        check_folder(out, overwrite=options.overwrite)
        summary = _to_folder(recipe, model, folder, out, options, reporter)
    return {"form": "checkpoint", "out": str(out), **summary, "seconds": round(time.monotonic() - started, 2)}


def check_apart(folder: Path, out: Path) -> None:
    """Raise OutputError when the output would be the model's folder, in it, or around it."""
    source, target = folder.resolve(), out.resolve()
    if source == target:
        raise OutputError(f"output {out} is the model itself; name another with --out, or change it with --in-place")
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise OutputError(f"output {out} and model {folder} lie one in the other; name another folder with --out")


def _to_folder(
    recipe: Recipe, model: str, folder: Path, out: Path, options: ApplyOptions, reporter: Reporter
) -> dict[str, Any]:
    if interrupted(folder):
        raise ModelError(
            f"an apply in place was interrupted in {folder}, and its files may not belong together; "
            "run it again there, which ends it"
        )
    work = prepare(recipe, folder, options, source=model)
    total = work.total_bytes()
    check_space(out, total + total // 1000)
    edited = work.summary["tensors"]
    reporter.say(f"editing {edited} of {len(work.checkpoint.files)} tensors in {len(work.outputs)} file(s)")
    with whole_folder(out, overwrite=options.overwrite) as temporary:
        # importing transformers, which knows the config's defaults, takes as long as copying some GiB
        write_folder(work, temporary, reporter, lambda: check_config(recipe, folder, force=options.force))
    return {"bytes": total, **work.summary}


def write_folder(
    work: Work, folder: Path, reporter: Reporter, meanwhile: Callable[[], None] | None = None
) -> None:  # fmt: skip
    """Write all of it into a folder that is nobody's yet, and check the edited tensors as they are on the disk.

    Args:
        meanwhile: run at the same time; its error stops the work.

    Raises:
        NonFiniteError: when a value is, or becomes, NaN or infinite.
        WriterError: when a tensor isn't what the edit leaves of it.
        ModelError: when packing a weight again undoes too much of the edit.
    """
    folder.mkdir(exist_ok=True)
    targets = {name: folder / name for name in work.outputs}
    pieces = [piece for name, output in work.outputs.items() for piece in output.begin(targets[name])]
    run_pieces(pieces, reporter, meanwhile)
    check_written(work.outputs.values(), targets)
    work.summary.setdefault("notes", []).extend(said_of(work.repacked))
    for relative in work.copies:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(work.checkpoint.folder / relative, folder / relative)
    for name, text in work.texts.items():
        (folder / name).write_bytes(text)


def _in_place(recipe: Recipe, folder: Path, options: ApplyOptions, reporter: Reporter) -> dict[str, Any]:
    fingerprint = _fingerprint(recipe, options)
    with locked(folder):
        done = recover(folder)
        if done is not None:
            reporter.say("ended what an interrupted apply had begun here")
            if done.get("fingerprint") == fingerprint:
                return {**done["summary"], "recovered": True}
        check_config(recipe, folder, force=options.force)
        work = prepare(recipe, folder, options, source=folder.name)
        outputs = work.written(in_place=True)
        total = work.total_bytes(in_place=True)
        check_space(folder / "new", total + total // 1000)
        summary = {"bytes": total, **work.summary, "left_out": []}
        names = [*outputs, *work.texts]
        reporter.say(f"editing {summary['tensors']} tensors in {len(outputs)} file(s) of {folder}")
        record = {"fingerprint": fingerprint, "summary": summary}
        with explained(folder), changing(folder, names, record) as temporaries:
            run_pieces([p for name, output in outputs.items() for p in output.begin(temporaries[name])], reporter)
            check_written(outputs.values(), temporaries)
            summary["notes"].extend(said_of(work.repacked))
            for name, text in work.texts.items():
                temporaries[name].write_bytes(text)
            for name, temporary in temporaries.items():
                if (folder / name).exists():
                    temporary.chmod((folder / name).stat().st_mode & 0o777)
    return summary


def _fingerprint(recipe: Recipe, options: ApplyOptions) -> str:
    """Says whether two applies are the same: their edits, and the options that change what is written."""
    edit = recipe.edit
    digest = hashlib.sha256(json.dumps([*edit.writers, options.norm_preserving, options.keep_tied]).encode())
    for array in (edit.directions, edit.strengths, *(s.vector for s in edit.shifts)):
        digest.update(array.tobytes())
    digest.update(json.dumps([s.layer for s in edit.shifts]).encode())
    return digest.hexdigest()
