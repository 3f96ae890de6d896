"""`abliterate run --keep`, the whole command: on a planted model whose two behaviours share a direction."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from abliterate.edit.edit import Edit
from abliterate.edit.recipe import load_recipe
from abliterate.measure import judged
from abliterate.models.handle import Handle
from abliterate.models.loading import load
from abliterate.run import opening, refusing, searching
from abliterate.search import tpe
from abliterate.search.fit_settings import FitSettings
from abliterate.search.points import PointJudge
from abliterate.search.stand_ins import Staying
from command import abliterate, fails, succeeds
from models import save_tiny
from planted import BENEATH, KEPT, KnowsItsPrompts, planted_twice

optuna = pytest.importorskip("optuna")

SUBJECTS = ["boats", "the sea", "old maps", "rain", "a long walk", "bread", "seven songs", "cats"]
WHERE = ["at home", "in town", "by night", "in spring", "far away", "on foot"]
ABOUT = [f"{subject} {where}" for where in WHERE for subject in SUBJECTS]
METHODS = {
    "fit": ["--steps", "8", "--layers", "0-3"],
    "tpe": ["--trials", "12"],
    "sweep": [],
    "article": ["--candidates", "6"],
}
"""What makes each search short; the fit is to edit all blocks."""


class Desk:
    """A folder with a planted model, its prompts and files of what is to be kept."""

    def __init__(self, folder: Path, handle: Handle) -> None:
        self.folder, self.model = folder, save_tiny(folder / "planted", handle.model, handle.tokenizer)
        for name, begins in (("target", "Q about"), ("baseline", "tell of")):
            (folder / f"{name}.txt").write_text("\n".join(f"{begins} {what}" for what in ABOUT))
        (folder / "keep.txt").write_text("\n".join(f"J of {what}" for what in ABOUT[:20]))
        save_file({"kept": torch.eye(32)[KEPT]}, folder / "keep.safetensors")

    def command(self, out: str, method: str, *more: object, keep: str | None = "keep.txt") -> list[object]:
        kept = ["--keep", self.folder / keep] if keep else []
        return [
            "run", self.model, "--out", self.folder / out, "--method", method, *METHODS[method], *kept,
            "--target", self.folder / "target.txt", "--baseline", self.folder / "baseline.txt",
            "--train-prompts", 12, "--validation-prompts", 8, "--test-prompts", 8, "--max-new-tokens", 4,
            "--quiet", *more,
        ]  # fmt: skip

    def run(self, out: str, method: str, *more: object, keep: str | None = "keep.txt") -> dict:
        succeeds(*self.command(out, method, *more, keep=keep))
        return json.loads((self.folder / out / "results.json").read_text())

    def recipe(self, out: str):
        return load_recipe(self.folder / out / "recipe.safetensors")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The judge that knows what the planted model says, and a fit of three points."""
    monkeypatch.setattr(opening, "make_judge", lambda spec: KnowsItsPrompts())
    short = {"weights": (1.0, 0.1), "lighter": (0.5,), "steps_between": 3, "rate": 0.3}
    monkeypatch.setattr(searching, "FitSettings", partial(FitSettings, **short))


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path, planted_twice())


def along_kept(desk: Desk, out: str) -> float:
    """The largest component along KEPT of any direction in the recipe and in the frontier's."""
    folder = desk.folder / out
    edits = [load_recipe(file).edit for file in (folder / "recipe.safetensors", *folder.glob("frontier/*"))]
    return max(float(abs(edit.directions[:, KEPT]).max()) for edit in edits)


