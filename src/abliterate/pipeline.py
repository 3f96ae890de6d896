"""The main job: find the direction, choose it by measurement, remove it, prove the result, write it down."""

from __future__ import annotations

import copy
import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import abliterate
from abliterate.activations import Activations, collect
from abliterate.activations_file import load_activations, save_activations
from abliterate.behaviours import Behaviour, load_behaviour
from abliterate.behaviours.contrast import collect_contrast, contrast
from abliterate.behaviours.prompts import behaviour_sides
from abliterate.directions import Directions, difference_of_means
from abliterate.edit import Edit
from abliterate.errors import AbliterateError, NothingToDoError, OutputError, PromptError, WriterError
from abliterate.files import check_folder, check_space, whole_folder
from abliterate.keeping import keeping
from abliterate.loading import DTYPES, load
from abliterate.measure import Measurement, measure
from abliterate.measure.decode import decode
from abliterate.measure.judges import Judge, make_judge
from abliterate.measure.rates import Rate
from abliterate.model import Handle, find_prefill
from abliterate.prompts import Sides, load_sides
from abliterate.publish.card import public_name, write_card
from abliterate.recipe import Recipe, config_file, save_recipe
from abliterate.report import html_missing, write_html
from abliterate.report.gather import Gathered, gather
from abliterate.reporting import Reporter as Reporter
from abliterate.reporting import Silent as Silent
from abliterate.reporting import Tick
from abliterate.search.candidates import Choice, Choose, Show
from abliterate.search.frontier import FrontierPoint
from abliterate.searching import Work, forget, search
from abliterate.settings import LoadSettings, PromptSettings, RunSettings
from abliterate.showing import FILTER_TOKENS as FILTER_TOKENS
from abliterate.showing import Shown as Shown
from abliterate.showing import showing as showing
from abliterate.stored import stored_names, stored_tensors
from abliterate.writers import Proof, check_proof, find_writers, prove, tolerance

SCHEMA = 1
LEAST_PROMPTS = 8
LEAST_REFUSAL_RATE = 0.15


@dataclass
class Result:
    """What a run did; `document` is results.json."""

    out: Path
    edit: Edit
    original: Measurement
    edited: Measurement
    document: dict[str, Any]


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 3)


def open_model(source: str, settings: LoadSettings) -> Handle:
    """Load a model as the settings say."""
    return load(
        source,
        dtype=settings.dtype,
        device_map=settings.device_map,
        quantise=settings.quantise,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        chat_template=settings.chat_template,
        system_prompt=settings.system_prompt,
        prefill=settings.prefill,
    )


def open_prompts(settings: PromptSettings, seed: int, behaviour: Behaviour | None = None) -> Sides:
    """Load both sides' prompts as the settings say, or else the behaviour."""
    if behaviour is not None and behaviour.name != "refusal":
        return behaviour_sides(behaviour, settings, seed)
    return load_sides(
        settings.target,
        settings.baseline,
        target_column=settings.target_column,
        baseline_column=settings.baseline_column,
        seed=seed,
        limit_train=settings.train_prompts,
        limit_validation=settings.validation_prompts,
        limit_test=settings.test_prompts,
    )


def set_prefill(handle: Handle, prompts: Sequence[str], reporter: Reporter | None = None) -> None:
    """When every answer opens with one reasoning mark, close it at once by a prefill."""
    if handle.prefill is not None:
        return
    ids = handle.prompt_ids(prompts[:4])
    openings = decode(handle, ids, max_new_tokens=8, keep_special=True)
    texts = [handle.tokenizer.decode(row) for row in ids]
    prefill = find_prefill([a.text for a in openings], texts)
    if prefill:
        handle.prefill = prefill
        (reporter or Silent()).say(f"answers open with a reasoning mark; prefilling {prefill!r} (--prefill to change)")


