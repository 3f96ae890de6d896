"""What a run needs of memory: against what torch's profiler measures on the CPU, and the choices that follow."""

from __future__ import annotations

import runpy
import shutil
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch

from abliterate.directions.activations import collect
from abliterate.measure.decode import Answer, decode
from abliterate.measure.divergence import ANSWER_TOKENS, make_reference
from abliterate.models.demo import demo_model
from abliterate.models.handle import common_prefix
from abliterate.models.loading import load
from abliterate.models.memory import footprint
from abliterate.prompts.sets import load_prompts
from abliterate.run import plan
from abliterate.run.needs import Lengths, Model, Room, Sizes, needs
from abliterate.search.packed import Packer, Row
from command import SMALL, abliterate
from models import handle_of, tiny_llama
from peaks import peak_of

WITHIN = 0.3
PLENTY = Room("cpu", 1e15)


def stepped(handle, ids):
    """A step of the fit's size, back to the first block."""
    rows = [Row([*row, *row[:7]], 8) for row in islice(cycle(ids), 24)]
    scale = torch.ones((), requires_grad=True, dtype=handle.dtype)
    hook = handle.blocks[0].register_forward_pre_hook(
        lambda _m, args, kwargs: ((args[0] * scale, *args[1:]), kwargs), with_kwargs=True
    )
    packer = Packer(handle, rows, checkpointing=False)

    def step():
        losses = [-own.gather(-1, torch.zeros(8, 1, dtype=torch.long)).mean() for own in packer.logprobs(range(24))]
        torch.stack(losses).mean().backward()

    try:
        return peak_of(step)
    finally:
        hook.remove()


def measured(handle, texts, answer):
    """Peaks of the stages, and the sizes that they were run with."""
    ids = handle.prompt_ids(texts)
    answers = [Answer(list(islice(cycle(row), ANSWER_TOKENS)), "", False, False) for row in ids]
    footprint(handle), collect(handle, texts[:2], texts[:2]), decode(handle, ids[:2], max_new_tokens=2)  # tried once
    peaks = {
        "collect": peak_of(lambda: collect(handle, texts, texts[:1])),
        "decode": peak_of(lambda: decode(handle, ids, max_new_tokens=answer)),
        "divergence": peak_of(lambda: make_reference(handle, ids, answers, kept=1)),
        "fit": stepped(handle, ids),
    }
    return peaks, Sizes(Lengths(list(map(len, ids)), common_prefix(ids), answer), prompts=len(ids))


def check(handle, texts, answer):
    peaks, sizes = measured(handle, texts, answer)
    found = needs(Model.of(handle, footprint(handle)), PLENTY, sizes)
    ratios = {stage: found.stages[stage].bytes / peak for stage, peak in peaks.items()}
    print(ratios, peaks)
    assert ratios == pytest.approx(dict.fromkeys(peaks, 1.0), abs=WITHIN)
    assert found.fits and found.weights == sum(p.numel() * p.element_size() for p in handle.model.parameters())


@pytest.mark.parametrize("sizes", [{"d_model": 256}, {"d_model": 512, "layers": 2, "tied": False}])
def test_each_stage_of_a_tiny_model_takes_what_is_computed(sizes):
    check(
        handle_of(tiny_llama(**{"heads": 8, "kv_heads": 4, **sizes})),
        load_prompts("bundled", role="target", split="test")[:32],
        24,
    )


@pytest.mark.slow
def test_each_stage_of_the_demo_model_takes_what_is_computed():
    handle = load(str(demo_model()), dtype="float32")
    check(handle, load_prompts("bundled", role="target", split="test")[:32], 24)


def test_with_less_room_batches_shrink_then_another_way_is_named():
    model = Model.of(handle_of(tiny_llama(d_model=256, heads=8, kv_heads=4)))
    sizes = Sizes(Lengths([40] * 64, 10, 20), prompts=64)
    whole = needs(model, PLENTY, sizes)
    assert whole.fits and whole.stages["decode"].chosen == "64 rows at a time"
    assert whole.stages["fit"].chosen == "24 sequences a step"
    beside = max(stage.bytes for stage in whole.stages.values())
    tight = needs(model, Room("cpu", whole.weights + 0.4 * beside), sizes)
    assert tight.fits and "run again on the way back" in tight.stages["fit"].chosen
    assert int(tight.stages["decode"].chosen.split()[0]) < 64
    assert (
        needs(model, Room("cpu", whole.weights + 0.1 * beside), sizes).stages["fit"].bytes < tight.stages["fit"].bytes
    )
    none = needs(model, Room("cuda:0", 0.8 * whole.weights), sizes)
    assert not none.fits and none.advice.startswith("it doesn't fit; --quantise 4bit")
    assert none.rows()[-1][-1] == none.advice
    assert "take a device with more memory" in needs(model, Room("cpu", 0.0), sizes).advice
    two = needs(model, Room("cuda:0", 1e12, 2), sizes)
    assert two.weights == whole.weights / 2 and two.stages["fit"].bytes < whole.stages["fit"].bytes


def test_a_plan_tells_memory_without_weights(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = shutil.copytree(tiny_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    found = abliterate("run", bare, "--plan", "--json", "--quiet", *SMALL)
    assert found.code == 0 and found.json["stages_s"] == {}
    memory = found.json["memory"]
    assert list(memory["stages"]) == ["collect", "decode", "divergence", "fit"] and memory["fits"]
    assert memory["device"] == "cpu" and memory["weight_bytes"] == found.json["disk_bytes"]
    assert "its weights aren't here" in found.json["notes"][0]
    said = abliterate("run", bare, "--plan", *SMALL)
    assert "memory, from the config alone" in said.out and "rows at a time" in said.out
    monkeypatch.setattr(plan, "free_bytes", lambda _device: 1e5)
    monkeypatch.setattr(plan, "open_model", lambda *_: pytest.fail("loaded"))
    tight = abliterate("run", tiny_folder, "--plan", *SMALL)
    assert tight.code == 0 and "it doesn't fit" in tight.out
    assert list(tmp_path.iterdir()) == [bare]


@pytest.mark.slow
def test_the_table_of_docs_is_what_is_computed():
    path = Path(__file__).parents[2] / "scripts" / "plan_table.py"
    script = runpy.run_path(str(path))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert script["page"](page) == page
