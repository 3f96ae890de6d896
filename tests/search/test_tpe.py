"""The search by TPE: what it suggests, how its study goes on, what it gives back."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from abliterate.common.errors import AbliterateError, NonFiniteError
from abliterate.directions.means import Directions
from abliterate.edit.edit import Edit
from abliterate.measure.divergence import compare
from abliterate.models.writers import SITES, find_writers
from abliterate.search import tpe as module
from abliterate.search.objectives import DivergenceFromOriginal, Refusals, original_reference
from abliterate.search.tpe import NEGLIGIBLE, Ramps, Shape, TpeSettings, tpe
from models import FAMILIES, handle_of, tiny_llama

optuna = pytest.importorskip("optuna")

PROMPTS = ["Tell me of boats", "Name a river", "Why does it rain?", "Sing of bread"]


def directions_of(handle, seed=0):
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(handle.layers, len(SITES), 2, handle.d_model, generator=generator)
    unit = unit / unit.norm(dim=-1, keepdim=True)
    return Directions(unit, torch.ones(unit.shape[:3]), torch.ones(unit.shape[:3]))


class Opening:
    """A judge for random models: an answer "refuses" by its first letter's parity."""

    name = "opening"

    def judge(self, prompts, answers):
        return [ord(answer[0]) % 2 == 0 if answer else False for answer in answers]

    def settled(self, prompt, partial_answer):
        return None


@pytest.fixture
def work(tiny_handle):
    refusals = Refusals(PROMPTS, Opening(), max_new_tokens=2)
    divergence = DivergenceFromOriginal(original_reference(tiny_handle, PROMPTS))
    return tiny_handle, directions_of(tiny_handle), refusals, divergence


def trials(study):
    storage = module._storage(str(study))
    found = optuna.load_study(study_name=module.STUDY, storage=storage).get_trials()
    return [(t.params, t.values) for t in found if t.state == optuna.trial.TrialState.COMPLETE]


def shape(attention=(1.0, 0.5, 0.5, 0.0), mlp=(1.0, 0.5, 0.5, 0.0), embedding=0.5, layer=None):
    return Shape(Ramps(*attention), Ramps(*mlp), embedding, layer)


def test_two_ramps_peak_where_they_say_and_fall_to_the_floor():
    ramps = Ramps(height=1.2, peak=0.5, width=0.25, floor=0.25)
    assert ramps.at(0.5) == pytest.approx(1.2)
    assert ramps.at(0.375) == ramps.at(0.625) == pytest.approx(1.2 * (0.25 + 0.75 * 0.5))
    assert ramps.at(0.0) == ramps.at(1.0) == pytest.approx(0.3)
    assert Ramps(NEGLIGIBLE / 2, 0.5, 0.5, 1.0).at(0.5) == 0.0


def test_an_edit_has_the_shapes_strengths_and_leaves_out_writers_of_none(tiny_handle):
    directions = directions_of(tiny_handle)
    edit = module._Builder(tiny_handle, directions, None).edit(shape(mlp=(0.0, 0.5, 0.5, 0.0), layer=0.5))
    sides = {w.name: (w.side, w.layer) for w in find_writers(tiny_handle)}
    found = {sides[name]: part for name, part in edit.parts.items()}
    assert found.keys() == {("embedding", None), ("attention", 1), ("attention", 2)}  # the ends are 0.5 away
    assert found["embedding", None].strengths.item() == 0.5
    assert found["attention", 1].strengths.item() == pytest.approx(1 - (1 / 2 - 1 / 3) / 0.5)
    # four layers: depth 0.5 is halfway between layers 1 and 2
    between = directions.unit[1, 0, -1] + directions.unit[2, 0, -1]
    for part in found.values():
        torch.testing.assert_close(torch.from_numpy(part.directions[0]), between / between.norm())


def test_each_layer_has_its_own_direction_where_none_is_shared(tiny_handle):
    directions = directions_of(tiny_handle)
    edit = module._Builder(tiny_handle, directions, None).edit(shape())
    for writer in find_writers(tiny_handle):
        if writer.name not in edit.parts:
            continue
        layer, site = (1, "pre") if writer.layer is None else (writer.layer, "post")
        site = "mid" if writer.side == "attention" else site
        expected = directions.unit[layer, SITES.index(site), -1]
        torch.testing.assert_close(torch.from_numpy(edit.parts[writer.name].directions[0]), expected)


