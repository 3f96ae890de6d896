"""What a run measures for its report while the model is at hand, and the file that keeps it: report-data.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.errors import AbliterateError, shorten
from abliterate.common.files import write_text
from abliterate.common.reporting import Tick, untold
from abliterate.directions.activations import watched
from abliterate.directions.means import Directions, Place
from abliterate.edit.edit import Edit
from abliterate.measure import Measurement
from abliterate.measure.differences import paired
from abliterate.measure.document import read_object
from abliterate.models.handle import Handle
from abliterate.models.writers import SITES, find_writers
from abliterate.report.document import DATA as NAME
from abliterate.report.document import DATA_SCHEMA as SCHEMA
from abliterate.report.geometry import aligned_planes, auc, cosine, silhouette

MOST_PROMPTS = 200  # a side
TOKEN_PROMPTS = 2  # a side
MOST_TOKENS = 64
EXAMPLES = 6  # a side
LONGEST_ANSWER = 2000  # characters


@dataclass
class Gathered:
    """What was looked at; `document` grows into report-data.json."""

    document: dict[str, Any]
    place: Place
    along: Float[Tensor, "layer d_model"] = field(repr=False)
    prompts: list[tuple[str, str]] = field(repr=False, default_factory=list)

    def look_at_edited(self, handle: Handle) -> None:
        """Read the direction along the tokens once more, with the edit attached or baked."""
        _read_tokens(self, handle, "edited")

    def compare(
        self, sides: Any, original: Measurement, edited: Measurement, *, show_completions: bool = False
    ) -> None:
        """Keep the paired tests and some answers before and after.

        Args:
            sides: the prompts; the test split's first few are kept with their answers.
            original, edited: the two measurements on it.
            show_completions: keep answers to target prompts too; otherwise only whether they were refused.
        """
        measured = {"original": original, "edited": edited}
        self.document |= compared(sides, measured, show_completions=show_completions)

    def save(self, folder: Path) -> None:
        """Write report-data.json into a run's folder."""
        write_data(self.document, folder)


def gather(
    handle: Handle,
    edit: Edit,
    place: Place,
    directions: Directions,
    target: Sequence[str],
    baseline: Sequence[str],
    *,
    tick: Tick = untold,
) -> Gathered:
    """Look at the original once more, for its report: at prompts that didn't make the directions.

    Everything is read at the position where the chosen direction was found. Memory is one vector per prompt,
    layer and site.

    Args:
        handle: the original, nothing attached.
        edit: what was chosen.
        place: where its direction was found.
        directions: from the training split.
        target, baseline: validation prompts that the original refuses and answers; at most 200 a side are read.
        tick: called with the number of prompts done.
    """
    sides = [list(target[:MOST_PROMPTS]), list(baseline[:MOST_PROMPTS])]
    streams = [stream_at(handle, prompts, place.position, tick=tick) for prompts in sides]
    document = {
        "schema": SCHEMA,
        "place": {"layer": place.layer, "site": place.site, "position": place.position},
        "layers": handle.layers,
        "sites": list(SITES),
        "prompts": {"target": len(sides[0]), "baseline": len(sides[1]), "split": "validation"},
        "separation": separation(directions, streams[0], streams[1], place.position),
        "projection": _projection(streams[0], streams[1], place.site, sides),
        "cosines": cosines(directions, place.position),
        "writers": [{"name": w.name, "layer": w.layer, "side": w.side} for w in find_writers(handle)],
    }
    token_prompts = [
        (side, text)
        for side, prompts in zip(("target", "baseline"), sides, strict=True)
        for text in prompts[:TOKEN_PROMPTS]
    ]
    gathered = Gathered(document, place, direction_by_layer(edit, handle), token_prompts)
    _read_tokens(gathered, handle, "original")
    return gathered


