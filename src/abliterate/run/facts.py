"""What results and recipes say of the model, the prompts, the settings and the machine."""

from __future__ import annotations

import platform
from typing import Any

import torch

from abliterate.common.names import public_name
from abliterate.common.version import __version__
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe
from abliterate.measure.document import SCHEMA as SCHEMA
from abliterate.models.handle import Handle
from abliterate.models.packed import checkpoint_shapes
from abliterate.models.recipes import config_file, weights_hash
from abliterate.models.stored import names_in, stored_names, stored_tensors
from abliterate.models.writers import find_writers
from abliterate.prompts.chat import DATE, has_date, resolve_chat_template
from abliterate.prompts.sets import Splits


def model_facts(handle: Handle) -> dict[str, Any]:
    """What results.json says of the model; to be taken before baking gives its config other switches."""
    return {
        "source": handle.source,
        "revision": handle.revision,
        "class": type(handle.model).__name__,
        "config_hash": handle.config_hash,
        "parameters": sum(p.numel() for p in handle.model.parameters()),
        "layers": handle.layers,
        "d_model": handle.d_model,
        "dtype": str(handle.dtype).removeprefix("torch."),
        "prefill": handle.prefill,
    }


def chat_facts(handle: Handle) -> dict[str, Any]:
    """What of a chat template isn't left to the day or to its own default: the date it writes, its switches."""
    template = resolve_chat_template(handle.tokenizer, handle.chat_template)
    found: dict[str, Any] = {"template_date": DATE} if has_date(template) else {}
    return found | ({"template_switches": dict(handle.switches)} if handle.switches else {})


def side_facts(splits: Splits) -> dict[str, Any]:
    """Where a side's prompts come from, how many each split has, and their hashes."""
    parts = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    return {
        "source": splits.source,
        **{name: {"count": len(part), "sha256": part.sha256} for name, part in parts.items()},
    }


def environment(handle: Handle | None = None) -> dict[str, Any]:
    """Versions and machine behind a result; no host or user name."""
    import transformers

    return {
        "abliterate": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "device": str(handle.device) if handle else ("cuda" if torch.cuda.is_available() else "cpu"),
    }


def strengths_used(edit: Edit) -> dict[str, float] | None:
    """Least and greatest strength among those that do anything; None where nothing is taken out of any writer."""
    used = edit.strengths[edit.strengths != 0]
    return {"min": float(used.min()), "max": float(used.max())} if edit.writers else None


def tied_fate(handle: Handle, edit: Edit, keep_tied: bool) -> str | None:
    """What becomes of an embedding tied to the head: "kept" or "untied"; None when it isn't tied or isn't edited."""
    embedded = any(w.side == "embedding" and w.name in edit.writers for w in find_writers(handle))
    return ("kept" if keep_tied else "untied") if handle.tied and embedded else None


def recipe_of(handle: Handle, edit: Edit) -> Recipe:
    """An edit's recipe without provenance, with what is said of the model that it is for.

    Nothing in it depends on the time or the output's place, and no path of this machine is in it. To be taken before
    baking, which may untie the head and give the config other switches.
    """
    facts = model_facts(handle)
    model = {name: facts[name] for name in ("source", "revision", "class", "config_hash", "layers", "d_model")}
    names = names_in(handle.model, checkpoint_shapes(handle.folder)) if handle.folder else None
    model |= {"source": public_name(handle.source), **stored_names(handle, names)}
    model |= {**config_file(handle.folder), "weights_hash": weights_hash(handle.folder)} if handle.folder else {}
    # a quantised model's weights have other shapes in memory: whoever applies the recipe looks at the checkpoint
    tensors = {} if handle.quantised or handle.at_stream else stored_tensors(handle, names)
    return Recipe(edit, model, {}, {writer: tensors[writer] for writer in edit.writers if tensors})


def provenance(document: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Where a recipe comes from: a part of results.json, local files without their paths.

    Args:
        document: results.json.
        found: how its direction was found.
    """
    others = ("behaviour", "kept", "environment", "original", "edited")
    return {
        **found,
        "prompts": shared_prompts(document["prompts"]),
        "settings": _shared_settings(document["settings"]),
        **{name: document[name] for name in others if name in document},
    }


def shared_prompts(prompts: dict[str, Any]) -> dict[str, Any]:
    """What results.json says of the prompts, for others: local files without their paths."""
    return {
        name: {**part, "source": public_name(part["source"])} if name in ("target", "baseline") else part
        for name, part in prompts.items()
    }


def _shared_settings(settings: dict[str, Any]) -> dict[str, Any]:
    prompts = dict(settings["prompts"])
    for side in ("target", "baseline"):
        prompts[side] = public_name(prompts[side]) if prompts[side] else None
    kept = {name: value for name, value in settings.items() if name != "resume"} | {"prompts": prompts}
    beside = settings.get("beside", {})
    if beside.get("also_target"):
        kept["beside"] = {**beside, "also_target": public_name(beside["also_target"])}
    for name in ("behaviour", "keep"):
        kept[name] = public_name(kept[name]) if kept.get(name) else None
    kind, colon, of = str(settings["measure"]["judge"]).partition(":")
    if kind == "style":
        kept["measure"] = {**settings["measure"], "judge": f"{kind}{colon}{public_name(of)}"}
    return kept
