"""What --keep names: orthogonal to every edit's direction, untouched in the weights and in the stream, and watched."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from abliterate.common.errors import AbliterateError, PromptError
from abliterate.directions.activations import collect
from abliterate.directions.keep import Keep, Kept, check_keep, kept_span, read_keep, without
from abliterate.directions.means import Directions, at, difference_of_means
from abliterate.edit.edit import Edit
from abliterate.measure import judged
from abliterate.models.writers import find_writers, watch_sites
from abliterate.run.pipeline import run
from abliterate.run.showing import showing
from abliterate.search.fit import fit
from abliterate.search.fit_settings import FitSettings
from abliterate.search.sweep import SweepSettings, sweep
from abliterate.settings.run import RunSettings
from planted import BASELINE, DECOY, REFUSE, TARGET, RefusesWithR, planted


def unit(index: int, width: int = 32) -> torch.Tensor:
    return torch.eye(width)[index]


@pytest.fixture
def handle():
    return planted()


def mixed(handle) -> Directions:
    """The planted model's directions, each with a good part of DECOY in it."""
    found = difference_of_means(collect(handle, TARGET[:6], BASELINE[:6], positions=3))
    vectors = found.unit + 0.7 * unit(DECOY)
    return Directions(vectors / vectors.norm(dim=-1, keepdim=True), found.length, found.separation)


def along_decoy(handle, edit=None) -> torch.Tensor:
    """The stream's component along DECOY after block 0, which writes it, at every token of the target prompts."""
    seen = []

    def look(layer, site, stream):
        if (layer, site) == (0, "post"):
            seen.append(stream[0, :, DECOY].clone())

    def read():
        for ids in handle.prompt_ids(TARGET):
            with watch_sites(handle, look):
                handle.hidden_states(input_ids=torch.tensor([ids]), use_cache=False)

    if edit is None:
        read()
    else:
        with edit.attached(handle):
            read()
    return torch.cat(seen)


def swept(handle, directions) -> Edit:
    choice = sweep(handle, directions, TARGET, BASELINE, RefusesWithR(), SweepSettings(decode_tokens=4))
    return choice.edit


def test_a_swept_edit_leaves_what_is_kept_as_it_was(handle):
    kept = unit(DECOY)[None]
    before = along_decoy(handle)
    directions, share = without(mixed(handle), kept)
    assert 0.5 < share <= 1
    edit = swept(handle, directions)
    assert float((torch.from_numpy(edit.directions) @ kept.T).abs().max()) < 1e-6
    assert float((along_decoy(handle, edit) - before).abs().max()) < 1e-5 * float(before.abs().max())
    with edit.attached(handle):
        _, refused = judged(handle, TARGET, RefusesWithR(), max_new_tokens=4)
    assert not any(refused)
    rows = {w.name: (handle.model.get_parameter(w.name).clone(), w.axis) for w in find_writers(handle)}
    edit.bake(handle)
    for name, (weight, axis) in rows.items():
        moved = (handle.model.get_parameter(name) - weight).movedim(axis, -1)[..., DECOY]
        assert float(moved.abs().max()) <= 1e-5 * float(weight.abs().max())


def test_without_keep_it_changes(handle):
    before = along_decoy(handle)
    edit = swept(handle, mixed(handle))
    assert float((along_decoy(handle, edit) - before).abs().max()) > 0.1 * float(before.abs().max())


@pytest.mark.parametrize("rank", [1, 2])
def test_a_fit_stays_orthogonal_and_still_finds_what_was_planted(handle, rank):
    kept = unit(DECOY)[None]
    sides = [showing(handle, TARGET[a:b], BASELINE[a:b], RefusesWithR()).examples for a, b in ((0, 6), (6, 8))]
    options = FitSettings(
        steps=12,
        steps_between=4,
        weights=(1.0, 0.1),
        lighter=(),  # two validation prompts can't tell one that is too light
        layers=range(4),
        target_batch=3,
        baseline_batch=3,
        rate=0.3,
        rank=rank,
    )
    free = fit(handle, mixed(handle), *sides, RefusesWithR(), options).edit
    bound = fit(handle, mixed(handle), *sides, RefusesWithR(), options, kept=kept).edit
    assert float((torch.from_numpy(free.directions) @ kept.T).abs().max()) > 1e-2
    assert float((torch.from_numpy(bound.directions) @ kept.T).abs().max()) < 1e-5
    with bound.attached(handle):
        _, refused = judged(handle, TARGET, RefusesWithR(), max_new_tokens=4)
    assert not any(refused)


