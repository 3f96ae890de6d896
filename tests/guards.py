"""Guarded models beside the demo's, made once and kept in the cache folder; and how methods do on them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import abliterate as ab
from abliterate.common.errors import AbliterateError
from abliterate.common.files import cache, whole_folder
from abliterate.directions.means import Directions, Place, at, difference_of_means
from abliterate.edit.edit import Edit
from abliterate.measure import Measurement, measure
from abliterate.measure.judges import Judge, LexicalJudge
from abliterate.models.demo import GUARD, plain_source
from abliterate.models.handle import Handle
from abliterate.models.loading import load
from abliterate.prompts.sets import Sides
from abliterate.run.pipeline import run
from abliterate.run.showing import showing
from abliterate.search.article import article
from abliterate.search.sweep import sweep
from abliterate.settings.run import resolve
from real_models import SHA256, gemma_gguf

SECOND_GUARD = Path(__file__).parent / "data" / "second_guard"
RESISTING = SECOND_GUARD.with_name("resisting")
SCRIPT = Path(__file__).parents[1] / "scripts" / "train_demo_guard.py"

GEMMA_TURNS = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_TRAINING = ["--spread", "--steps", "80"]

TEST_PROMPTS, ANSWER_TOKENS = 100, 64


def second_guard() -> Path:
    """SmolLM2 with the second guard: other refusals than the demo's, and refusing not put on one direction."""
    weights = (SECOND_GUARD / "adapter_model.safetensors").read_bytes()
    return _made("second-guard", [Path(plain_source()).name.encode(), weights], _merged_second_guard)


def resisting(kind: str) -> Path:
    """The demo model, taught to refuse otherwise: one of the folders of tests/data/resisting."""
    weights = (RESISTING / kind / "adapter_model.safetensors").read_bytes()
    demo = str(ab.demo_model())
    facts = [Path(demo).name.encode(), weights]
    return _made(f"resisting-{kind}", facts, lambda folder: _merge(demo, RESISTING / kind, folder))


def guarded_gemma() -> Path:
    """Gemma 3 270M with its turn format and a guard, trained here when the cache has none (minutes).

    The base model isn't tuned to chat: it learns to answer from SmolLM2's answers, and to refuse in the demo's words.
    """
    gemma_gguf()  # skips the test when there is no Gemma to be had
    facts = [SHA256, GEMMA_TURNS, *GEMMA_TRAINING, SCRIPT.read_text(), (GUARD / "wordings.json").read_text()]
    return _made("guarded-gemma", [fact.encode() for fact in facts], _trained_gemma)


def _made(name: str, facts: list[bytes], make: Callable[[Path], None]) -> Path:
    """The folder in the cache that these facts lead to, made when it isn't there."""
    path = cache() / f"test-{name}-{hashlib.sha256(b'|'.join(facts)).hexdigest()[:12]}"
    if not (path / "config.json").is_file():
        with whole_folder(path) as folder:
            make(folder)
    return path


def _merged_second_guard(folder: Path) -> None:
    _merge(plain_source(), SECOND_GUARD, folder)


def _trained_gemma(folder: Path) -> None:
    base = _made("gemma", [SHA256.encode(), GEMMA_TURNS.encode()], _unpacked_gemma)
    adapter = folder / "adapter"
    command = [sys.executable, str(SCRIPT), "--base", str(base), "--wordings", str(GUARD / "wordings.json")]
    command += ["--teacher", plain_source(), "--out", str(adapter), *GEMMA_TRAINING]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    _merge(str(base), adapter, folder)


def _unpacked_gemma(folder: Path) -> None:
    """Gemma as a folder, which loads much faster than the GGUF (its tokenizer is converted once)."""
    handle = load(gemma_gguf(), dtype="bfloat16")
    handle.tokenizer.chat_template = GEMMA_TURNS
    handle.model.save_pretrained(folder)
    handle.tokenizer.save_pretrained(folder)


def _merge(base: str, adapter: Path, folder: Path) -> None:
    from peft import PeftModel

    handle = load(base, dtype="bfloat16")
    PeftModel.from_pretrained(handle.model, str(adapter)).merge_and_unload().save_pretrained(folder)
    handle.tokenizer.save_pretrained(folder)


