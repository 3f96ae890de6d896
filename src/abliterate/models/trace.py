"""What the modules of a model gave in one run, and which parameters that is linear in.

Nothing here knows a model's name or how its modules are called: everything is read off tensors. A parameter that,
changed along a random direction, changes an output along that direction and no other is one that the output is linear
in. Which outputs make up what is added to the stream, `sums` finds.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.common.errors import WriterError
from abliterate.models.placement import at_hand


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: what it was given, its first floating input, and the first tensor it gave.

    Attributes:
        start: how many calls had ended when it began: those from there to it were made inside it.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input: Tensor | None
    output: Tensor
    start: int = 0


class Norm(NamedTuple):
    """A norm as arithmetic: out = scalar of the token * gain * (x, less its mean if centred) + bias.

    Attributes:
        gain: [d_model] float32, None when it is all ones and no parameter.
        gain_from: (name within the module, number added), None when no parameter is behind the gain.
        centred: whether the mean over features is subtracted.
        bias: name within the module of what is added at the end, if anything is.
    """

    gain: Float[Tensor, " d_model"] | None
    gain_from: tuple[str, float] | None
    centred: bool
    bias: str | None


def first_tensor(*packs: Any) -> Tensor:
    """The first floating tensor in positional arguments, keyword arguments or an output.

    Raises:
        WriterError: when there is none.
    """
    for pack in packs:
        values = pack.values() if isinstance(pack, dict) else pack
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
            if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
                return value[0]
    raise WriterError("a block takes or gives no tensor; its stream can't be read")


@torch.inference_mode()
def record(modules: Iterable[nn.Module], run: Callable[[], Any], width: int) -> list[Call]:
    """The calls of modules, in the order they end, while `run` runs.

    Args:
        modules: those to listen to.
        run: what runs the model.
        width: d_model. Tensors whose last dimension is a multiple are copied: some models add to them in place later.
    """
    calls: list[Call] = []
    starts: dict[nn.Module, list[int]] = {}

    def kept(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.ndim and value.shape[-1] % width == 0 else value

    def begin(module: nn.Module, _args: Any) -> None:
        starts.setdefault(module, []).append(len(calls))

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        start = starts[module].pop()
        try:
            output = first_tensor((out,))
        except WriterError:  # a mask, a router's choice ... no stream in it
            return
        args, kwargs = tuple(map(kept, args)), {key: kept(value) for key, value in kwargs.items()}
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        calls.append(Call(module, args, kwargs, given[0] if given else None, kept(output), start))

    with contextlib.ExitStack() as undo:
        for module in modules:
            undo.callback(module.register_forward_pre_hook(begin).remove)
            undo.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        run()
    return calls


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: torch's, or GPT-2's Conv1D, which keeps its weight transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@torch.inference_mode()
def as_norm(call: Call, width: int) -> Norm | None:
    """What a module is as a norm, measured on random tokens; None when it is something else.

    A module without submodules whose parameters all are [d_model] vectors is tried; it is a norm when zeros
    give its bias and random tokens give one gain for all of them, with or without the mean taken out.
    """
    module, given = call.module, call.input
    vectors = dict(module.named_parameters())
    if next(module.children(), None) is not None or any(p.shape != (width,) for p in vectors.values()):
        return None
    if given is None or given.shape[-1] != width or len(call.args) + len(call.kwargs) != 1:
        return None
    with at_hand(module):
        return _measured_norm(call, given, width)


def _measured_norm(call: Call, given: Tensor, width: int) -> Norm | None:
    module, vectors = call.module, dict(call.module.named_parameters())
    generator = torch.Generator().manual_seed(0)
    # tokens of other means and sizes than those a norm gives, so that none, RMS and layer norms differ
    x = torch.randn(given.shape, generator=generator) + 1
    x = (x * torch.linspace(1, 4, x[..., 0].numel()).reshape(*x.shape[:-1], 1)).to(given.device, given.dtype)
    offset = module(torch.zeros_like(x)).double().reshape(-1, width)[0].cpu()
    y = module(x).double().reshape(-1, width).cpu() - offset
    x = x.double().reshape(-1, width).cpu()
    for centred in (False, True):
        u = x - x.mean(-1, keepdim=True) if centred else x
        u = u / u.square().mean(-1, keepdim=True).sqrt()
        gain = (y * u).sum(0) / u.square().sum(0)
        if (y - gain * u).norm() <= 2 * _closeness(given.dtype) * y.norm():
            return _named(vectors, gain, offset, centred, _closeness(given.dtype))
    return None


def _closeness(dtype: torch.dtype) -> float:
    """Relative difference that rounding and a norm's epsilon explain: 1e-3 in float32."""
    return max(1e-3, 4 * torch.finfo(dtype).eps)


