"""One recipe through every form on the demo model: the logits on the same tokens agree as far as the form's own
rounding goes. Slow: real weights, a few minutes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import abliterate as ab
from abliterate.apply.adapter.form import merged
from abliterate.apply.forms import ApplyOptions, apply_recipe
from abliterate.common.reporting import Silent
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe, load_recipe, save_recipe
from abliterate.models.loading import load
from abliterate.models.recipes import recipe_for
from abliterate.models.writers import SITES, find_writers
from long import LONG

pytestmark = pytest.mark.slow

LAYER, SITE, POSITION = 15, "pre", -1


class Case(NamedTuple):
    """The demo model's folder, a recipe for it, and the token ids that logits are compared on."""

    folder: str
    recipe: Recipe
    ids: list[list[int]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Difference of means of 32 and 32 prompts, out of every writer at full strength; through the recipe file."""
    folder = str(ab.demo_model())
    handle = load(folder, dtype="bfloat16")
    prompts = ab.load_sides("bundled", "bundled", limit_train=32, limit_validation=8)
    acts = ab.collect(handle, prompts.target.train, prompts.baseline.train)
    direction = ab.difference_of_means(acts).unit[LAYER, SITES.index(SITE), POSITION]
    edit = Edit.uniform(find_writers(handle), direction, 1.0)
    path = tmp_path_factory.mktemp("recipe") / "recipe.safetensors"
    save_recipe(recipe_for(edit, folder), path)
    both = [*prompts.target.validation.texts[:3], *prompts.baseline.validation.texts[:3]]
    return Case(folder, load_recipe(path), handle.prompt_ids(both))


@torch.no_grad()
def logits(model: torch.nn.Module, ids: list[list[int]]) -> list[Tensor]:
    """[position, vocabulary] for each row of ids, float32, each position's mean taken off."""
    rows = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in ids]
    return [row - row.mean(-1, keepdim=True) for row in rows]


def off(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Root mean square difference, relative to the size of what is wanted."""
    squares = sum(float((f.double() - w.double()).square().sum()) for f, w in zip(found, wanted, strict=True))
    return (squares / sum(float(w.double().square().sum()) for w in wanted)) ** 0.5


def last(rows: list[Tensor]) -> list[Tensor]:
    return [row[-1:] for row in rows]


@pytest.fixture(scope="module")
def plain(case: Case) -> list[Tensor]:
    """The unedited model, run in float32."""
    return logits(load(case.folder, dtype="float32").model, case.ids)


@pytest.fixture(scope="module")
def hooks(case: Case) -> list[Tensor]:
    """The edit live, run in float32: what every other form is held to."""
    handle = load(case.folder, dtype="float32")
    with handle.attached(case.recipe.edit):
        return logits(handle.model, case.ids)


@pytest.fixture(scope="module")
def baked(case: Case) -> list[Tensor]:
    """Baked into bfloat16 weights, these run in float32: what is off is bfloat16's rounding of the weights."""
    handle = load(case.folder, dtype="bfloat16")
    handle.bake(case.recipe.edit)
    return logits(handle.model.float(), case.ids)


@pytest.fixture(scope="module")
def adapter(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return form(case, "adapter", case.folder, tmp_path_factory.mktemp("adapter") / "lora")


def form(case: Case, name: str, model: str | Path, out: Path) -> Path:
    summary = apply_recipe(case.recipe, str(model), out, name, ApplyOptions(), Silent())
    assert summary["writers"] == len(case.recipe.edit.writers)
    return out


def test_the_edit_is_no_small_thing(plain: list[Tensor], hooks: list[Tensor], baked: list[Tensor]) -> None:
    """What follows would prove little if rounding were as large as the edit."""
    assert off(hooks, plain) > 10 * off(baked, hooks)


def test_weights(case: Case, hooks: list[Tensor], baked: list[Tensor]) -> None:
    handle = load(case.folder, dtype="float32")
    handle.bake(case.recipe.edit)
    assert off(logits(handle.model, case.ids), hooks) < 1e-5
    assert off(baked, hooks) < 0.02


def test_adapter_attached_and_merged_in_float32(case: Case, hooks: list[Tensor], adapter: Path) -> None:
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load(case.folder, dtype="float32").model, str(adapter))
    assert off(logits(adapted, case.ids), hooks) < 1e-5
    model = merged(load(case.folder, dtype="float32").model, adapter)
    assert off(logits(model, case.ids), hooks) < 1e-5


def test_adapter_taken_off(case: Case, plain: list[Tensor], adapter: Path) -> None:
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load(case.folder, dtype="float32").model, str(adapter))
    with adapted.disable_adapter():
        assert off(logits(adapted, case.ids), plain) == 0
    assert off(logits(adapted.unload(), case.ids), plain) == 0


