"""What is done to the outputs of a model's modules while it runs: taking directions out, adding vectors, looking."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.models.handle import Handle

PROBE_TOKENS = 8

Change: TypeAlias = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def changed(
    changes: Iterable[tuple[nn.Module, Change]], entering: Iterable[tuple[nn.Module, Change]] = ()
) -> Iterator[None]:
    """Each module's output put through a function for as long as the context lasts; gradients pass.

    Of several outputs it is the first (an experts module may give its scores too).

    Args:
        changes: of outputs.
        entering: of inputs; of several, the first that is a floating tensor.
    """
    with contextlib.ExitStack() as stack:
        for module, change in entering:
            stack.callback(module.register_forward_pre_hook(_on_input(change), with_kwargs=True).remove)
        for module, change in changes:
            stack.callback(module.register_forward_hook(_on_first(change)).remove)
        yield


def _on_first(change: Change) -> Any:
    def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
        return change(out) if isinstance(out, Tensor) else (change(out[0]), *out[1:])

    return hook


def _on_input(change: Change) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        for pack in (named := dict(enumerate(args)), kwargs):
            for key, value in pack.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    pack[key] = change(value)
                    return tuple(named.values()), kwargs
        return args, kwargs

    return hook


def taking_out(left: Float[Tensor, "k d_model"], right: Float[Tensor, "k d_model"]) -> Change:
    """out <- out - left^T (right out), the factors in the output's dtype and on its device."""
    up, down = left.contiguous(), right.T.contiguous()

    def take_out(out: Tensor) -> Tensor:
        flat = out.reshape(-1, len(down))  # several streams may stand side by side
        return torch.addmm(flat, flat @ down.to(flat), up.to(flat), alpha=-1).view_as(out)

    return take_out


def adding(vector: Float[Tensor, " d_model"]) -> Change:
    """out <- out + vector."""
    return lambda out: (out.reshape(-1, len(vector)) + vector.to(out)).view_as(out)


@torch.no_grad()
def block_output(handle: Handle, layer: int) -> Float[Tensor, "token d_model"]:
    """A block's output on a few random tokens, always the same ones; float32 on the CPU."""
    seen: list[Tensor] = []

    def look(out: Tensor) -> Tensor:
        seen.append(out)
        return out

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, handle.vocabulary, (1, PROBE_TOKENS), generator=generator)
    with changed([(handle.blocks[layer], look)]):
        handle.hidden_states(input_ids=ids.to(handle.device), use_cache=False)
    return seen[0].detach().reshape(PROBE_TOKENS, -1).to("cpu", torch.float32)