def run(
    model: str,
    out: str | Path,
    settings: RunSettings | None = None,
    *,
    activations: str | Path | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    choose: Choose | None = None,
    show: Show | None = None,
    show_completions: bool = False,
) -> Result:
    """Find, choose, remove and prove; write model/, recipe.safetensors, results.json and the report into `out`.

    Args:
        model: Hub id, folder or GGUF file.
        out: output folder; it appears only when whole.
        settings: everything else.
        activations: a file that `collect` saved, instead of collecting.
        overwrite: replace `out` if it is not empty.
        reporter: told about stages and progress.
        choose: for the article's method: which of the passing candidates to take.
        show: for the article's method: shown headings and answers.
        show_completions: keep a few answers to target prompts in report-data.json and, folded, in the report.

    Raises:
        AbliterateError: any of the errors in `abliterate.errors`; nothing is written then.
        NothingToDoError: the model hardly refuses, and `settings.force` is off.
    """
    settings, reporter, clock = settings or RunSettings(), reporter or Silent(), _Clock()
    settings, behaviour = resolve_behaviour(settings, reporter)
    if behaviour.runs_as_style:
        from abliterate.styling import run_style

        if activations is not None or show_completions or (choose is not None and settings.search.interactive):
            raise AbliterateError(
                f"behaviour {behaviour.name} has a search of its own; leave --activations, --interactive and "
                "--show-completions out"
            )
        return run_style(model, out, settings, behaviour, overwrite=overwrite, reporter=reporter)
    check_folder(out, overwrite=overwrite)
    _check_apart(out, model, activations)
    if activations is not None:
        load_activations(activations)  # whether it is there and whole; once more below, against the model
    judge = make_judge(settings.measure.judge)
    with clock.stage("prompts"):
        sides = open_prompts(settings.prompts, settings.seed, behaviour)
    for note in sides.notes:
        reporter.say(note)
    reporter.say(f"loading {model}")
    with clock.stage("load"):
        handle = open_model(model, settings.load)
    check_space(out, _bytes_to_write(handle))
    reporter.say(_loaded(handle))
    stored = None if activations is None else load_activations(activations, handle)
    _check_lengths(handle, sides)
    torch.manual_seed(settings.seed)
    with clock.stage("prove"):
        proof = check_proof(handle)
    reporter.say(f"{len(find_writers(handle))} writers found; proof: largest component left {proof.component:.1e}")
    with clock.stage("filter"):
        set_prefill(handle, sides.target.train.texts, reporter)
        # activations from a file were filtered when they were collected; the fit wants the answers
        filters = stored is None or settings.search.method == "fit"
        shown = _filtered(handle, sides, "train", judge, settings, reporter) if filters else None
        validation = _filtered(handle, sides, "validation", judge, settings, reporter)
    with clock.stage("collect"):
        if stored is not None:
            reporter.say(f"activations from {activations}")
        else:
            assert shown is not None
            stored = _collected(handle, shown, settings, reporter)
    directions = difference_of_means(stored, projected=settings.collect.projected)
    with clock.stage("keep"):
        contrasted = shown.baseline if shown else list(sides.baseline.train.texts)
        directions, kept = keeping(handle, settings.keep, directions, contrasted, settings.seed, reporter)
    with clock.stage("search"):
        work = Work(
            handle, directions, shown, validation, sides, judge, settings, reporter, Path(out), choose, show, kept
        )
        choice = search(work)
    with clock.stage("report data"):
        gathered = _gathered(handle, choice, directions, validation, reporter)
        gathered.document["activations"] = public_name(str(activations)) if activations else None
    with clock.stage("measure original"):
        original = _measure(handle, sides, judge, settings, reporter, "original")
        if kept is not None:
            kept.watch(handle, judge, **_decoding(settings))
    with whole_folder(out, overwrite=overwrite) as folder:
        tied = _tied(handle, choice.edit, settings.keep_tied)
        with clock.stage("edit"):
            live = _attach_or_bake(handle, choice.edit, settings, reporter)
        with live:
            left = _check_removed(handle, choice.edit)
            with clock.stage("measure edited"):
                edited = _measure(handle, sides, judge, settings, reporter, "edited", original)
                kept_found = kept.to_json(handle, choice.edit, judge, **_decoding(settings)) if kept else None
            gathered.look_at_edited(handle)
        with clock.stage("save"):
            proofs = {"writers": proof, "edited": left}
            document = _document(handle, settings, sides, shown, choice, original, edited, proofs, clock)
            document["recipe"]["tied"] = tied
            document["behaviour"] = behaviour.to_json()
            if kept_found:
                document["kept"] = kept_found
            save_recipe(_recipe(handle, choice, document), folder / "recipe.safetensors")
            document["frontier"] = _save_frontier(handle, choice, document, folder, clock)
            _save_model(_to_save(handle, choice.edit, settings), folder / "model")
            write_card(folder / "model" / "README.md", handle, document)
        document["timings_s"] = clock.seconds
        (folder / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        gathered.compare(sides, original, edited, show_completions=show_completions)
        gathered.save(folder)
    forget(out)
    _report(out, reporter, show_completions)  # the result is in place: nothing that goes wrong here can lose it
    return Result(Path(out), choice.edit, original, edited, document)


def resolve_behaviour(settings: RunSettings, reporter: Reporter | None = None) -> tuple[RunSettings, Behaviour]:
    """The settings with the behaviour's judge and defaults, and the behaviour; says what it changes.

    Raises:
        AbliterateError: when there is no such behaviour, or its file is wrong.
    """
    behaviour = load_behaviour(settings.behaviour)
    settings, notes = behaviour.resolved(settings)
    for note in notes:
        (reporter or Silent()).say(note)
    return settings, behaviour


def _decoding(settings: RunSettings) -> dict[str, int]:
    return {"max_new_tokens": settings.measure.max_new_tokens, "batch_size": settings.measure.batch_size}


def _check_apart(out: str | Path, model: str, activations: str | Path | None) -> None:
    """Raise OutputError when `out` holds what the run reads: --overwrite would remove it."""
    folder = Path(out).resolve()
    for source in (model, activations):
        path = Path(source or "").expanduser()
        if source and path.exists() and path.resolve().is_relative_to(folder):
            raise OutputError(f"output folder {out} holds {source}, which is read; name another with --out")


def _check_lengths(handle: Handle, sides: Sides) -> None:
    """Raise PromptError, before the work, when a prompt of any split is longer than the context."""
    for side in (sides.target, sides.baseline):
        for part in side:
            handle.prompt_ids(part.texts)


def _filtered(
    handle: Handle, sides: Sides, split: str, judge: Judge, settings: RunSettings, reporter: Reporter
) -> Shown:
    """One split's prompts after the filter; stops when the model hardly shows the behaviour."""
    target, baseline = (list(getattr(side, split).texts) for side in (sides.target, sides.baseline))
    if not settings.collect.filter:
        if settings.search.method == "fit":  # it needs the model's own words all the same
            shown = showing(handle, target, baseline, judge, reporter, tokens=_filter_tokens(settings))
            return replace(shown, target=target, baseline=baseline)
        return Shown(target, baseline, Rate(len(target), len(target)), Rate(len(baseline), len(baseline)))
    shown = showing(handle, target, baseline, judge, reporter, tokens=_filter_tokens(settings))
    word = load_behaviour(settings.behaviour).words.shows
    answered = "answered" if word == "refused" else f"not {word}"
    reporter.say(
        f"{split}: {shown.refused.count} of {shown.refused.total} target prompts {word} and "
        f"{shown.answered.count} of {shown.answered.total} baseline prompts {answered}; these count"
    )
    return _enough(handle, shown, target, baseline, settings, reporter, split)


def _filter_tokens(settings: RunSettings) -> int:
    """How long the filter's answers are: a style needs more of them to show than a refusal."""
    is_style = load_behaviour(settings.behaviour).is_style
    return settings.measure.max_new_tokens if is_style else FILTER_TOKENS


def _enough(
    handle: Handle, shown: Shown, target: list[str], baseline: list[str], settings: RunSettings,
    reporter: Reporter, split: str,
) -> Shown:  # fmt: skip
    few = shown.refused.rate < LEAST_REFUSAL_RATE or len(shown.target) < min(LEAST_PROMPTS, len(target))
    if few and not settings.force:
        low, high = shown.refused.ci95
        word = load_behaviour(settings.behaviour).words.shows
        does = "hardly refuses" if word == "refused" else f"is hardly {word}"
        raise NothingToDoError(
            f"{handle.source} {does}: {shown.refused.count} of {shown.refused.total} target prompts "
            f"({shown.refused.rate:.0%}, 95% interval {low:.0%} to {high:.0%}) in the {split} split; there is nothing "
            "to remove. Pass --force to go on with all prompts"
        )
    if few:
        reporter.say("too few prompts left by the filter; --force: all of them count")
        shown = replace(shown, target=target)
    if len(shown.baseline) < min(LEAST_PROMPTS, len(baseline)):
        if not settings.force:
            raise PromptError(
                f"{handle.source} answers only {len(shown.baseline)} of {shown.answered.total} baseline prompts in the "
                f"{split} split; at least {LEAST_PROMPTS} are needed. Give others with --baseline, or pass --force"
            )
        shown = replace(shown, baseline=baseline)
    return shown


def _collected(
    handle: Handle, shown: Shown, settings: RunSettings, reporter: Reporter, *, keep_vectors: bool = False
) -> Activations:
    """Collect as the settings say."""
    tick = reporter.progress("collecting activations", len(shown.target) + len(shown.baseline))
    return collect(
        handle,
        shown.target,
        shown.baseline,
        positions=settings.collect.positions,
        batch_size=settings.collect.batch_size,
        winsorise=settings.collect.winsorise,
        keep_vectors=keep_vectors,
        tick=tick,
    )


def _gathered(
    handle: Handle, choice: Choice, directions: Directions, validation: Shown, reporter: Reporter
) -> Gathered:
    """What the report needs of the original, read before the edit."""
    target, baseline = validation.target, validation.baseline
    tick = reporter.progress("reading activations for the report", len(target) + len(baseline))
    return gather(handle, choice.edit, choice.winner.place, directions, target, baseline, tick=tick)


def _report(out: str | Path, reporter: Reporter, show_completions: bool) -> None:
    """Write report.html, or say what it needs."""
    missing = html_missing()
    if missing:
        reporter.say(f"no report.html: {missing}")
    else:
        write_html(out, show_completions=show_completions)


def _measure(
    handle: Handle, sides: Sides, judge: Judge, settings: RunSettings, reporter: Reporter, name: str,
    original: Measurement | None = None,
) -> Measurement:  # fmt: skip
    def progress(stage: str, total: int) -> Tick | None:
        return reporter.progress(f"{name}: {stage}", total)

    return measure(
        handle,
        sides.target.test.texts,
        sides.baseline.test.texts,
        original=original,
        judge=judge,
        max_new_tokens=settings.measure.max_new_tokens,
        batch_size=settings.measure.batch_size,
        progress=progress,
    )


def _bakes_in_place(handle: Handle) -> bool:
    """Whether the loaded weights are what will be saved; else a fresh copy in the source's dtype is edited."""
    return handle.quantised is None and handle.source_dtype in (None, handle.dtype)


def _attach_or_bake(
    handle: Handle, edit: Edit, settings: RunSettings, reporter: Reporter
) -> AbstractContextManager[Any]:
    """Bake the edit where these weights will be saved; else attach it live for measuring."""
    if _bakes_in_place(handle) or (settings.keep_tied and handle.tied and not handle.quantised):
        # hooks can't edit the head with the embedding
        reporter.say("baking the edit into the weights")
        edit.bake(handle, keep_tied=settings.keep_tied)
        return nullcontext()
    precision = "full precision" if handle.quantised else str(handle.source_dtype).removeprefix("torch.")
    reporter.say(f"measuring with the edit attached live; a copy in {precision} will be edited and saved")
    return edit.attached(handle)


def _to_save(handle: Handle, edit: Edit, settings: RunSettings) -> Handle:
    """The handle whose weights hold the edit in the dtype the source has on disk."""
    if _bakes_in_place(handle):
        return handle
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtype = names.get(handle.source_dtype or handle.dtype, "auto")
    plain = settings.load.model_copy(update={"dtype": dtype, "quantise": None, "device_map": "cpu"})
    copy = open_model(handle.source, plain)
    edit.bake(copy, keep_tied=settings.keep_tied)
    return copy


def _check_removed(handle: Handle, edit: Edit) -> Proof:
    left = prove(handle, edit.directions[0])
    whole = len(edit.writers) == len(find_writers(handle)) and bool((edit.strengths == 1).all())
    # a direction that the weights are large along leaves more of their rounding than a random one: in half precision
    # the bound is what tells it from a missed writer, which leaves 1/sqrt(d_model)
    half = 0.4 * handle.d_model**-0.5 if handle.dtype.itemsize < 4 else 0.0
    if whole and left.component > max(tolerance(handle), half):
        raise WriterError(
            f"after baking, a component of {left.component:.1e} is left at {left.where}; nothing was written"
        )
    return left


def _bytes_to_write(handle: Handle) -> int:
    size = sum(p.numel() for p in handle.model.parameters())
    embedding = handle.vocabulary * handle.d_model if handle.tied else 0
    per_weight = (handle.source_dtype or handle.dtype).itemsize
    return int(1.02 * (size + embedding) * per_weight) + 32 * 2**20


def _loaded(handle: Handle) -> str:
    size = sum(p.numel() for p in handle.model.parameters())
    return (
        f"{type(handle.model).__name__}, {size / 1e6:,.0f} M parameters, {handle.layers} layers, "
        f"d_model {handle.d_model}, {str(handle.dtype).removeprefix('torch.')} on {handle.device}"
    )


def _save_model(handle: Handle, folder: Path) -> None:
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


def _document(
    handle: Handle, settings: RunSettings, sides: Sides, shown: Shown | None, choice: Choice, original: Measurement,
    edited: Measurement, proofs: dict[str, Proof], clock: _Clock,
) -> dict[str, Any]:  # fmt: skip
    return {
        "schema": SCHEMA,
        "model": {
            "source": handle.source,
            "revision": handle.revision,
            "class": type(handle.model).__name__,
            "config_hash": handle.config_hash,
            "parameters": sum(p.numel() for p in handle.model.parameters()),
            "layers": handle.layers,
            "d_model": handle.d_model,
            "dtype": str(handle.dtype).removeprefix("torch."),
            "prefill": handle.prefill,
        },
        "recipe": {
            "file": "recipe.safetensors",
            "method": settings.search.method,
            "direction": choice.winner.to_json(),
            "writers": len(choice.edit.writers),
            "strength": _span(choice.edit),
            "proof": {name: {"component": p.component, "where": p.where} for name, p in proofs.items()},
        },
        "settings": settings.model_dump(),
        "prompts": {
            "target": _sides_json(sides.target),
            "baseline": _sides_json(sides.baseline),
            "filter": shown.to_json() if shown and settings.collect.filter else None,
            "notes": list(sides.notes),
        },
        "environment": environment(handle),
        "original": original.to_json(),
        "edited": edited.to_json(),
        "candidates": [c.to_json() for c in choice.candidates],
        "frontier": [],
        "timings_s": clock.seconds,
    }


def _save_frontier(
    handle: Handle, choice: Choice, document: dict[str, Any], folder: Path, clock: _Clock
) -> list[dict[str, Any]]:
    """A recipe per point of the frontier, with what validation found; the chosen one is marked."""
    listed = []
    for number, point in enumerate(choice.frontier):
        name = f"frontier/{number:02}.safetensors"
        (folder / "frontier").mkdir(exist_ok=True)
        validation = point.to_json()
        whole = _recipe(handle, replace(choice, edit=point.edit), document)
        kept = {k: v for k, v in whole.provenance.items() if k not in ("original", "edited")}
        save_recipe(replace(whole, provenance={**kept, "validation": validation}), folder / name)
        listed.append({**validation, **_found(point, clock), "recipe": name, "chosen": point.edit is choice.edit})
    return listed


def _found(point: FrontierPoint, clock: _Clock) -> dict[str, float]:
    """How long after the run's start a point was there, and the process's CPU seconds until then."""
    if point.found is None:
        return {}
    return {"seconds": round(point.found.clock - clock.started, 1), "cpu_seconds": round(point.found.cpu, 1)}


def _span(edit: Edit) -> dict[str, float]:
    """Least and greatest strength among those that do anything."""
    used = edit.strengths[edit.strengths != 0]
    return {"min": float(used.min()), "max": float(used.max())}


def _tied(handle: Handle, edit: Edit, keep_tied: bool) -> str | None:
    """What becomes of an embedding tied to the head: "kept" or "untied"; None when it isn't tied or isn't edited."""
    embedded = any(w.side == "embedding" and w.name in edit.writers for w in find_writers(handle))
    return ("kept" if keep_tied else "untied") if handle.tied and embedded else None


def _sides_json(splits: Any) -> dict[str, Any]:
    return {
        "source": splits.source,
        **{name: {"count": len(part), "sha256": part.sha256} for name, part in _parts(splits)},
    }


def _parts(splits: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(splits, name)) for name in ("train", "validation", "test")]


