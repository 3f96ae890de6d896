"""Activations <-> safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from abliterate.common.errors import AbliterateError
from abliterate.common.files import whole_file
from abliterate.directions.activations import Activations, SideStatistics
from abliterate.models.handle import Handle

SCHEMA = 1
KEY = "abliterate.activations"


def save_activations(activations: Activations, path: str | os.PathLike[str], handle: Handle) -> None:
    """Write statistics (and kept vectors) with the hash of the model they belong to."""
    from safetensors.torch import save_file

    tensors = {}
    for name, side in (("target", activations.target), ("baseline", activations.baseline)):
        tensors[f"{name}.mean"] = side.mean.contiguous()
        tensors[f"{name}.variance"] = side.variance.contiguous()
        if side.vectors is not None:
            tensors[f"{name}.vectors"] = side.vectors.contiguous()
    document = {
        "schema": SCHEMA,
        "model": handle.source,
        "config_hash": handle.config_hash,
        "counts": {"target": activations.target.count, "baseline": activations.baseline.count},
        "provenance": activations.provenance,
    }
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={KEY: json.dumps(document, sort_keys=True)})


def load_activations(path: str | os.PathLike[str], handle: Handle | None = None) -> Activations:
    """Read what `save_activations` wrote.

    Args:
        path: the file.
        handle: the model they must belong to; None doesn't check.

    Raises:
        AbliterateError: when the file is missing, damaged, or for another model.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise AbliterateError(f"activations file {path} not found; make one with `abliterate collect`")
    try:
        with safe_open(str(path), framework="pt") as file:
            document = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        sides = [
            SideStatistics(
                int(document["counts"][side]),
                tensors[f"{side}.mean"].to(torch.float64),
                tensors[f"{side}.variance"].to(torch.float64),
                tensors.get(f"{side}.vectors"),
            )
            for side in ("target", "baseline")
        ]
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise AbliterateError(f"activations file {path} is damaged or not one of abliterate's: {error}") from error
    if document.get("schema") != SCHEMA:
        raise AbliterateError(
            f"activations file {path} has schema {document.get('schema')}, this version reads {SCHEMA}"
        )
    if handle is not None and document["config_hash"] != handle.config_hash:
        raise AbliterateError(
            f"activations file {path} was made with {document['model']}, which has another config than {handle.source}"
        )
    return Activations(sides[0], sides[1], document["provenance"])
