"""The edit searched by Optuna's multi-objective TPE: for objectives without gradients.

The edit is the one that gradients fit: a direction per layer, from the difference of means, and a strength per
writer. Here few numbers make it, since each trial costs whole answers: over the depth of the model the strength
goes up to a peak and down again in two ramps, once for attention and once for MLPs.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.apply.hooks import attached
from abliterate.common.errors import AbliterateError, NonFiniteError, shorten
from abliterate.common.reporting import SILENT, Reporter
from abliterate.directions.means import Directions
from abliterate.edit.edit import Edit, Part, as_array, from_parts, normalised
from abliterate.models.handle import Handle
from abliterate.models.writers import SITES, Writer, find_writers
from abliterate.search.frontier import FrontierPoint, non_dominated
from abliterate.search.objectives import DivergenceFromOriginal, Objective, Refusals

STUDY = "abliterate"
STARTUP = 20  # trials drawn at random before the sampler models them
STRONGEST = 1.5  # beyond 1 a direction is turned around
NEGLIGIBLE = 0.02  # a strength below it leaves the writer alone
RUINED = 1e6  # an objective's score where the edited model gives no finite numbers


@dataclass(frozen=True)
class TpeSettings:
    """How long and where a search runs.

    Attributes:
        trials: finished trials of the study after which the search ends, those of other processes counted.
        seed: a single process gives the same trials for the same seed, interrupted and resumed or not.
        study: a journal file or an RDB URL (sqlite:///x.db); None keeps the study in memory.
        resume: go on with a study that exists, or join the processes that work on it.
        layers: only the writers of these blocks.
    """

    trials: int = 200
    seed: int = 0
    study: str | None = None
    resume: bool = False
    layers: range | None = None


class Ramps(NamedTuple):
    """Strength over depth: `height` at `peak`, falling linearly to `floor` at `width` from it, on both sides.

    `peak` and `width` are shares of the depth, `floor` is a share of `height`.
    """

    height: float
    peak: float
    width: float
    floor: float

    def at(self, depth: float) -> float:
        """Strength at a depth, from 0 (first block) to 1 (last block)."""
        ramp = max(0.0, 1.0 - abs(depth - self.peak) / self.width)
        strength = self.height * (self.floor + (1.0 - self.floor) * ramp)
        return strength if strength >= NEGLIGIBLE else 0.0


class Shape(NamedTuple):
    """The numbers that make an edit.

    Attributes:
        attention, mlp: strengths of the two kinds of writers.
        embedding: strength at the embedding.
        layer: depth of the direction all writers share, between two layers interpolated; None gives every layer
            its own.
    """

    attention: Ramps
    mlp: Ramps
    embedding: float
    layer: float | None


def tpe(
    handle: Handle,
    directions: Directions,
    refusals: Refusals,
    divergence: DivergenceFromOriginal,
    settings: TpeSettings | None = None,
    *,
    objectives: Sequence[Objective] | None = None,
    reporter: Reporter = SILENT,
) -> list[FrontierPoint]:
    """Search, and return the frontier of all trials of the study.

    Multi-objective TPE: Ozaki et al. 2022, "Multiobjective tree-structured Parzen estimator".

    Args:
        handle: the original model; edits are attached live and gone afterwards.
        directions: from `difference_of_means`; those of the last position are used.
        refusals, divergence: the two numbers of a frontier's point.
        settings: trials, seed, study.
        objectives: what is minimised; by default the two above. Where they are not among these, they are
            measured on the trials that no other dominates. A further divergence among these is of prompts that are
            kept, and counts for the frontier as the one above does.
        reporter: told about stages and progress.

    Returns:
        Points no other one dominates in refusals and divergence (`FrontierPoint.drift`), fewest refusals first.

    Raises:
        AbliterateError: when Optuna isn't installed, the study exists and `resume` is off, it can't be opened,
            or it was made for other objectives, another model or other prompts.
    """
    settings = settings or TpeSettings()
    aims = list(objectives or (refusals, divergence))
    builder = _Builder(handle, directions, settings.layers)
    with _quiet():
        made_for = {
            "objectives": [aim.name for aim in aims],
            "work": _fingerprint(handle, refusals, divergence, settings, _kept(aims, divergence)),
            "directions": _sketch(directions),
        }
        study = _open_study(settings, made_for)
        tick = reporter.progress("searching", settings.trials)
        done = _finished(study)
        if done:
            tick(min(done, settings.trials))
        while done < settings.trials:
            trial = _ask(study, settings.seed)
            edit = builder.edit(suggested(trial))
            scores = _scored(study, trial, handle, edit, aims)
            now = _finished(study)
            tick(max(0, min(now, settings.trials) - done))
            done = now
            if any(best.number == trial.number for best in study.best_trials):
                said = ", ".join(f"{aim.name} {score:.4g}" for aim, score in zip(aims, scores, strict=True))
                reporter.say(f"trial {done} of {settings.trials} is on the frontier: {said}")
        return _frontier(handle, builder, study.best_trials, aims, refusals, divergence)


def suggested(trial: Any) -> Shape:
    """The shape that a trial suggests; ten numbers and a choice, all always drawn."""
    ramps = {
        side: Ramps(
            trial.suggest_float(f"{side}_height", 0.0, STRONGEST),
            trial.suggest_float(f"{side}_peak", 0.2, 1.0),
            trial.suggest_float(f"{side}_width", 0.05, 1.0),
            trial.suggest_float(f"{side}_floor", 0.0, 1.0),
        )
        for side in ("attention", "mlp")
    }
    embedding = trial.suggest_float("embedding", 0.0, 1.0)
    layer = trial.suggest_float("direction_layer", 0.3, 0.9)
    shared = trial.suggest_categorical("direction", ["shared", "per layer"]) == "shared"
    return Shape(ramps["attention"], ramps["mlp"], embedding, layer if shared else None)


class _Builder:
    """Edits of one model out of shapes."""

    def __init__(self, handle: Handle, directions: Directions, layers: range | None) -> None:
        self.writers = find_writers(handle, layers)
        self.count, self.d_model = handle.layers, handle.d_model
        self.unit = directions.unit[:, :, -1]

    def edit(self, shape: Shape) -> Edit:
        """The edit of a shape; writers of no strength are left out."""
        shared = None if shape.layer is None else self._between(shape.layer * (self.count - 1))
        parts = {}
        for writer in self.writers:
            strength = self._strength(shape, writer)
            if strength:
                direction = self._own(writer) if shared is None else shared
                parts[writer.name] = Part(as_array(direction)[None], np.array([strength], np.float32))
        return from_parts(parts, self.d_model)

    def _strength(self, shape: Shape, writer: Writer) -> float:
        if writer.layer is None:
            return shape.embedding if shape.embedding >= NEGLIGIBLE else 0.0
        ramps = shape.attention if writer.side == "attention" else shape.mlp
        return ramps.at(writer.layer / max(1, self.count - 1))

    def _own(self, writer: Writer) -> Float[Tensor, " d_model"]:
        """The direction at the site that a writer writes to."""
        if writer.layer is None:
            # before the first block the last token is the same for every prompt: there is no difference yet
            return self._at(min(1, self.count - 1), "pre")
        if writer.side == "attention":
            mid = self.unit[writer.layer, SITES.index("mid")]
            if bool(mid.isfinite().all()):  # parallel blocks have no such site
                return mid
        return self._at(writer.layer, "post")

    def _between(self, layer: float) -> Float[Tensor, " d_model"]:
        """The direction before a layer; between two, along their weighted sum."""
        low = max(1, math.floor(layer)) if self.count > 1 else 0
        high = min(low + 1, self.count - 1)
        share = min(1.0, max(0.0, layer - low))
        return torch.from_numpy(normalised((1 - share) * self._at(low, "pre") + share * self._at(high, "pre")))

    def _at(self, layer: int, site: str) -> Float[Tensor, " d_model"]:
        return self.unit[layer, SITES.index(site)]


def _scored(study: Any, trial: Any, handle: Handle, edit: Edit, aims: Sequence[Objective]) -> list[float]:
    """Measure an edit and tell the study; a trial cut short counts for nothing."""
    import optuna

    try:
        with attached(handle, edit):
            scores = [float(aim.score(handle)) for aim in aims]
    except NonFiniteError:
        scores = [RUINED] * len(aims)
    except BaseException:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise
    study.tell(trial, scores)
    return scores


def _frontier(
    handle: Handle, builder: _Builder, trials: Sequence[Any], aims: Sequence[Objective], refusals: Refusals,
    divergence: DivergenceFromOriginal,
) -> list[FrontierPoint]:  # fmt: skip
    import optuna

    points = []
    for trial in trials:
        if max(trial.values) >= RUINED:
            continue
        # its parameters are suggested again as they were
        edit = builder.edit(suggested(optuna.trial.FixedTrial(trial.params)))
        scores = dict(zip(map(id, aims), trial.values, strict=True))
        with attached(handle, edit):
            refused, apart = (
                scores[id(aim)] if id(aim) in scores else aim.score(handle) for aim in (refusals, divergence)
            )
        note = {
            "trial": trial.number,
            "parameters": dict(trial.params),
            "objectives": {aim.name: score for aim, score in zip(aims, trial.values, strict=True)},
        }
        also = sum(scores[id(aim)] for aim in _kept(aims, divergence))
        points.append(FrontierPoint(edit, refusals.rate(refused), apart, note, also=also))
    return non_dominated(points)


def _kept(aims: Sequence[Objective], divergence: DivergenceFromOriginal) -> list[DivergenceFromOriginal]:
    """The objectives that are divergences on other prompts than the baseline's."""
    return [aim for aim in aims if isinstance(aim, DivergenceFromOriginal) and aim is not divergence]


# --- The study ----------------------------------------------------------------------------------------


def _open_study(settings: TpeSettings, made_for: dict[str, Any]) -> Any:
    """Make the study or take up the one that is there, if it was made for the same."""
    optuna = _optuna()
    storage = _storage(settings.study)
    exists = settings.study is not None and STUDY in optuna.study.get_all_study_names(storage=storage)
    if exists and not settings.resume:
        raise AbliterateError(
            f"study {settings.study} exists; go on with it, or join the processes that work on it, with --resume, "
            "or name another with --study"
        )
    directions = ["minimize"] * len(made_for["objectives"])
    study = optuna.create_study(study_name=STUDY, storage=storage, directions=directions, load_if_exists=True)
    for key, value in made_for.items():
        known = study.user_attrs.get(key)
        if known is None:
            study.set_user_attr(key, value)
        elif not _same(known, value):
            what = {"objectives": "objectives", "directions": "directions"}.get(key, "model, prompts or layers")
            raise AbliterateError(f"study {settings.study} was made with other {what}; name another with --study")
    _bury(study)
    return study


def _same(known: list[Any] | str, value: list[Any] | str) -> bool:
    """Whether two marks are equal, numbers up to rounding: threads and devices sum in other orders."""
    if isinstance(value, list) and isinstance(known, list) and all(isinstance(v, float) for v in value):
        return len(known) == len(value) and all(abs(a - b) < 0.02 for a, b in zip(known, value, strict=True))
    return known == value


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise AbliterateError("--method tpe needs Optuna: pip install 'abliterate[search]'") from error
    return optuna


def _storage(study: str | None) -> Any:
    """Where a study lives: None is memory, an URL a database, all else a journal file."""
    optuna = _optuna()
    if study is None:
        return None
    try:
        if "://" in study:
            return optuna.storages.RDBStorage(study)
        path = Path(study).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    except Exception as error:  # the database's driver raises its own kinds
        raise AbliterateError(f"study {study} can't be opened: {shorten(str(error), 200)}") from error


def _fingerprint(
    handle: Handle, refusals: Refusals, divergence: DivergenceFromOriginal, settings: TpeSettings,
    kept: Sequence[DivergenceFromOriginal],
) -> str:  # fmt: skip
    """Sha256 of what the trials of one study must share: model, prompts, layers."""
    shared = (handle.config_hash, refusals.prompts, divergence.reference.rows, settings.layers)
    others = tuple(aim.reference.rows for aim in kept)
    return hashlib.sha256(repr(shared + others).encode()).hexdigest()


def _sketch(directions: Directions) -> list[float]:
    """Eight numbers that tell sets of directions apart: their summed products with random vectors."""
    unit = directions.unit[:, :, -1].nan_to_num().flatten(0, 1)
    vectors = torch.randn(unit.shape[1], 8, generator=torch.Generator().manual_seed(0))
    signs = torch.randn(len(unit), 8, generator=torch.Generator().manual_seed(1)).sign()
    return ((unit @ vectors) * signs).mean(0).mul(len(unit) ** 0.5).tolist()


def _ask(study: Any, seed: int) -> Any:
    """A new trial, drawn by a seed of its own: by the place it has among the trials that count.

    So a resumed search draws what an uninterrupted one would, and processes side by side draw different ones.
    """
    import optuna

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.RUNNING)
    place = len(study.get_trials(deepcopy=False, states=states))
    study.sampler = optuna.samplers.TPESampler(
        seed=seed * 1_000_003 + place, n_startup_trials=STARTUP, multivariate=True, constant_liar=True
    )
    trial = study.ask()
    trial.set_user_attr("process", _process())
    return trial


def _bury(study: Any) -> None:
    """Fail the trials of processes of this machine that are no more: nobody will finish them."""
    import optuna

    machine = _process().split(":")[0]
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        host, _, process = trial.user_attrs.get("process", ":").partition(":")
        if host == machine and not psutil.pid_exists(int(process)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def _process() -> str:
    """This process, and its machine by a hash: a study may be shared, names of machines need not be."""
    return f"{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}:{os.getpid()}"


def _finished(study: Any) -> int:
    import optuna

    return len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna without its log and its warnings about what is experimental, until the block ends."""
    optuna = _optuna()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