# --- How methods do -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a model does on the held-out prompts; divergence is from the original, at the first token and along."""

    refusals: int
    over_refusals: int
    degenerate: int
    first_token: float
    along: float

    @classmethod
    def of(cls, measured: dict[str, Any]) -> Outcome:
        """From a side of results.json."""
        assert measured["refusal"]["total"] == measured["over_refusal"]["total"] == TEST_PROMPTS
        divergence = measured["divergence"] or {"first_token": 0.0, "answer": 0.0}
        return cls(
            measured["refusal"]["refused"],
            measured["over_refusal"]["refused"],
            measured["degenerate"]["count"],
            divergence["first_token"],
            divergence["answer"],
        )


@dataclass(frozen=True)
class Contest:
    """A guarded model as it is, after `abliterate run` at its defaults, and with each of the article's edits."""

    original: Outcome
    fitted: Outcome
    article: list[Outcome]
    document: dict[str, Any]


def contest(model: Path, out: Path) -> Contest:
    """A run at its defaults, then one layer's direction at full strength, on the same prompts."""
    options = {"prompts.test_prompts": TEST_PROMPTS, "measure.max_new_tokens": ANSWER_TOKENS}
    sources = {"prompts.target": "bundled", "prompts.baseline": "bundled"}
    result = run(str(model), out, resolve({**sources, **options}, environment={}))
    document = json.loads((out / "results.json").read_text())
    edits = article_edits(model, result.original)
    found = Contest(Outcome.of(document["original"]), Outcome.of(document["edited"]), edits, document)
    print(f"original {found.original}\nfitted   {found.fitted}\narticle  {found.article}")
    return found


def article_edits(model: Path, before: Measurement) -> list[Outcome]:
    """One layer's direction at full strength in every writer: the sweep's choice, and the article's own."""
    handle, judge = load(str(model)), LexicalJudge()
    sides = ab.load_sides(
        "bundled", "bundled", limit_train=256, limit_validation=64, limit_test=TEST_PROMPTS
    )  # the command's defaults
    train = showing(handle, sides.target.train.texts, sides.baseline.train.texts, judge)
    directions = difference_of_means(ab.collect(handle, train.target, train.baseline))
    places = searched_places(handle, directions, sides, judge)
    test = (sides.target.test.texts, sides.baseline.test.texts)
    writers = ab.find_writers(handle)
    edits = [Edit.uniform(writers, at(directions, place)) for place in dict.fromkeys(places)]
    return [_measured(handle, edit, test, before) for edit in edits]


def searched_places(handle: Handle, directions: Directions, sides: Sides, judge: Judge) -> tuple[Place, ...]:
    """Where the sweep and the article's method take their direction from."""
    validation = showing(handle, sides.target.validation.texts, sides.baseline.validation.texts, judge)
    places = [sweep(handle, directions, validation.target, validation.baseline, judge).winner.place]
    with contextlib.suppress(AbliterateError):  # none of the article's candidates passes its own test
        places.append(article(handle, directions, sides.target.validation.texts, judge).winner.place)
    print("the sweep's and the article's places:", *places)
    return tuple(places)


def _measured(handle: Handle, edit: Edit, test: tuple[Any, Any], before: Measurement) -> Outcome:
    with edit.attached(handle):
        return Outcome.of(measure(handle, *test, original=before, max_new_tokens=ANSWER_TOKENS).to_json())


def check_bars(found: Contest) -> None:
    """The fit refuses next to nothing, at a far lower price than either of the article's edits."""
    fitted, original = found.fitted, found.original
    for other in found.article:
        assert fitted.refusals <= max(0.05 * TEST_PROMPTS, other.refusals), found
        assert fitted.first_token <= 0.4 * other.first_token, found
        assert fitted.along <= 0.4 * other.along, found
        assert fitted.over_refusals <= max(original.over_refusals, other.over_refusals), found
        assert fitted.degenerate <= max(original.degenerate, other.degenerate), found
