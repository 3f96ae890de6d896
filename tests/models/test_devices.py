"""What options say of devices: what isn't there is one line, and what doesn't fit is brought from disk."""

from __future__ import annotations

import pytest
import torch

from abliterate.common.errors import ModelError
from abliterate.models import devices
from abliterate.models.devices import devices_here, placing, room_on_disk
from abliterate.models.loading import load
from abliterate.models.placement import offloaded
from command import SMALL, fails, listing
from models import ARCHITECTURES, save_tiny

MIXTURE = ARCHITECTURES["qwen3_moe"]
WRONG = {
    "a device that isn't there": ({"device": "cuda:7"}, "device cuda:7 isn't on this machine; here there are: "),
    "no device at all": ({"device_map": "gpu"}, "device gpu isn't on this machine"),
    "two at once": ({"device": "cpu", "device_map": "auto"}, "give one of them"),
    "no size": ({"max_memory": "cpu=plenty"}, "'cpu=plenty' is no device with a size; write it as 0=20GiB,cpu=60GiB"),
    "memory of a card that isn't there": ({"max_memory": "9=1GiB"}, "device 9 isn't on this machine"),
    "a limit on one device": ({"max_memory": "cpu=1GiB", "device": "cpu"}, "--device-map auto"),
    "alone": ({"tensor_parallel": True}, "torchrun --nproc-per-node"),
    "spread twice": ({"tensor_parallel": True, "device_map": "auto"}, "leave the other options for devices out"),
    "no room for a block": ({"max_memory": "cpu=1kB"}, "model.embed_tokens.weight of"),
    "no folder": ({"max_memory": "cpu=1GiB", "offload_folder": "/dev/null/x"}, "offload folder /dev/null/x can't be"),
}


@pytest.mark.parametrize("given, said", WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_one_line(given, said, tiny_folder):
    with pytest.raises(ModelError) as error:
        load(tiny_folder, **given)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_command_line_says_so_and_leaves_nothing(tiny_folder, tmp_path):
    line = fails(tmp_path, "measure", tiny_folder, "--out", tmp_path / "m.json", *SMALL[:4], "--max-memory", "cpu=2kB")
    assert "cpu is given 0.00 MiB" in line


@pytest.mark.skipif(torch.accelerator.is_available(), reason="says what a machine without one gets")
def test_without_an_accelerator_it_is_the_cpu():
    assert devices_here() == ["cpu"] and placing() == {} and placing(device="cpu") == {"device_map": "cpu"}
    assert placing(max_memory="cpu=1.5GiB") == {"device_map": "auto", "max_memory": {"cpu": 3 * 2**29}}


@pytest.mark.parametrize("kind, count, wanted", [("cuda", 2, "auto"), ("xpu", 1, "auto"), ("mps", 1, "mps")])
def test_accelerators_are_taken_by_themselves(kind, count, wanted, monkeypatch):
    monkeypatch.setattr(devices, "default_kind", lambda: kind)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    assert placing() == {"device_map": wanted}
    assert placing(device=kind) == {"device_map": kind}
    assert placing(device="cpu") == {"device_map": "cpu"}


def test_what_is_not_allowed_in_memory_is_brought_from_disk(tiny_folder):
    plain, limited = load(tiny_folder, dtype="float32"), load(tiny_folder, dtype="float32", max_memory="cpu=130kB")
    assert offloaded(limited.model) and not offloaded(plain.model)
    ids = torch.arange(12)[None]
    assert torch.equal(limited.model(input_ids=ids).logits, plain.model(input_ids=ids).logits)


def test_weights_that_are_written_down_are_gone_with_the_model(tmp_path):
    """Experts are stored one by one and used together, so the folder's own files don't do."""
    folder, room = save_tiny(tmp_path / "model", MIXTURE()), tmp_path / "room"
    room.mkdir()
    plain = load(folder, dtype="float32")
    limited = load(folder, dtype="float32", max_memory="cpu=130kB", offload_folder=str(room))
    assert any(path.suffix == ".safetensors" for path in room.rglob("*"))
    ids = torch.arange(12)[None]
    assert torch.equal(limited.model(input_ids=ids).logits, plain.model(input_ids=ids).logits)
    del limited
    import gc

    gc.collect()
    assert listing(room) == {}


def test_a_full_offload_folder_is_one_line(tmp_path, monkeypatch):
    from transformers.integrations import accelerate

    def full(*_args, **_kwargs):
        raise RuntimeError("No space left on device (os error 28)")

    monkeypatch.setattr(accelerate, "save_file", full)
    folder, room = save_tiny(tmp_path / "model", MIXTURE()), tmp_path / "room"
    room.mkdir()
    with pytest.raises(ModelError, match="the offload folder's disk is full; name another with --offload-folder"):
        load(folder, dtype="float32", max_memory="cpu=130kB", offload_folder=str(room))
    assert listing(room) == {}


def test_the_cache_is_the_room_where_none_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path))
    with room_on_disk(None) as room:
        assert room.startswith(str(tmp_path / "offload"))