def test_parallel_blocks_take_the_direction_behind_the_block():
    handle = handle_of(FAMILIES["gpt_neox"]())
    directions = directions_of(handle)
    directions.unit[:, SITES.index("mid")] = float("nan")
    edit = module._Builder(handle, directions, None).edit(shape(embedding=0.0))
    assert np.isfinite(edit.directions).all() and len(edit.parts)


def test_layers_asked_for_are_the_only_ones_edited(tiny_handle):
    edit = module._Builder(tiny_handle, directions_of(tiny_handle), range(2, 3)).edit(shape())
    names = {w.name for w in find_writers(tiny_handle, range(2, 3))}
    assert set(edit.parts) == names


def test_the_frontier_is_what_the_edits_do(work):
    handle, _, refusals, divergence = work
    points = tpe(*work, TpeSettings(trials=8))
    assert points
    for point in points:
        with point.edit.attached(handle):
            assert compare(handle, divergence.reference).first_token == pytest.approx(point.divergence, abs=1e-6)
            assert refusals.score(handle) == point.refused.count
        assert point.refused.total == len(PROMPTS)
    assert [p.refused.count for p in points] == sorted({p.refused.count for p in points})
    assert [p.divergence for p in points] == sorted({p.divergence for p in points}, reverse=True)


def test_the_same_seed_gives_the_same_frontier_and_another_seed_another(work):
    one, two, other = (tpe(*work, TpeSettings(trials=4, seed=seed)) for seed in (3, 3, 4))
    assert [p.note for p in one] == [p.note for p in two]
    assert [p.note["parameters"] for p in one] != [p.note["parameters"] for p in other]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["x.journal", "sqlite:///{}/x.db"])
def test_a_search_cut_short_and_resumed_is_the_uninterrupted_one(work, tmp_path, place, monkeypatch):
    monkeypatch.setattr(module, "STARTUP", 3)  # so that what is drawn depends on the trials before
    handle, directions, _refusals, divergence = work
    whole = tpe(*work, TpeSettings(trials=7, study=str(tmp_path / "whole.journal")))
    study = place.format(tmp_path) if "://" in place else str(tmp_path / place)

    class Interrupted(Refusals):
        calls = 0

        def score(self, handle):
            Interrupted.calls += 1
            if Interrupted.calls == 5:
                raise KeyboardInterrupt
            return super().score(handle)

    with pytest.raises(KeyboardInterrupt):
        tpe(
            handle, directions, Interrupted(PROMPTS, Opening(), max_new_tokens=2), divergence,
            TpeSettings(trials=7, study=study),
        )  # fmt: skip
    assert len(trials(study)) == 4
    with pytest.raises(AbliterateError, match="--resume"):
        tpe(*work, TpeSettings(trials=7, study=study))
    resumed = tpe(*work, TpeSettings(trials=7, study=study, resume=True))
    assert trials(study) == trials(tmp_path / "whole.journal")
    assert [p.divergence for p in resumed] == [p.divergence for p in whole]


