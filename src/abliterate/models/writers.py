"""Finding what adds to the residual stream by looking at a run; that nothing was missed, `apply.proof` proves.

No table of model names: a few tokens go through the model, every module's output is kept, and the ones
whose sum is the stream are the writers. What can't be explained is an error, never skipped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.common.errors import WriterError
from abliterate.models.handle import Handle
from abliterate.models.trace import (
    Call,
    Norm,
    as_norm,
    explain,
    find_mid_reader,
    first_tensor,
    is_linear,
    linear_parameters,
    record,
)

SITES = ("pre", "mid", "post")
PROBE_TOKENS = 8


@dataclass(frozen=True)
class Writer:
    """A parameter that adds to the residual stream.

    Attributes:
        name: the parameter's name, as in the state dict.
        module: name of the module whose output is linear in it and nothing else but its bias (an experts module
            for fused experts): what is taken out of that output is taken out of the parameter. Empty when
            there is none, as where a module uses several such parameters itself.
        layer: index of its block, None for an embedding or projector.
        side: "embedding", "attention", "mlp", or "projector" (writes the image tokens of a multimodal model).
        shape: the parameter's shape: 2-D for a linear layer or embedding, 3-D for fused experts, 1-D for a
            norm's own bias that reaches the stream.
        axis: the parameter's dimension that runs along d_model.
        bias: parameter name of its bias, if it has one.
        gain: [d_model] float32, what a norm behind it multiplies its output by before the stream (post-norm
            blocks), else None.
        gain_from: (parameter name of that norm's weight, number added to it), so that gain == weight + number;
            the number is 1.0 for Gemma's norms, 0.0 for others. None without a gain.
        centred: whether the norm behind it also subtracts the mean over features (LayerNorm).
        bias_axis: the bias's dimension that runs along d_model (1 where each expert has one).
    """

    name: str
    module: str
    layer: int | None
    side: str
    shape: tuple[int, ...]
    axis: int
    bias: str | None = None
    gain: Float[Tensor, " d_model"] | None = None
    gain_from: tuple[str, float] | None = None
    centred: bool = False
    bias_axis: int = 0


class Layout(NamedTuple):
    """A model's writers, and per block the module whose input is the `mid` site (None in parallel blocks)."""

    writers: tuple[Writer, ...]
    mid_readers: tuple[nn.Module | None, ...]


def layout(handle: Handle) -> Layout:
    """Find the model's writers (once per handle).

    Raises:
        WriterError: when an addition to the stream can't be traced to a linear layer or embedding; the
            text names block and side.
    """
    cached = handle.__dict__.get("_layout")
    if cached is None:
        cached = handle.__dict__["_layout"] = _look(handle)
    return cached


def find_writers(handle: Handle, layers: Sequence[int] | None = None, *, projector: bool = False) -> tuple[Writer, ...]:
    """The writers of the residual stream, embedding first, then block by block.

    Args:
        handle: a loaded model.
        layers: keep only the writers of these blocks (and no embedding); None keeps all.
        projector: of a multimodal model, also what writes its image tokens (side "projector", last). An edit
            leaves it alone unless it is asked for: refusals live in the text.

    Raises:
        WriterError: as `layout`; with `projector`, also when what writes the image tokens isn't found.
    """
    writers = layout(handle).writers
    found = writers if layers is None else tuple(w for w in writers if w.layer in set(layers))
    return found + _projector(handle) if projector else found


def _projector(handle: Handle) -> tuple[Writer, ...]:
    cached = handle.__dict__.get("_projector")
    if cached is None:
        from abliterate.models.projector import projector_parameters

        finder = _Finder(handle)
        owners = projector_parameters(handle)
        cached = handle.__dict__["_projector"] = tuple(finder.held(owners, set(owners), None, "projector"))
    return cached


@contextlib.contextmanager
def watch_sites(handle: Handle, look: Callable[[int, str, Tensor], None]) -> Iterator[None]:
    """Call look(layer, site, stream [batch, position, d_model]) at every site of every block as the model runs."""
    mids = layout(handle).mid_readers
    hooks = []
    shapes: dict[int, torch.Size] = {}
    for layer, block in enumerate(handle.blocks):

        def pre(_m: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
            stream = first_tensor(args, kwargs)
            shapes[layer] = stream.shape
            look(layer, "pre", stream)

        def post(_m: nn.Module, _args: Any, out: Any, layer: int = layer) -> None:
            look(layer, "post", first_tensor((out,)))

        hooks.append(block.register_forward_pre_hook(pre, with_kwargs=True))
        hooks.append(block.register_forward_hook(post))
        reader = mids[layer]
        if reader is not None:

            def mid(_m: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                look(layer, "mid", first_tensor(args, kwargs).reshape(shapes[layer]))  # OPT flattens it

            hooks.append(reader.register_forward_pre_hook(mid, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def probe_ids(handle: Handle, seed: int, tokens: int) -> Tensor:
    """Random token ids [1, token], at most as many as the model's context holds."""
    generator = torch.Generator().manual_seed(seed + 1)
    length = min(tokens, handle.context_length or tokens)
    return torch.randint(0, handle.vocabulary, (1, length), generator=generator).to(handle.device)


def _look(handle: Handle) -> Layout:
    """Run a few tokens, then explain every addition to the stream by modules' outputs."""
    owner = {module: id(block) for block in handle.blocks for module in block.modules()}
    ids = probe_ids(handle, 0, PROBE_TOKENS)
    calls = record(
        handle.decoder.modules(), lambda: handle.hidden_states(input_ids=ids, use_cache=False), handle.d_model, owner
    )
    block_calls = {id(block): calls[id(block)] for block in handle.blocks}
    first_input = block_calls[id(handle.blocks[0])][-1].input
    assert first_input is not None
    finder = _Finder(handle)
    writers = finder.behind(torch.zeros_like(first_input), first_input, calls[None], None, "embedding")
    mids: list[nn.Module | None] = []
    for layer, block in enumerate(handle.blocks):
        *inside, whole = block_calls[id(block)]
        pre, post = whole.input, whole.output
        assert pre is not None
        reader = find_mid_reader(pre, inside)
        mids.append(reader.module if reader else None)
        if reader is not None and reader.input is not None:
            mid = reader.input.reshape(pre.shape)
            writers += finder.behind(pre, mid, inside, layer, "attention")
            writers += finder.behind(mid, post, inside, layer, "mlp")
        else:
            writers += finder.behind(pre, post, inside, layer, "attention and mlp")
    unique = {writer.name: writer for writer in reversed(writers)}  # blocks may share what they call
    return Layout(tuple(w for w in writers if unique[w.name] is w), tuple(mids))


class _Finder:
    """Traces additions to the stream to parameters; remembers what it learnt of one kind of module."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.kinds: dict[Any, dict[str, int]] = {}

    def behind(
        self, before: Tensor, after: Tensor, calls: Sequence[Call], layer: int | None, side: str
    ) -> list[Writer]:
        """The writers of after - before.

        Raises:
            WriterError: when calls don't add up to it, or one of them isn't linear in any parameter.
        """
        place = f"block {layer}, {side}" if layer is not None else f"the {side}"
        group = explain(before, after, calls)
        if not group:
            raise WriterError(
                f"model {self.handle.source}: can't tell what writes to the residual stream at {place}; "
                f"nothing was changed (this architecture isn't supported yet)"
            )
        found = []
        for order, call in enumerate(group):
            named = ("attention", "mlp")[min(order, 1)] if side == "attention and mlp" else side
            found += self.writers(call, calls, layer, named)
        return found

    def writers(self, call: Call, calls: Sequence[Call], layer: int | None, side: str) -> list[Writer]:
        """The writers of what one call gave: its module's own, those that feed it, or those inside it.

        Raises:
            WriterError: naming the module when its output is linear in none of its parameters.
        """
        module, name = call.module, self.handle.module_names[call.module]
        if isinstance(module, nn.Embedding):
            return [self._writer(module, {"weight": 1}, layer, side)]
        if is_linear(module):
            axis = 1 if type(module).__name__ == "Conv1D" else 0
            own = {"weight": axis} if module.bias is None else {"weight": axis, "bias": 0}
            return [self._writer(module, own, layer, side)]
        norm = as_norm(call, self.handle.d_model)
        if norm is not None and call.input is not None:
            earlier = calls[: calls.index(call)]
            feeding = explain(torch.zeros_like(call.input), call.input, earlier)
            found = [w for c in feeding for w in self.writers(c, earlier, layer, side)]
            if found and not any(w.gain is not None or w.centred for w in found):
                return self._through(norm, name, found)
        else:
            found = self._inside(call, calls, layer, side)
            if found:
                return found
            descendants = set(module.modules()) - {module}
            inner = [c for c in calls if c.module in descendants]
            parts = explain(torch.zeros_like(call.output), call.output, inner)
            if parts:
                return [w for c in parts for w in self.writers(c, inner, layer, side)]
        place = f"block {layer}, {side}" if layer is not None else f"the {side}"
        raise WriterError(
            f"model {self.handle.source}: at {place} the stream is written by {name} ({type(module).__name__}), "
            f"which isn't a linear layer or embedding; nothing was changed (this architecture isn't supported yet)"
        )

    def _through(self, norm: Norm, name: str, found: list[Writer]) -> list[Writer]:
        """Writers seen through a norm behind them, and the norm's own bias."""
        source = (f"{name}.{norm.gain_from[0]}", norm.gain_from[1]) if norm.gain_from else None
        seen = [replace(w, gain=norm.gain, gain_from=source, centred=norm.centred) for w in found]
        if norm.bias:
            seen.append(replace(seen[0], name=f"{name}.{norm.bias}", module=name, shape=(self.handle.d_model,), axis=0,
                                bias=None, gain=None, gain_from=None, centred=False))  # fmt: skip
        return seen

    def _inside(self, call: Call, calls: Sequence[Call], layer: int | None, side: str) -> list[Writer]:
        """The writers inside a module that isn't a linear layer: a mixture's experts, shared or not."""
        module, width = call.module, self.handle.d_model
        kind = (type(module), tuple((n, p.shape) for n, p in module.named_parameters()))
        if kind not in self.kinds:
            self.kinds[kind] = linear_parameters(call, width)
        owners: dict[nn.Module, dict[str, int]] = {}
        for name, axis in self.kinds[kind].items():
            path, _, last = name.rpartition(".")
            owners.setdefault(module.get_submodule(path), {})[last] = axis
        heard = {c.module for c in calls if c.output.shape[-1] == width}
        return self.held(owners, heard, layer, side)

    def held(
        self, owners: dict[nn.Module, dict[str, int]], heard: set[nn.Module], layer: int | None, side: str
    ) -> list[Writer]:
        """Writers of the parameters that modules hold; those not alone in their module's output can't be hooked."""
        writers = []
        for owner, own in owners.items():
            sizes = sorted((owner.get_parameter(n).ndim for n in own), reverse=True)
            nested = any(other is not owner and other in set(owner.modules()) for other in owners)
            heard_alone = (owner in heard or is_linear(owner)) and not nested  # no token may have come to an expert
            if heard_alone and (len(sizes) == 1 or (len(sizes) == 2 and sizes[0] > sizes[1])):
                writers.append(self._writer(owner, own, layer, side))
            else:
                writers += [self._writer(owner, {n: axis}, layer, side, hooked=False) for n, axis in own.items()]
        return writers

    def _writer(
        self, owner: nn.Module, own: dict[str, int], layer: int | None, side: str, *, hooked: bool = True
    ) -> Writer:
        """The writer that a module holds: its weight, and its bias where it has one."""
        name = self.handle.module_names[owner]
        (weight, axis), *rest = sorted(own.items(), key=lambda item: -owner.get_parameter(item[0]).ndim)
        bias, bias_axis = rest[0] if rest else (None, 0)
        return Writer(
            f"{name}.{weight}", name if hooked else "", layer, side, tuple(owner.get_parameter(weight).shape), axis,
            f"{name}.{bias}" if bias else None, bias_axis=bias_axis,
        )  # fmt: skip