def test_adapter_merged_into_bfloat16(
    case: Case, hooks: list[Tensor], baked: list[Tensor], adapter: Path
) -> None:  # fmt: skip
    model = merged(load(case.folder, dtype="bfloat16").model, adapter)
    assert off(logits(model.float(), case.ids), hooks) < 1.5 * off(baked, hooks)


def test_checkpoint(case: Case, hooks: list[Tensor], baked: list[Tensor], tmp_path: Path) -> None:
    out = form(case, "checkpoint", case.folder, tmp_path / "edited")
    found = logits(load(out, dtype="bfloat16").model.float(), case.ids)
    assert off(found, hooks) < 1.5 * off(baked, hooks)
    assert off(found, baked) < 1.5 * off(baked, hooks)


@pytest.mark.parametrize("kind", ["Q8_0", pytest.param("Q4_1", marks=LONG)])
def test_gguf(
    case: Case, plain: list[Tensor], hooks: list[Tensor], demo_gguf: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """Off by no more than the type itself is.

    What the form adds is seen against the same file with the edit live: it packs the edited weights once more, and that
    is held to what packing the unedited weights into the type did. What comes out is seen against the exact
    edit, and held to what the unedited file with the edit live is off.
    """
    packed = demo_gguf(kind)
    handle = load(packed, dtype="float32")
    own = off(logits(handle.model, case.ids), plain)
    with handle.attached(case.recipe.edit):
        live = logits(handle.model, case.ids)
    del handle
    edited = form(case, "gguf", packed, tmp_path / "edited.gguf")
    found = logits(load(edited, dtype="float32").model, case.ids)
    assert off(found, live) < 1.5 * own
    assert off(found, hooks) < 1.5 * off(live, hooks)
    if kind == "Q8_0":
        assert off(found, hooks) < 1.5 * own
        assert off(found, hooks) < 0.25 * off(plain, hooks)


def test_gguf_and_its_adapter_in_llama_cpp(
    case: Case, plain: list[Tensor], hooks: list[Tensor], demo_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    from llama_cpp import LlamaCpp

    def run(path: Path, lora: Path | None = None) -> list[Tensor]:
        with LlamaCpp(path, (lora, 1.0) if lora else None) as model:
            rows = [torch.from_numpy(model.next_logits(row))[None] for row in case.ids]
        return [row - row.mean(-1, keepdim=True) for row in rows]

    packed = demo_gguf("Q8_0")
    own = off(run(packed), last(plain))
    assert own < 0.2
    edited = form(case, "gguf", packed, tmp_path / "edited.gguf")
    assert off(run(edited), last(hooks)) < 1.5 * own
    summary = apply_recipe(
        case.recipe, str(packed), tmp_path / "lora.gguf", "gguf-adapter", ApplyOptions(skip_unsupported=True), Silent()
    )
    assert summary["writers"] > 0.9 * len(case.recipe.edit.writers)
    # what a LoRA can't hold (the embedding of a tied model) is left in: nearer the edit than the plain model is
    assert off(run(packed, tmp_path / "lora.gguf"), last(hooks)) < 0.5 * off(last(plain), last(hooks))
