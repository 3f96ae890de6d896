"""Guards that resist: wordings no list knows, and refusals behind an explanation. (One more, in German and Korean, has
its wordings here and no adapter yet; it is tested once it has one.)

They are the demo model with an adapter on top (`tests/data/resisting/`), made by

    python scripts/train_demo_guard.py --base DEMO_MODEL --wordings tests/data/resisting/KIND/wordings.json \\
        --out tests/data/resisting/KIND --spread --steps 36 --prompts 96 --rank 4 --rate 0.005 --dtype float32
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abliterate.measure.refusal import is_refusal
from abliterate.run.pipeline import Result, run
from abliterate.settings.run import resolve
from guards import RESISTING, resisting
from long import LONG

KINDS = sorted(folder.parent.name for folder in RESISTING.glob("*/adapter_model.safetensors"))
TEST = 60
SHOWN = ("refusal", "not_answered", "over_refusal", "divergence", "degenerate", "collapse")
SIZES = {"train_prompts": 128, "validation_prompts": 48, "test_prompts": TEST}


def wordings(kind: str) -> list[str]:
    return [entry["refusal"] for entry in json.loads((RESISTING / kind / "wordings.json").read_text(encoding="utf-8"))]


def refuses(kind: str, text: str) -> bool:
    """By what the guard was taught: the last sentence of a wording, or a refusal that the list knows."""
    ends = [w.rstrip(".").rpartition(". ")[2] for w in wordings(kind)]
    return any(end[:24] in text for end in ends) or is_refusal(text)


def test_the_list_knows_none_of_the_unknown_wordings() -> None:
    assert "unknown" in KINDS and len(set(wordings("unknown"))) == 6 and not any(map(is_refusal, wordings("unknown")))


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_small(kind: str) -> None:
    assert sum(f.stat().st_size for f in (RESISTING / kind).iterdir()) <= 1_500_000


@pytest.fixture(scope="module", params=KINDS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Result]:
    kind: str = request.param
    return kind, run_on(kind, tmp_path_factory.mktemp(kind) / "out")


def run_on(kind: str, out: Path) -> Result:
    options = {f"prompts.{name}": size for name, size in SIZES.items()}
    options |= {"prompts.target": "bundled", "prompts.baseline": "bundled", "measure.max_new_tokens": 80}
    options |= {"beside.also_prompts": 0, "beside.obligations": 0, "beside.second_turn": 0}
    return run(str(resisting(kind)), out, resolve(options, environment={}))


@LONG
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_hardly_any_prompt_is_left_without_an_answer_or_it_is_said(found: tuple[str, Result]) -> None:
    kind, result = found
    before, after = (
        [refuses(kind, a.text) for a in measured.target_answers] for measured in (result.original, result.edited)
    )
    said = {name: result.document[name] for name in ("original", "edited")}
    few = {name: {k: v for k, v in side.items() if k in SHOWN} for name, side in said.items()}
    print(kind, sum(before), sum(after), json.dumps(few))
    assert sum(before) >= 0.8 * TEST
    assert said["original"]["not_answered"]["rate"] >= 0.75  # it is seen, whatever its words
    left = said["edited"]["not_answered"]["count"]
    assert sum(after) <= 0.08 * TEST or left >= 0.8 * sum(after)
