"""Where a model's modules compute, and where their weights are: the one place that knows.

accelerate hooks the modules of a model that is spread over devices. A hook says where its module computes, and brings
weights that are kept on the CPU or on disk there for each pass; between passes they are on "meta", without values. Any
other module computes where its parameters are; those of a model that several processes hold together are shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its hook says, or else where its parameters are."""
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.is_meta:
        return next((device_of(child) for child in module.children() if next(child.parameters(), None) is not None),
                    parameter.device)  # fmt: skip
    return torch.device("cpu") if parameter is None else parameter.device


def devices_of(model: nn.Module) -> list[torch.device]:
    """Every device that something of a model computes on, in the model's order."""
    holders = (m for m in model.modules() if next(m.parameters(recurse=False), None) is not None)
    return list(dict.fromkeys(map(device_of, holders)))


def offloaded(model: nn.Module) -> bool:
    """Whether weights are kept elsewhere than where they are computed with, and brought for each pass."""
    return any(True for module in model.modules() for _ in _bringing(module))


def sharded(parameter: Any) -> bool:
    """Whether it is a DTensor, of which each of several processes holds a part."""
    return hasattr(parameter.data, "placements")


@contextlib.contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """All weights of a module where it computes for as long as the context lasts, and the passes in it take them."""
    with contextlib.ExitStack() as stack:
        for part in module.modules():
            for hook in _bringing(part):
                hook.pre_forward(part)
                hook.offload = False  # a pass would bring its own

                def away(part: nn.Module = part, hook: Any = hook) -> None:
                    hook.offload = True
                    hook.post_forward(part, None)

                stack.callback(away)
        yield


def value(model: nn.Module, name: str) -> Tensor:
    """A parameter with its values, wherever it is kept; of a shard, this process's part."""
    parameter = model.get_parameter(name).detach()
    if parameter.is_meta and (kept := _kept(model, name)) is not None:
        hook, own = kept
        return hook.weights_map[own].to(parameter.dtype)
    return parameter.to_local() if sharded(parameter) else parameter  # type: ignore[attr-defined]


@contextlib.contextmanager
def replaced(model: nn.Module, name: str, new: Tensor) -> Iterator[None]:
    """Other values in a parameter for as long as the context lasts."""
    parameter, kept = model.get_parameter(name), _kept(model, name)
    if kept is None:
        before, parameter.data = parameter.data, new
        try:
            yield
        finally:
            parameter.data = before
        return
    hook, own = kept
    weights, hook.weights_map = hook.weights_map, _Other(hook.weights_map, own, new)
    try:
        yield
    finally:
        hook.weights_map = weights


def stored_in(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(safetensors file, name in it) of each of a module's weights that is brought from disk."""
    for part in module.modules():
        for hook in _bringing(part):
            weights = hook.weights_map
            index, prefix = getattr(getattr(weights, "dataset", None), "index", {}), getattr(weights, "prefix", "")
            for own, _ in part.named_parameters(recurse=bool(hook.place_submodules)):
                found = index.get(prefix + own, {})
                if "safetensors_file" in found:
                    yield found["safetensors_file"], found.get("weight_name", prefix + own)


class _Other(Mapping[str, Tensor]):
    """What a hook brings, but for one weight."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, new: Tensor) -> None:
        self.weights, self.name, self.new = weights, name, new

    def __getitem__(self, name: str) -> Tensor:
        return self.new if name == self.name else self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _bringing(module: nn.Module) -> list[Any]:
    return [hook for hook in _hooks(module) if getattr(hook, "offload", False)]


def _kept(model: nn.Module, name: str) -> tuple[Any, str] | None:
    """The hook that brings a parameter, and the parameter's name to it; None where it is at hand."""
    owner, _, own = name.rpartition(".")
    while True:
        for hook in _bringing(model.get_submodule(owner)):
            if "." not in own or hook.place_submodules:
                return hook, own
        if not owner:
            return None
        owner, _, last = owner.rpartition(".")
        own = f"{last}.{own}"