def answers_of(desk: Desk, out: str, opening: str) -> str:
    """The first letters of the saved model's answers to a few prompts."""
    handle = load(desk.folder / out / "model")
    answers, _ = judged(handle, [f"{opening} {what}" for what in ABOUT[20:28]], KnowsItsPrompts(), max_new_tokens=4)
    return "".join(answer.text[:1] for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_written_model_answers_what_is_kept_as_before(desk, method):
    document = desk.run("out", method)
    kept = document["kept"]
    assert (document["original"]["refusal"]["rate"], document["edited"]["refusal"]["rate"]) == (1, 0)
    assert (kept["kind"], kept["source"]) == ("prompts", "keep.txt")
    assert (kept["prompts"]["train"], kept["prompts"]["test"]) == (10, 10)
    assert kept["original"]["refused"] == kept["edited"]["refused"] == kept["original"]["total"] == 10
    assert kept["changed"] == 0
    assert kept["component"] < 1e-5 and along_kept(desk, "out") < 0.01  # prompts name KEPT nearly
    assert answers_of(desk, "out", "J of") == "K" * 8


def test_without_keep_it_is_lost(desk):
    assert "kept" not in desk.run("out", "sweep", keep=None)
    assert along_kept(desk, "out") > 0.5
    assert "K" not in answers_of(desk, "out", "J of")


@pytest.mark.parametrize("method", METHODS)
def test_a_file_of_directions_is_orthogonal_to_all_that_is_written(desk, method):
    kept = desk.run("out", method, keep="keep.safetensors")["kept"]
    assert along_kept(desk, "out") < 1e-5 and kept["component"] < 1e-5
    assert (kept["kind"], kept["source"], kept["directions"]) == ("directions", "keep.safetensors", 1)
    assert "prompts" not in kept and kept["share_left"] > 0.5
    assert answers_of(desk, "out", "J of") == "K" * 8
    assert desk.recipe("out").provenance["kept"] == kept
    assert str(desk.folder) not in json.dumps(desk.recipe("out").provenance)


def test_a_recipe_is_kept_by_its_directions(desk):
    Edit.from_names({"w": 1.0}, torch.eye(32)[KEPT]).save(desk.folder / "other-recipe.safetensors")
    kept = desk.run("out", "article", keep="other-recipe.safetensors")["kept"]
    assert (kept["kind"], kept["directions"]) == ("directions", 1)
    assert along_kept(desk, "out") < 1e-5
    assert answers_of(desk, "out", "J of") == "K" * 8


def test_nothing_is_left_to_edit_where_everything_is_kept(desk):
    save_file({"all": torch.eye(32)}, desk.folder / "all.safetensors")
    line = fails(desk.folder, *desk.command("out", "article", keep="all.safetensors"))
    assert "the behaviour to change is the one to keep" in line


def test_tpe_has_drifting_on_what_is_kept_as_an_objective_and_chooses_by_it(tmp_path):
    """An edit of the embedding loses "K" without a component along the span: only the objective can see it."""
    desk, study = Desk(tmp_path, planted_twice(BENEATH)), tmp_path / "study.journal"
    document = desk.run("out", "tpe", "--study", study, "--dtype", "bfloat16")  # trials differ by rounding
    found = optuna.load_study(study_name=tpe.STUDY, storage=tpe._storage(str(study))).get_trials()
    assert len(found) == 12
    good = [(divergence, kept) for refused, divergence, kept in (trial.values for trial in found) if not refused]
    assert max(kept for _, kept in good) > 0.05
    (chosen,) = (point for point in document["frontier"] if point["chosen"])
    least = min(sum(pair) for pair in good)
    assert chosen["objectives"]["divergence"] + chosen["objectives"]["kept"] == pytest.approx(least)
    assert least < 0.01
    assert document["kept"]["divergence"]["answer"] < 0.01 and document["kept"]["changed"] == 0


@pytest.mark.slow
def test_the_fit_lowers_drifting_on_half_of_the_kept_prompts_too(desk, monkeypatch):
    staying, rows = Staying.loss, []

    def loss(self, picked, logprobs):
        if self.name == "kept":
            rows.extend(tuple(self.rows[i].ids) for i in picked)
        return staying(self, picked, logprobs)

    monkeypatch.setattr(Staying, "loss", loss)
    desk.run("out", "fit")
    assert len(set(rows)) == 10  # of 20: the others are held out


@pytest.mark.slow
def test_a_study_of_other_kept_prompts_is_not_gone_on_with(desk):
    study = ["--study", desk.folder / "study.journal", "--resume"]
    desk.run("out", "tpe", *study)
    (desk.folder / "other.txt").write_text("\n".join(f"J of {what}" for what in ABOUT[20:40]))
    other = abliterate(*desk.command("more", "tpe", *study, keep="other.txt"))
    assert other.code == 2 and not (desk.folder / "more").exists()
    assert "other model, prompts" in other.err and other.err.count("\n") == 1
    desk.run("more", "tpe", *study)


@pytest.mark.slow
def test_a_fit_cut_short_goes_on_with_the_same_file_only(desk, monkeypatch):
    judge_point, calls = PointJudge.judge, []

    def cut(job, edit, **found):
        calls.append(found)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judge_point(job, edit, **found)

    desk.run("whole", "fit")
    with monkeypatch.context() as patch:
        patch.setattr(PointJudge, "judge", cut)
        assert abliterate(*desk.command("out", "fit")).code == 130
    kept = desk.folder / "keep.txt"
    before = kept.read_text()
    kept.write_text("\n".join(f"J of {what}" for what in ABOUT[20:40]))
    changed = fails(desk.folder, *desk.command("out", "fit", "--resume"))
    assert "another model, prompts or settings" in changed
    kept.write_text(before)
    desk.run("out", "fit", "--resume")
    whole, resumed = (desk.folder / out / "recipe.safetensors" for out in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()


MALFORMED = {
    "none.txt": (None, "file not found"),
    "few.txt": ("J of boats\nJ of rain", "at least 8"),
    "bad.jsonl": ('{"prompt": "J of boats"}\n{"prompt": ', "line 2"),
    "bad.safetensors": ("not tensors", "not a readable safetensors file"),
    "empty.txt": ("", "empty.txt"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_file_that_cannot_be_kept_is_one_line_before_the_model_is_loaded(desk, monkeypatch, name):
    monkeypatch.setattr(opening, "open_model", lambda *args: pytest.fail("the model was loaded"))
    text, says = MALFORMED[name]
    if text is not None:
        (desk.folder / name).write_text(text)
    line = fails(desk.folder, *desk.command("out", "fit", keep=name))
    assert says in line and name in line


def test_directions_of_another_model_are_refused_before_anything_is_collected(desk, monkeypatch):
    monkeypatch.setattr(refusing, "filtered", lambda *args: pytest.fail("the filter was run"))
    save_file({"wide": torch.eye(48)[:2]}, desk.folder / "wide.safetensors")
    line = fails(desk.folder, *desk.command("out", "fit", keep="wide.safetensors"))
    assert "width 48" in line and "d_model 32" in line


def test_inducing_says_that_it_keeps_nothing(desk):
    line = fails(desk.folder, "run", desk.model, "--out", desk.folder / "out", "--induce", "--keep", "keep.txt")
    assert "--keep" in line