@torch.inference_mode()
def stream_at(
    handle: Handle, prompts: Sequence[str], position: int, *, batch_size: int = 32, tick: Tick = untold
) -> Float[Tensor, "prompt layer site d_model"]:
    """Every prompt's stream at one position (-1 the last) of every site, float32; NaN where a block has no `mid`."""
    read = torch.full((len(prompts), handle.layers, len(SITES), handle.d_model), float("nan"))

    def look(part: list[int], layer: int, site: str, stream: Tensor) -> None:
        read[part, layer, SITES.index(site)] = stream[:, position].float().cpu()

    watched(handle, prompts, look, keep=-position, batch_size=batch_size, tick=tick)
    return read


def separation(
    directions: Directions,
    target: Float[Tensor, "n layer site d_model"],
    baseline: Float[Tensor, "m layer site d_model"],
    position: int,
) -> dict[str, dict[str, list[float | None]]]:
    """How far apart the two sides lie at every site and layer; None where the site doesn't exist.

    `cosine` is that of the sides' means, `target_norm` and `baseline_norm` the mean lengths of the vectors, `auc`
    that of the component along the training split's direction, `silhouette` that of the two clouds, and
    `separation` the training split's squared distance of the means over the summed variances.
    """
    table: dict[str, dict[str, list[float | None]]] = {}
    for row, site in enumerate(SITES):
        columns: dict[str, list[float | None]] = {}
        for layer in range(target.shape[1]):
            t, b = target[:, layer, row], baseline[:, layer, row]
            unit = directions.unit[layer, row, position]
            there = bool(t.isfinite().all() and b.isfinite().all() and unit.isfinite().all())
            values = {
                "cosine": cosine(t.mean(0), b.mean(0)),
                "target_norm": float(t.norm(dim=-1).mean()),
                "baseline_norm": float(b.norm(dim=-1).mean()),
                "auc": auc(t @ unit, b @ unit),
                "silhouette": silhouette(t, b),
                "separation": float(directions.separation[layer, row, position]),
            } if there else {}  # fmt: skip
            for name in ("cosine", "target_norm", "baseline_norm", "auc", "silhouette", "separation"):
                columns.setdefault(name, []).append(_number(values.get(name)))
        table[site] = columns
    return table


def cosines(directions: Directions, position: int) -> dict[str, list[list[float | None]]]:
    """Cosine between the directions of every two layers, for each site, at one position; None without a direction.

    The first layer has none at a token that all prompts share.
    """
    table = {}
    for row, site in enumerate(SITES):
        unit = directions.unit[:, row, position].double()
        unit[unit.norm(dim=-1) < 0.5] = float("nan")
        if unit.isfinite().any():
            table[site] = [[_number(value, 3) for value in line] for line in (unit @ unit.T).tolist()]
    return table


def direction_by_layer(edit: Edit, handle: Handle) -> Float[Tensor, "layer d_model"]:
    """What the edit takes most of out of each layer's writers; where it takes nothing, its strongest anywhere."""
    directions, strengths = torch.from_numpy(edit.directions), torch.from_numpy(edit.strengths).abs()
    strongest = directions[int(strengths.amax(0).argmax())]
    along = strongest.repeat(handle.layers, 1)
    rows = {name: row for row, name in enumerate(edit.writers)}
    for layer in range(handle.layers):
        mine = [rows[w.name] for w in find_writers(handle) if w.layer == layer and w.name in rows]
        sizes = strengths[mine].amax(0) if mine else torch.zeros(len(directions))
        if float(sizes.max()) > 0:
            along[layer] = directions[int(sizes.argmax())]
    return along


@torch.inference_mode()
def _read_tokens(gathered: Gathered, handle: Handle, state: str) -> None:
    """Put r.h/|h| at every token and layer of a few prompts under `tokens`, as `original` or `edited`."""
    shown = gathered.document.setdefault("tokens", [{"side": s, "prompt": p} for s, p in gathered.prompts])
    site, prompts = gathered.place.site, [entry["prompt"] for entry in shown]
    ids = [row[-MOST_TOKENS:] for row in handle.prompt_ids(prompts)]
    for entry, row in zip(shown, ids, strict=True):
        entry["tokens"] = [handle.tokenizer.decode([i]) for i in row]
        entry["site"] = site
        entry[state] = [None] * handle.layers

    def look(part: list[int], layer: int, where: str, stream: Tensor) -> None:
        if where == site:
            h = stream[:, -MOST_TOKENS:].double().cpu()
            shares = (h @ gathered.along[layer].double()) / h.norm(dim=-1).clamp_min(1e-30)
            for index, share in zip(part, shares.tolist(), strict=True):
                shown[index][state][layer] = [_number(value, 4) for value in share[-len(ids[index]) :]]

    if prompts:
        watched(handle, prompts, look, keep=max(map(len, ids)))