def environment(handle: Handle | None = None) -> dict[str, Any]:
    """Versions and machine behind a result; no host or user name."""
    import transformers

    return {
        "abliterate": abliterate.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "device": str(handle.device) if handle else ("cuda" if torch.cuda.is_available() else "cpu"),
    }


def _recipe(handle: Handle, choice: Choice, document: dict[str, Any]) -> Recipe:
    """The edit with its provenance: nothing in it depends on the time or the output's place."""
    model = {k: document["model"][k] for k in ("source", "revision", "class", "config_hash", "layers", "d_model")}
    model["source"] = public_name(model["source"])  # a recipe is shared: no path of this machine in it
    # what baking untied was tied in the model that the recipe is for
    model |= stored_names(handle) | {"tied": handle.tied or document["recipe"]["tied"] is not None}
    model |= config_file(handle.source)
    provenance: dict[str, Any] = {
        "found_at": choice.winner.to_json(),
        "prompts": {
            name: {**part, "source": public_name(part["source"])} if name in ("target", "baseline") else part
            for name, part in document["prompts"].items()
        },
        "settings": _shared_settings(document["settings"]),
        "environment": document["environment"],
        "original": document["original"],
        "edited": document["edited"],
        **{key: document[key] for key in ("behaviour", "kept") if key in document},
    }
    # a quantised model's weights have other shapes in memory: whoever applies the recipe looks at the checkpoint
    tensors = {} if handle.quantised else stored_tensors(handle)
    used = {writer: tensors[writer] for writer in choice.edit.writers if tensors}
    return Recipe(choice.edit, model, provenance, used)


