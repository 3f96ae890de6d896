"""The arithmetic on stored weights, in numpy, is torch's; and where it is all that is needed, torch is not imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from abliterate.apply.checkpoint import blocks
from abliterate.apply.checkpoint.blocks import FLOATS, take_out
from abliterate.apply.removal import removed
from abliterate.common.errors import NonFiniteError
from abliterate.edit.algebra import Factors, factors
from abliterate.edit.edit import Part, orthonormal
from abliterate.edit.recipe import Recipe, load_recipe, save_recipe
from apply.checkpoints import small_recipe, small_shards, write_checkpoint

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
SIXTEEN = {"BF16": torch.bfloat16, "F16": torch.float16}


def array_of(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().view(FLOATS[dtype]).reshape(tensor.shape).copy()


def tensor_of(array: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(array.view(np.uint8)).view(DTYPES[dtype]).view(array.shape)


def drawn(dtype: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(DTYPES[dtype])


def change_of(d_model: int, k: int) -> Factors:
    generator = torch.Generator().manual_seed(8)
    rows, strengths = orthonormal(torch.randn(k, d_model, generator=generator)), torch.rand(k, generator=generator)
    return factors(Part(rows, strengths), torch.rand(d_model, generator=generator))


def edited(weight: torch.Tensor, dtype: str, change: Factors, **options: Any) -> torch.Tensor:
    """`take_out` of a stack [outer, d_model, inner]."""
    outer, d_model, inner = weight.shape
    rows = array_of(weight, dtype).reshape(-1, d_model if inner == 1 else inner)
    new: list[np.ndarray] = []
    take_out(
        lambda low, into: np.copyto(into, rows[low : low + len(into)]), lambda block: new.append(block.copy()),
        FLOATS[dtype], (outer, d_model, inner), change, **options,
    )  # fmt: skip
    return tensor_of(np.concatenate(new), dtype).view(weight.shape)


NOTHING = Factors(np.zeros((0, 1), np.float32), np.zeros((0, 1), np.float32))


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_number_of_sixteen_bits_widens_to_itself(dtype):
    every = tensor_of(np.arange(2**16).astype(np.uint16).view(FLOATS[dtype]), dtype)
    every = every[every.isfinite()]
    new = edited(every.view(1, 1, -1), dtype, NOTHING).view(-1)
    assert torch.equal(new.view(torch.int16), every.view(torch.int16))
    assert np.array_equal(array_of(every, dtype).astype(np.float32), every.float().numpy())


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_rounding_is_to_the_nearest_and_ties_go_to_even(dtype):
    every = tensor_of(np.arange(2**16).astype(np.uint16).view(FLOATS[dtype]), dtype).float()
    every = every[every.isfinite()].sort().values
    ties = every[:-1] / 2 + every[1:] / 2
    drawn = torch.randn(10**5) * torch.randn(10**5).mul(3).exp()
    numbers = torch.cat([every, ties, drawn, -drawn, torch.tensor([-0.0])])
    if dtype == "F16":  # what rounds to infinity is refused
        numbers = numbers[numbers.abs() < 65504]
    wanted = numbers.to(DTYPES[dtype])
    new = edited(torch.zeros(1, 1, len(numbers)).to(DTYPES[dtype]), dtype, NOTHING, addition=numbers.numpy()[None])
    assert torch.equal(new.view(-1), wanted)
    rounded = array_of(wanted, dtype)
    assert np.array_equal(numbers.numpy().astype(FLOATS[dtype]).view(np.uint16), rounded.view(np.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 64, 300), (3, 64, 9), (70, 64, 1), (1, 64, 1)])
@pytest.mark.parametrize("room", [2**16, 100])
def test_what_is_taken_out_is_what_torch_takes_out(monkeypatch, dtype, k, shape, room):
    monkeypatch.setattr(blocks, "BLOCK", room)
    weight = drawn(dtype, *shape)
    change = change_of(shape[1], k)
    new = edited(weight, dtype, change)
    if dtype == "F64":  # in memory, the sum runs in float32
        left, right = (torch.from_numpy(factor).double() for factor in change)
        wanted = weight - left.T @ (right @ weight)
    else:
        wanted = removed(weight, change, 1)
    eps = torch.finfo(DTYPES[dtype]).eps
    torch.testing.assert_close(new, wanted, rtol=eps, atol=1e-14 if dtype == "F64" else 1e-6)
    if dtype in SIXTEEN:  # float32 sums in another order round another way now and then
        assert (new != wanted).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [(1, 64, 300), (3, 64, 9), (70, 64, 1)])
def test_norms_are_kept_as_torch_keeps_them(dtype, k, shape):
    weight = drawn(dtype, *shape)
    change = change_of(shape[1], k)
    new, wanted = edited(weight, dtype, change, keep_norms=True), removed(weight, change, 1, keep_norms=True)
    torch.testing.assert_close(new, wanted, rtol=torch.finfo(DTYPES[dtype]).eps, atol=2e-6)
    assert not torch.equal(new, edited(weight, dtype, change))


def test_what_the_directions_have_nothing_of_stays_bit_for_bit():
    """So that a rounding that isn't the nearest would show on every weight."""
    weight = drawn("BF16", 1, 64, 300)
    row = torch.zeros(1, 64)
    row[0, 5] = 1.0
    new = edited(weight, "BF16", Factors(row.numpy(), row.numpy()))
    assert not new[0, 5].any()
    weight[0, 5] = 0
    assert torch.equal(new, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(2, 64, 30), (70, 64, 1)])