def _projection(
    target: Float[Tensor, "n layer site d_model"], baseline: Float[Tensor, "m layer site d_model"], site: str,
    prompts: Sequence[Sequence[str]],
) -> dict[str, Any]:  # fmt: skip
    row = SITES.index(site)
    both = torch.cat([target[:, :, row], baseline[:, :, row]])
    planes, shares = aligned_planes([both[:, layer] for layer in range(both.shape[1])])
    count = len(target)
    return {
        "site": site,
        "shares": [[_number(value, 3) for value in share] for share in shares],
        "target": [[[_number(v, 3) for v in point] for point in plane[:count].tolist()] for plane in planes],
        "baseline": [[[_number(v, 3) for v in point] for point in plane[count:].tolist()] for plane in planes],
        "prompts": {
            side: [shorten(text, 70) for text in texts]
            for side, texts in zip(("target", "baseline"), prompts, strict=True)
        },
    }


def compared(sides: Any, measured: Mapping[str, Measurement], *, show_completions: bool = False) -> dict[str, Any]:
    """The paired tests and some answers of the models measured, as they stand in report-data.json.

    Args:
        sides: the prompts; the test split's first few are kept with their answers.
        measured: the measurements on it by state: original, edited, healed.
        show_completions: keep answers to target prompts too; otherwise only whether they were refused.
    """
    baseline, target = sides.baseline.test.texts, sides.target.test.texts
    return {
        "paired": _paired_tests(measured),
        "show_completions": show_completions,
        "examples": {
            "baseline": _examples(baseline, measured, "baseline", answers=True),
            "target": _examples(target, measured, "target", answers=show_completions),
        },
    }


def write_data(document: dict[str, Any], folder: Path) -> None:
    """Write report-data.json into a run's folder."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    write_text(folder / NAME, text + "\n")


def read_data(folder: str | Path) -> dict[str, Any] | None:
    """The report-data.json of a run's folder; None where there is none that this version reads."""
    try:
        return read_object(Path(folder) / NAME, SCHEMA)
    except AbliterateError:
        return None


def _paired_tests(measured: Mapping[str, Measurement]) -> dict[str, Any]:
    """Edited against original, and under `healed` healed against edited."""
    tests: dict[str, Any] = {}
    for key, side in (("refusal", "target"), ("over_refusal", "baseline")):
        verdicts = {state: getattr(found, f"refused_{side}") for state, found in measured.items()}
        if "original" in verdicts and "edited" in verdicts:
            tests[key] = paired(verdicts["original"], verdicts["edited"])
        if "healed" in verdicts:
            found = paired(verdicts["edited"], verdicts["healed"])
            names = {"only_edited": found["only_original"], "only_healed": found["only_edited"], "p": found["p"]}
            tests.setdefault("healed", {})[key] = names
    return tests


def _examples(
    prompts: Sequence[str], measured: Mapping[str, Measurement], side: str, *, answers: bool
) -> list[dict[str, Any]]:
    shown = []
    for index, prompt in enumerate(prompts[:EXAMPLES]):
        entry: dict[str, Any] = {"prompt": prompt}
        for name, found in measured.items():
            entry[name] = {"refused": bool(getattr(found, f"refused_{side}")[index])}
            if side == "target" and found.verdicts is not None:
                entry[name]["evaded"] = found.verdicts[index] == "evaded"
            if answers:
                entry[name]["answer"] = getattr(found, f"{side}_answers")[index].text[:LONGEST_ANSWER]
        shown.append(entry)
    return shown


def _number(value: float | None, digits: int = 5) -> float | None:
    """Rounded to `digits` decimals; None where there is none."""
    return round(value, digits) if value is not None and math.isfinite(value) else None