def _shared_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings behind a recipe, local prompt files without their paths."""
    prompts = dict(settings["prompts"])
    for side in ("target", "baseline"):
        prompts[side] = public_name(prompts[side]) if prompts[side] else None
    kept = {name: value for name, value in settings.items() if name != "resume"} | {"prompts": prompts}
    for name in ("behaviour", "keep"):
        kept[name] = public_name(kept[name]) if kept.get(name) else None
    kind, colon, of = str(settings["measure"]["judge"]).partition(":")
    if kind == "style":
        kept["measure"] = {**settings["measure"], "judge": f"{kind}{colon}{public_name(of)}"}
    return kept


def collect_to_file(
    model: str,
    out: str | Path,
    settings: RunSettings,
    *,
    keep_vectors: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Collect on the training split and save to a file; returns counts and shape."""
    reporter = reporter or Silent()
    settings, behaviour = resolve_behaviour(settings, reporter)
    sides = open_prompts(settings.prompts, settings.seed, behaviour)
    for note in sides.notes:
        reporter.say(note)
    reporter.say(f"loading {model}")
    handle = open_model(model, settings.load)
    reporter.say(_loaded(handle))
    set_prefill(handle, sides.target.train.texts, reporter)
    judge = make_judge(settings.measure.judge)
    if behaviour.kind == "prompts":
        shown = _filtered(handle, sides, "train", judge, settings, reporter)
        found = _collected(handle, shown, settings, reporter, keep_vectors=keep_vectors)
    else:
        filter = settings.collect.filter
        rows = contrast(handle, behaviour, sides.target.train.texts, judge, filter=filter, reporter=reporter)
        found = collect_contrast(handle, rows, settings.collect, keep_vectors=keep_vectors, reporter=reporter)
    found.provenance = {
        "target": {"source": sides.target.source, "sha256": sides.target.train.sha256},
        "baseline": {"source": sides.baseline.source, "sha256": sides.baseline.train.sha256},
        "settings": settings.model_dump(),
    }
    save_activations(found, out, handle)
    return {
        "schema": SCHEMA,
        "file": str(out),
        "layers": found.layers,
        "sites": 3,
        "positions": found.positions,
        "d_model": found.d_model,
        "target": found.target.count,
        "baseline": found.baseline.count,
    }