def test_prompts_are_kept_by_what_tells_them_from_baseline(handle):
    """Target prompts as what is kept: their span holds REFUSE, so nearly nothing of REFUSE is left to remove."""
    from abliterate.prompts.sets import PromptSet

    keep = Keep("f", None, PromptSet("f", tuple(TARGET)), PromptSet("f", tuple(TARGET)))
    span = kept_span(handle, keep, BASELINE)
    assert torch.allclose(span @ span.T, torch.eye(len(span)), atol=1e-5)
    assert float((span @ unit(REFUSE)).norm()) > 0.9


def test_keeping_what_is_removed_is_an_error(handle):
    found = difference_of_means(collect(handle, TARGET, BASELINE, positions=1))
    with pytest.raises(AbliterateError, match="the one to keep"):
        without(found, torch.eye(32))


def test_files_of_directions_and_of_prompts(tmp_path):
    save_file({"r": torch.tensor([0.0, 3.0, 0.0]), "more": torch.eye(3)[:2]}, tmp_path / "d.safetensors")
    assert read_keep(tmp_path / "d.safetensors").directions.shape == (2, 3)
    edit = Edit.from_names({"w": 1.0}, torch.tensor([1.0, 1.0, 0.0]))
    edit.save(tmp_path / "recipe.safetensors")
    assert torch.allclose(read_keep(tmp_path / "recipe.safetensors").directions, torch.from_numpy(edit.directions))
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(20)))
    keep = read_keep(tmp_path / "p.txt")
    assert (len(keep.train), len(keep.test)) == (10, 10) and not set(keep.train) & set(keep.test)
    with pytest.raises(AbliterateError, match="not found"):
        read_keep(tmp_path / "none.txt")
    (tmp_path / "few.txt").write_text("a\nb")
    with pytest.raises(PromptError, match="at least 8"):
        read_keep(tmp_path / "few.txt")
    save_file({"x": torch.zeros(2, 2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(AbliterateError, match="d_model"):
        read_keep(tmp_path / "x.safetensors")


def test_directions_of_another_width_are_refused(handle):
    with pytest.raises(AbliterateError, match="another model"):
        check_keep(handle, Keep("f", torch.eye(3)))


def test_a_run_says_what_became_of_what_is_kept(tiny_folder, tmp_path):
    (tmp_path / "keep.txt").write_text("\n".join(f"How do I paint a wall in colour {i}?" for i in range(16)))
    settings = RunSettings.model_validate(
        {
            "keep": str(tmp_path / "keep.txt"),
            "prompts": {
                "target": "bundled",
                "baseline": "bundled",
                "train_prompts": 8,
                "validation_prompts": 8,
                "test_prompts": 8,
            },
            "search": {"method": "article", "candidates": 1},
            "collect": {"filter": False},
            "measure": {"max_new_tokens": 8},
        }
    )
    document = run(str(tiny_folder), tmp_path / "out", settings).document
    kept = document["kept"]
    assert (kept["kind"], kept["source"], kept["prompts"]["test"]) == ("prompts", "keep.txt", 8)
    assert kept["component"] < 1e-5 and kept["divergence"]["prompts"] == 8
    assert kept["divergence"]["answer"] > 0
    assert str(tmp_path) not in json.dumps(kept)


def test_directions_alone_are_not_decoded(tiny_handle):
    kept = Kept(Keep("f", torch.eye(32)[:1]), torch.eye(32)[:1], 1.0)
    kept.watch(tiny_handle, RefusesWithR(), max_new_tokens=4, batch_size=4)
    edit = Edit.uniform(find_writers(tiny_handle), torch.eye(32)[1])
    found = kept.to_json(tiny_handle, edit, RefusesWithR(), max_new_tokens=4, batch_size=4)
    assert found["component"] == 0 and "divergence" not in found


def test_the_place_of_a_direction_is_kept(handle):
    """A direction without the span points where it did, less the span."""
    from abliterate.directions.means import Place

    found = mixed(handle)
    left, _ = without(found, unit(DECOY)[None])
    place = Place(2, "pre", -1)
    r = at(found, place).clone()
    r[DECOY] = 0
    assert torch.allclose(at(left, place), r / r.norm(), atol=1e-5)