@pytest.mark.parametrize("keep_norms", [False, True])
def test_a_value_that_is_not_finite_is_found(dtype, value, shape, keep_norms):
    weight = drawn(dtype, *shape)
    change = change_of(64, 1)
    change.left[0, 3] = change.right[0, 3] = 0  # nothing comes out of this feature, and still
    weight[1, 3, 0] = value
    with pytest.raises(NonFiniteError, match="some weight"):
        edited(weight, dtype, change, keep_norms=keep_norms, name="some weight")


def test_a_shift_that_overflows_is_found():
    bias, addition = torch.full((1, 8, 1), 65000.0).half(), np.full((1, 8), 1000, np.float32)
    with pytest.raises(NonFiniteError, match="bias"):
        edited(bias, "F16", change_of(8, 1), addition=addition, name="bias")


@pytest.mark.parametrize("centred", [False, True])
def test_a_gain_on_its_own_device_and_dtype_gives_the_same_factors(centred):
    part = Part(orthonormal(torch.randn(3, 24)), torch.tensor([1.0, 0.5, -0.2]))
    gain = torch.randn(24).bfloat16()
    theirs = factors(part, gain, centred)
    ours = factors(part, gain.double().numpy(), centred)
    assert all(np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert theirs.left.dtype == theirs.right.dtype == np.float32


# --- recipes without torch ---


def test_an_edit_that_was_read_is_the_edit(tmp_path):
    recipe = small_recipe(0.7, 2)
    recipe.edit = recipe.edit + recipe.edit.shifting(1, torch.randn(16), 2.5)
    save_recipe(recipe, tmp_path / "r")
    read = load_recipe(tmp_path / "r")
    again, edit = read.edit * 0.3, recipe.edit * 0.3
    assert again.writers == edit.writers
    assert list(again.parts) == list(edit.parts)
    for ours, theirs in zip(again.parts.values(), edit.parts.values(), strict=True):
        assert np.array_equal(ours.directions, theirs.directions)
        assert np.array_equal(ours.strengths, theirs.strengths)
    assert [(s.layer, s.size) for s in again.shifts] == [(s.layer, s.size) for s in edit.shifts]
    assert all(np.array_equal(a.vector, b.vector) for a, b in zip(again.shifts, edit.shifts, strict=True))
    assert isinstance(read, Recipe)
    assert np.array_equal(read.edit.strengths, recipe.edit.strengths)
    with pytest.raises(ValueError, match="finite"):
        read.edit * float("inf")


RUN = """
import json, sys
from abliterate.cli import main
sys.argv = ["abliterate", "apply", *sys.argv[1:]]
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
print(json.dumps(sorted(m for m in sys.modules if "." not in m)))
"""


@pytest.mark.parametrize("options", [[], ["--norm-preserving"], ["--plan"], ["--strength", "0.5"], ["--in-place"]])
def test_the_plain_case_imports_no_torch(tmp_path, options):
    """It would take longer than copying some GiB; nor what only looks cheap."""
    folder = write_checkpoint(tmp_path / "model", small_shards())
    save_recipe(small_recipe(), tmp_path / "recipe.safetensors")
    out = [] if "--in-place" in options else ["--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "recipe.safetensors"), str(folder), *out, *options, "--quiet"],
        capture_output=True, text=True, check=True, env=os.environ,
    )  # fmt: skip
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"numpy", "abliterate"} <= imported
    assert not imported & {"torch", "transformers", "jaxtyping", "asyncio", "unittest", "scipy", "huggingface_hub"}
    written = folder if "--in-place" in options else tmp_path / "out"
    assert (written / "README.md").is_file() == ("--plan" not in options)