def _check_same_tokens(handle: Handle, sides: Sides, before: Measurement, model: str, original: str | None) -> None:
    """Raise when two models read the prompts as different tokens: no divergence is defined between them."""
    rows = before.reference.rows if before.reference else []
    starts = {tuple(ids) for ids in handle.prompt_ids(sides.baseline.test.texts)}
    lengths = {len(ids) for ids in starts}
    if not all(any(tuple(row[:n]) in starts for n in lengths) for row in rows):
        raise AbliterateError(
            f"{model} reads the prompts as other tokens than {original}, so there is no divergence between them; "
            "leave --original out, or measure with the same tokenizer and chat template"
        )


def measure_models(
    model: str, original: str | None, settings: RunSettings, *, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Measure a model, and its divergence from an original when one is named; one is loaded at a time."""
    reporter, clock = reporter or Silent(), _Clock()
    settings, behaviour = resolve_behaviour(settings)
    sides = open_prompts(settings.prompts, settings.seed, behaviour)
    for note in sides.notes:
        reporter.say(note)
    judge = make_judge(settings.measure.judge)
    before: Measurement | None = None
    handle: Handle | None = None
    document: dict[str, Any] = {"schema": SCHEMA, "original": None, "edited": None}
    for name, source in (("original", original), ("edited", model)):
        if source is None:
            continue
        label = name if original else "model"
        reporter.say(f"loading {source}")
        handle = None  # let go of the one before
        with clock.stage(f"load {label}"):
            handle = open_model(source, settings.load)
        _check_lengths(handle, sides)
        set_prefill(handle, sides.target.test.texts, reporter)
        with clock.stage(f"measure {label}"):
            if before is not None:
                _check_same_tokens(handle, sides, before, source, original)
            found = _measure(handle, sides, judge, settings, reporter, label, before)
        before = found if name == "original" else before
        document[name] = found.to_json()
        document["model"] = {"source": source, "config_hash": handle.config_hash, "revision": handle.revision}
    if original is None:
        document["original"], document["edited"] = document["edited"], None
    document["settings"] = settings.model_dump()
    document["behaviour"] = behaviour.to_json()
    document["prompts"] = {"target": _sides_json(sides.target), "baseline": _sides_json(sides.baseline)}
    document["environment"] = environment()
    document["timings_s"] = clock.seconds
    return document
