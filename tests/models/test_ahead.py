"""The next block's weights are read while one computes, up through the blocks and down again."""

from __future__ import annotations

import torch

from abliterate.directions.activations import collect
from abliterate.measure.decode import Answer
from abliterate.measure.divergence import make_reference
from abliterate.models import ahead
from abliterate.models.loading import load
from abliterate.models.shards import read_shard
from abliterate.search.packed import Packer, Row
from stages import BASELINE, TARGET


class AtOnce:
    """A pool without threads that notes which block's bytes were read."""

    def __init__(self, *_args, **_kwargs):
        self.read = AtOnce.read = []

    def submit(self, work, stretches):
        work(stretches)
        self.read.append({stretch.start for stretch in stretches})
        done = ahead.Future()
        done.set_result(None)
        return done


def limited(folder, monkeypatch):
    monkeypatch.setattr(ahead, "ThreadPoolExecutor", AtOnce)
    return load(folder, dtype="float32", max_memory="cpu=60kB")


def test_the_next_block_is_read(tiny_folder, monkeypatch):
    handle = limited(tiny_folder, monkeypatch)
    file = read_shard(tiny_folder / "model.safetensors")
    blocks = [
        {t.start for name, t in file.tensors.items() if name.startswith(f"model.layers.{place}.")}
        for place in range(handle.layers)
    ]
    handle.model(input_ids=torch.arange(9)[None])
    assert AtOnce.read == [*blocks[1:], blocks[0]]
    AtOnce.read.clear()
    packer = Packer(handle, [Row(list(range(9)), 2)])
    AtOnce.read.clear()
    scale = torch.ones((), requires_grad=True)
    handle.blocks[0].register_forward_hook(lambda _m, _a, out: out * scale)
    packer.logprobs([0])[0].sum().backward()
    assert AtOnce.read[-4:] == [blocks[2], blocks[1], blocks[0], blocks[1]]


def test_every_prompt_of_a_stage_is_in_one_pass(tiny_folder, monkeypatch):
    handle, passes = limited(tiny_folder, monkeypatch), []
    handle.blocks[1].register_forward_pre_hook(lambda _module, args: passes.append(len(args[0])))
    ids = handle.prompt_ids(TARGET * 20)
    collect(handle, TARGET * 20, BASELINE * 20, positions=1)
    assert passes.count(60) == 2 and max(passes) == 60
    passes.clear()
    make_reference(handle, ids, [Answer([5, 6], "", True, False)] * 60)
    assert passes.count(60) == 1
