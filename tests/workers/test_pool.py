"""Workers: any number of them gives what none gives, and one that dies changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from abliterate.apply.hooks import attached
from abliterate.common.errors import AbliterateError, NonFiniteError
from abliterate.directions.activations import collect, collect_rows, merged
from abliterate.directions.means import difference_of_means
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import load_recipe
from abliterate.measure import judged, measure
from abliterate.models.loading import load
from abliterate.models.replicas import LARGEST, alone, shards
from abliterate.models.writers import find_writers
from abliterate.search.examples import Examples
from abliterate.search.first_token import first_token
from abliterate.search.fit import fit
from abliterate.search.fit_settings import FitSettings
from abliterate.workers import pool
from abliterate.workers.pool import Pool, cards_each
from command import PROMPTS, SMALL, fails, succeeds
from in_workers import failing, process
from long import LONG
from models import save_tiny
from planted import RefusesWithR, planted

TESTS = Path(__file__).parent.parent
THINGS = ["boats", "the sea", "old maps", "rain", "a walk", "bread", "songs", "cats", "snow", "a clock", "hats"]
TARGET, BASELINE = [f"Q about {thing}" for thing in THINGS], [f"tell of {thing}" for thing in THINGS]
QUICK = FitSettings(steps=6, steps_between=2, weights=(1.0, 0.1), lighter=(0.5,), target_batch=4, baseline_batch=4)
OPTIONS = {"dtype": "float32", "device": None}


class Here:
    """Workers that are none: each shard is run by the handle's own model."""

    def __init__(self):
        self.calls, self.common, self.sent = 0, None, None

    def map(self, handle, function, common, calls, tick):
        if self.common is not common:
            self.common, self.sent = common, copy(common)  # a copied goal has variables of its own, as a sent one has
        found = []
        with alone(handle):
            for place, call in enumerate(calls):
                found.append(function(handle, self.sent, call))
                tick(place)
        self.calls += len(calls)
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    handle = planted()
    return str(save_tiny(tmp_path_factory.mktemp("planted") / "model", handle.model, handle.tokenizer))


def seen(handle):
    """What the stages give, numbers and texts apart."""
    acts = collect(handle, TARGET, BASELINE, positions=2, batch_size=3, keep_vectors=True)
    ids = handle.prompt_ids([*TARGET, *BASELINE])
    along = collect_rows(handle, ids[:11], ids[11:], answers=([2] * 11, [1, 2, 3] * 3 + [1, 1]))
    judge = RefusesWithR()
    before = measure(handle, TARGET, BASELINE, judge=judge, max_new_tokens=4)
    edit = Edit.uniform(find_writers(handle), difference_of_means(acts).unit[2, 0, -1])
    with attached(handle, edit):
        after = measure(handle, TARGET, BASELINE, judge=judge, max_new_tokens=4, original=before)
        first = first_token(handle, ids)
    sides = [judged(handle, prompts, judge, max_new_tokens=4) for prompts in (TARGET, BASELINE)]
    side = Examples(TARGET, sides[0].answers, BASELINE, sides[1].answers)
    fitted = fit(handle, difference_of_means(acts), side, side, judge, QUICK)
    numbers = {
        "mean": acts.target.mean, "variance": acts.baseline.variance, "vectors": acts.target.vectors,
        "along": along.baseline.mean, "first": first, "divergence": torch.tensor(after.divergence[:3]),
        "loss": torch.tensor(before.loss), "directions": torch.from_numpy(fitted.edit.directions),
        "strengths": torch.from_numpy(fitted.edit.strengths),
    }  # fmt: skip
    texts = {
        "answers": [a.ids for m in (before, after) for a in (*m.target_answers, *m.baseline_answers)],
        "writers": fitted.edit.writers, "why": fitted.why, "refused": [p.refused for p in fitted.frontier],
    }  # fmt: skip
    return numbers, texts


@pytest.fixture(scope="module")
def here(folder):
    """What the stages give in shards, in this process."""
    handle = load(folder, dtype="float32")
    handle.workers = Here()
    found = seen(handle)
    assert handle.workers.calls > 50
    return found


def test_shards_depend_on_the_rows_alone():
    assert shards([3, 9, 5]) == [[1, 2, 0]]
    many = shards([i % 50 for i in range(5000)])
    assert sorted(i for part in many for i in part) == list(range(5000))
    assert max(map(len, many)) == LARGEST
    assert len(shards([1] * 512)) == 8