def _named(vectors: dict[str, nn.Parameter], gain: Tensor, offset: Tensor, centred: bool, close: float) -> Norm:
    """The norm with its gain and bias traced to parameters where they are some."""
    bias = None
    for name, vector in vectors.items():
        wide = vector.detach().double().cpu()
        for number in (0.0, 1.0):
            if (wide + number - gain).norm() <= close * gain.norm():
                others = [n for n in vectors if n != name]
                bias = next((n for n in others if (vectors[n].cpu() - offset).abs().max() <= close), None)
                return Norm((wide + number).float(), (name, number), centred, bias)
        if (wide - offset).norm() <= close * (1 + offset.norm()):
            bias = name
    plain = (gain - 1).abs().max() <= close
    return Norm(None if plain else gain.float(), None, centred, bias)


@torch.inference_mode()
def linear_parameters(call: Call, width: int, names: Sequence[str] | None = None) -> dict[str, int]:
    """The parameters of a module (named from it) that its output is linear in along d_model, with the axis.

    Each parameter with a dimension of size d_model, siblings in a list of experts together, is changed along a
    random direction r of that dimension; those for which the output changes along r and nothing else are what
    writes it, whatever the routing, gates and multipliers between them. All of them cleared of r must clear the
    output of r, else none is returned: something that isn't linear writes too.

    Args:
        call: a recorded call; it is run again some times, with changed copies of one parameter at a time.
        width: d_model.
        names: the parameters to try, None for all.
    """
    with at_hand(call.module):
        return _linear_parameters(call, width, names)


def _linear_parameters(call: Call, width: int, names: Sequence[str] | None) -> dict[str, int]:
    groups: dict[tuple[str, torch.Size], list[str]] = {}
    parameters = {n: p for n, p in call.module.named_parameters() if names is None or n in set(names)}
    for name, parameter in parameters.items():
        if parameter.is_floating_point() and width in parameter.shape:
            kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
            groups.setdefault((kind, parameter.shape), []).append(name)
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(width, generator=generator, dtype=torch.float64)
    r /= r.norm()
    eps = torch.finfo(call.output.dtype).eps
    before = _again(call, {})
    much = 64 * width**0.5  # linear is linear however much: far above rounding
    found: dict[str, int] = {}
    for (_, shape), names in groups.items():
        for axis in [i for i, size in enumerate(shape) if size == width]:
            change = _again(call, {n: _less(parameters[n], r, axis, much) for n in names}) - before
            beside = change - torch.outer(change @ r, r)
            if change.norm() > 1e3 * eps * before.norm() and beside.norm() <= min(0.1, 1e4 * eps) * change.norm():
                found.update(dict.fromkeys(names, axis))
                break
    if not found:
        return {}
    cleared = _again(call, {n: _less(parameters[n], r, axis, 1.0) for n, axis in found.items()})
    bound = max(1e-5, 8 * eps * width**-0.5)
    return found if (cleared @ r).norm() <= bound * cleared.norm() else {}


def _again(call: Call, changed: dict[str, Tensor]) -> Float[Tensor, "token d_model"]:
    """What the module gives for the same input with other parameters, in float64."""
    out = torch.func.functional_call(call.module, changed, call.args, call.kwargs)
    return first_tensor((out,)).reshape(-1, call.output.shape[-1]).to("cpu", torch.float64)


def _less(parameter: Tensor, direction: Tensor, axis: int, strength: float) -> Tensor:
    """The parameter less strength * r r^T along an axis, computed in its own dtype: a copy is what it costs."""
    wide = parameter.detach().movedim(axis, -1)
    r = direction.to(wide.device, wide.dtype)
    return (wide - strength * (wide @ r)[..., None] * r).movedim(-1, axis)
