"""Wherever a model's halves are, every stage gives what it gives in one place."""

from __future__ import annotations

import pytest
import torch

from abliterate.common.errors import ModelError, NonFiniteError
from abliterate.edit.edit import Edit
from abliterate.models.loading import check_weights
from abliterate.models.placement import at_hand, device_of, devices_of, offloaded, replaced, value
from abliterate.models.writers import find_writers
from models import DEVICE, FAMILIES, handle_of
from stages import same, seen
from virtual import OtherDeviceError, devices, placed, spread

PLACES = {"two": ("lazy:0", "lazy:1"), "cpu": ("lazy:0", "cpu"), "disk": ("cpu", "disk")}


def checked(build, place, folder):
    wanted, handle = seen(handle_of(build())), handle_of(build())
    with spread(handle, *PLACES[place], folder):
        assert len(devices_of(handle.model)) == 1 + (place == "two")
        assert offloaded(handle.model) == (place != "two")
        same(seen(handle), wanted)
        if place != "two":
            assert any(p.is_meta for p in handle.model.parameters())  # away again


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_two_devices_is_on_one(family, tmp_path):
    checked(FAMILIES[family], "two", tmp_path)


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.skipif(DEVICE == "cpu", reason="ABLITERATE_TEST_DEVICE names no other device")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_the_device_is_on_the_cpu(family):
    same(seen(handle_of(FAMILIES[family]())), seen(handle_of(FAMILIES[family](), device="cpu")), 1e-4, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family, place", [("gemma2", "disk"), ("opt", "disk")])
def test_offloaded_is_in_memory(family, place, tmp_path):
    checked(FAMILIES[family], place, tmp_path)


def test_values_are_found_and_replaced_wherever_they_are(tmp_path):
    build, name = FAMILIES["llama_untied_biases"], "model.layers.3.mlp.down_proj.weight"
    plain, handle = handle_of(build()), handle_of(build())
    ids = {"input_ids": torch.arange(8)[None], "use_cache": False}
    with spread(handle, "cpu", "disk", tmp_path):
        module = handle.model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(value(handle.model, name), value(plain.model, name))
        with at_hand(module):
            module.weight[0] = 7  # a pass takes what is at hand
            other = handle.model(**ids).logits
        before = handle.model(**ids).logits
        assert module.weight.is_meta and not torch.equal(other, before)
        new = 2 * value(handle.model, name)
        for one in (handle, plain):
            with replaced(one.model, name, new):
                one.changed = one.model(**ids).logits
        assert torch.equal(handle.changed, plain.changed) and not torch.equal(handle.changed, before)
        assert torch.equal(handle.model(**ids).logits, before)
        with pytest.raises(ModelError, match="kept on disk or CPU and can't be changed in memory"):
            Edit.uniform(find_writers(handle), torch.ones(32), 1.0).bake(handle)


def test_a_weight_on_disk_that_is_not_finite_is_named(tmp_path):
    handle = handle_of(FAMILIES["llama"]())
    handle.model.model.layers[3].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with (
        spread(handle, "cpu", "disk", tmp_path),
        pytest.raises(NonFiniteError, match=r"layers\.3\.self_attn"),
    ):
        check_weights(handle)


def test_virtual_devices_do_not_mix():
    """Without this the tests above could pass by devices that aren't told apart."""
    with devices():
        left, right = torch.zeros(3, device="lazy:0"), placed(torch.ones(3), "lazy:1")
        assert str((left + 1).device) == "lazy:0" and str(right.to(left.device).device) == "lazy:0"
        for mixed in (lambda: left + right, lambda: torch.ones(3) + right, lambda: torch.mv(left[None], right)):
            with pytest.raises((OtherDeviceError, TypeError)):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            left.numpy()
        assert device_of(torch.nn.Linear(2, 2)) == torch.device("cpu")