def test_parts_have_the_statistics_of_the_whole(tiny_handle):
    whole = collect(tiny_handle, TARGET, BASELINE, keep_vectors=True).target
    parts = [[7, 1, 2], [0, 3, 10], [4, 5, 6, 8, 9]]
    own = [collect(tiny_handle, [TARGET[i] for i in part], BASELINE, keep_vectors=True).target for part in parts]
    found = merged(own, parts)
    assert found.count == 11
    torch.testing.assert_close(found.mean, whole.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.variance, whole.variance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.vectors, whole.vectors, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_shards_give_what_the_whole_gives(folder, here):
    numbers, texts = seen(load(folder, dtype="float32"))
    assert here[1] == texts
    for name, value in numbers.items():
        torch.testing.assert_close(here[0][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("nodes", "workers", "each"),
    [([8, 8], 4, 4), ([8], 3, 2), ([4, 4], 1, 4), ([2], 4, 0.5), ([0, 0], 2, 0), ([], 1, 0)],
)
def test_cards_for_each_worker(nodes, workers, each):
    assert cards_each(nodes, workers) == each


# --- with Ray ---


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    """Ray on this machine, whose workers know the tests' modules; shut down afterwards."""
    ray = pytest.importorskip("ray")
    patch = pytest.MonkeyPatch()
    patch.setenv(
        "PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    )
    yield ray
    ray.shutdown()
    patch.undo()


def processes(workers):
    nothing = [workers.ray.put(None)]
    return [workers.ray.get(one.run.remote(process, nothing, {}, [], 0)) for one in workers.actors]


@pytest.mark.slow
def test_two_workers_one_of_them_killed(folder, here, ray, capfd):
    handle = load(folder, dtype="float32")
    workers = Pool(2, None)
    workers.replicate(handle, OPTIONS)
    assert len(set(processes(workers))) == 2
    with pytest.raises(NonFiniteError, match="the driver hears this"):
        workers.map(handle, failing, None, [0], lambda _: None)
    before = processes(workers)
    mapped, died = workers.map, []

    def mapping(handle, function, common, calls, tick):
        """Now and then one worker dies while it works: during the fit, and while answers are decoded."""
        if function.__name__ in ("_gradient", "_decode_shard") and function.__name__ not in died:
            died.append(function.__name__)
            victim = processes(workers)[len(died) - 1]
            threading.Timer(0.01, os.kill, (victim, signal.SIGKILL)).start()
        return mapped(handle, function, common, calls, tick)

    workers.map = mapping
    numbers, texts = seen(handle)
    assert sorted(died) == ["_decode_shard", "_gradient"]
    assert texts == here[1]
    assert all(torch.equal(value.nan_to_num(), here[0][name].nan_to_num()) for name, value in numbers.items())
    assert not set(before) & set(processes(workers))
    assert capfd.readouterr() == ("", "")


@LONG
@pytest.mark.parametrize("count", [1, 4])
def test_any_number_of_workers(folder, here, ray, count):
    handle = load(folder, dtype="float32")
    workers = Pool(count, None)
    workers.replicate(handle, OPTIONS)
    assert len(set(processes(workers))) == count
    numbers, texts = seen(handle)
    assert texts == here[1]
    assert all(torch.equal(value.nan_to_num(), here[0][name].nan_to_num()) for name, value in numbers.items())


@pytest.mark.slow
def test_a_cluster_loses_a_node_and_then_its_head(folder):
    pytest.importorskip("ray")
    paths = os.pathsep.join([str(TESTS), *sys.path])
    # the nodes begin without a token, whatever Ray asked for in this process before: who joins them sends none
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, TESTS / "cluster.py", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--resume goes on" in done.stdout.splitlines()[-1]


def alike(model, few, room):
    """A run with two workers, by the command line, and one without give one recipe."""
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "abliterate", "run", model, "--out", "two", "--workers", "2", *few, "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"RAY_ADDRESS": "127.0.0.1:9"}  # a cluster that isn't there any more
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=room, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ray" not in (done.stdout + done.stderr).lower()
    succeeds("run", model, "--out", room / "none", *few, "--quiet")
    two, none = (load_recipe(room / name / "recipe.safetensors").edit for name in ("two", "none"))
    assert two.writers == none.writers
    np.testing.assert_allclose(two.directions, none.directions, atol=1e-5)
    np.testing.assert_allclose(two.strengths, none.strengths, atol=1e-5)


@pytest.mark.slow
def test_the_command_starts_workers_of_its_own_whatever_cluster_was_here(tiny_folder, tmp_path):
    alike(tiny_folder, [*SMALL, "--no-filter", "--force", "--method", "sweep"], tmp_path)


@LONG
def test_the_demo_models_recipe(tmp_path):
    few = [
        *PROMPTS, "--train-prompts", "12", "--validation-prompts", "6", "--test-prompts", "4", "--max-new-tokens", "8",
        "--steps", "3", "--also-prompts", "0", "--obligations", "0", "--second-turn", "0", "--report-judge", "none",
        "--dtype", "float32",
    ]  # fmt: skip
    alike("demo", few, tmp_path)


# --- bad input ---

RUN = ["--out", "out", *SMALL]


def test_no_workers(tmp_path, tiny_folder):
    assert "greater than or equal to 1" in fails(tmp_path, "run", tiny_folder, *RUN, "--workers", "0")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere", "127.0.0.1:port", "127.0.0.1:99999999"])
def test_nobody_answers(tmp_path, tiny_folder, address):
    assert f"no Ray cluster answers at {address}" in fails(tmp_path, "run", tiny_folder, *RUN, "--ray", address)


def test_ray_is_not_installed(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'abliterate[ray]'" in fails(tmp_path, "run", tiny_folder, *RUN, "--workers", "2")


def test_replicas_and_tensor_parallel(tmp_path, tiny_folder):
    said = fails(tmp_path, "run", tiny_folder, *RUN, "--workers", "2", "--tensor-parallel")
    assert "take one of them" in said


def test_other_versions(monkeypatch):
    monkeypatch.setattr(pool, "versions", lambda: {"abliterate": "1", "torch": "3"})
    with pytest.raises(AbliterateError, match="a worker has torch 2 and this process 3; install the same"):
        pool.check_versions([{"abliterate": "1", "torch": "3"}, {"abliterate": "1", "torch": "2"}])