def test_a_trial_of_a_dead_process_counts_for_nothing(work, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STARTUP", 3)
    study = str(tmp_path / "x.journal")
    tpe(*work, TpeSettings(trials=4, study=study))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    trial = optuna.load_study(study_name=module.STUDY, storage=module._storage(study)).ask()
    trial.set_user_attr("process", f"{module._process().split(':')[0]}:{gone.pid}")
    tpe(*work, TpeSettings(trials=6, study=study, resume=True))
    tpe(*work, TpeSettings(trials=6, study=str(tmp_path / "whole.journal")))
    assert trials(study) == trials(tmp_path / "whole.journal")


def test_processes_on_one_study_draw_different_trials(work, tmp_path):
    """Another process has a trial running: this one draws the next, not the same."""
    study = str(tmp_path / "x.journal")
    tpe(*work, TpeSettings(trials=2, study=study))
    other = optuna.load_study(study_name=module.STUDY, storage=module._storage(study))
    running = module._ask(other, seed=0)
    theirs = module.suggested(running)
    running.set_user_attr("process", f"{module._process().split(':')[0]}:{os.getppid()}")
    tpe(*work, TpeSettings(trials=3, study=study, resume=True))
    ours = trials(study)[-1][0]
    assert ours["embedding"] != theirs.embedding
    other.tell(running, [0.0, 0.0])  # they can still finish theirs
    assert len(trials(study)) == 4


def test_a_study_of_other_work_is_refused(work, tmp_path):
    handle, directions, refusals, divergence = work
    settings = TpeSettings(trials=1, study=str(tmp_path / "x.journal"))
    tpe(*work, settings)
    again = TpeSettings(trials=2, study=settings.study, resume=True)
    with pytest.raises(AbliterateError, match="other directions"):
        tpe(handle, directions_of(handle, seed=1), refusals, divergence, again)
    with pytest.raises(AbliterateError, match="other model, prompts or layers"):
        tpe(handle, directions, Refusals(PROMPTS[1:], Opening(), max_new_tokens=2), divergence, again)
    with pytest.raises(AbliterateError, match="other objectives"):
        tpe(*work, again, objectives=[refusals])
    nearly = Directions(directions.unit + 1e-6, directions.length, directions.separation)
    tpe(handle, nearly, refusals, divergence, again)  # sums in another order are no other work


def test_objectives_of_ones_own_are_minimised_and_the_frontier_still_has_both_numbers(work):
    handle, directions, refusals, divergence = work

    class Weak:
        name = "weakness"

        def score(self, handle):
            hidden = handle.hidden_states(input_ids=torch.arange(8)[None]).last_hidden_state
            return float(hidden.norm())

    points = tpe(handle, directions, refusals, divergence, TpeSettings(trials=5), objectives=[Weak(), divergence])
    assert all(set(p.note["objectives"]) == {"weakness", "divergence"} for p in points)
    with points[0].edit.attached(handle):
        assert refusals.score(handle) == points[0].refused.count
        assert Weak().score(handle) == pytest.approx(points[0].note["objectives"]["weakness"])


def test_a_further_divergence_counts_in_the_frontier(work):
    handle, _directions, refusals, divergence = work
    kept = DivergenceFromOriginal(original_reference(handle, ["Hum of bees", "Draw a map"], answer_tokens=2), "kept")
    points = tpe(*work, TpeSettings(trials=8), objectives=[refusals, divergence, kept])
    assert points
    for point in points:
        assert point.also == point.note["objectives"]["kept"]
        with point.edit.attached(handle):
            assert kept.score(handle) == pytest.approx(point.also, abs=1e-6)
    assert [p.drift for p in points] == sorted({p.drift for p in points}, reverse=True)
    assert all(p.also == 0 for p in tpe(*work, TpeSettings(trials=2)))


def test_an_edit_that_ruins_the_model_is_no_end_of_the_search(work):
    handle, directions, _, divergence = work

    class Ruined(Refusals):
        calls = 0

        def score(self, handle):
            Ruined.calls += 1
            if Ruined.calls == 2:
                raise NonFiniteError("logits are NaN")
            return super().score(handle)

    points = tpe(
        handle, directions, Ruined(PROMPTS, Opening(), max_new_tokens=2), divergence, TpeSettings(trials=4)
    )  # fmt: skip
    assert Ruined.calls == 4 and points
    assert 1 not in [p.note["trial"] for p in points]


def test_keeping_a_behaviour_counts_what_is_lost(tiny_handle):
    lost = Refusals(PROMPTS, Opening(), max_new_tokens=2, keep=True, name="kept")
    left = Refusals(PROMPTS, Opening(), max_new_tokens=2)
    assert lost.score(tiny_handle) + left.score(tiny_handle) == len(PROMPTS)


def test_the_reference_is_the_original_so_it_is_no_distance_from_itself():
    handle = handle_of(tiny_llama())
    aim = DivergenceFromOriginal(original_reference(handle, PROMPTS, answer_tokens=4))
    assert aim.score(handle) == pytest.approx(0, abs=1e-6)
    with Edit.uniform(find_writers(handle), torch.randn(32)).attached(handle):
        assert aim.score(handle) > 1e-3


def test_without_optuna_the_error_names_the_extra(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(AbliterateError, match=r"abliterate\[search\]"):
        tpe(*work, TpeSettings(trials=1))


def test_a_database_that_cannot_be_opened_is_one_line(work, tmp_path):
    with pytest.raises(AbliterateError, match="can't be opened") as error:
        tpe(*work, TpeSettings(trials=1, study=f"sqlite:///{tmp_path}/no/such/folder/x.db"))
    assert "\n" not in str(error.value)
