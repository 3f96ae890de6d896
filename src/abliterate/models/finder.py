"""The search for what writes to the residual stream: a few tokens go through the model, and every sum is explained.

No table of model names: every module's output is kept, and the ones whose sum is the stream are the writers. What
can't be explained is an error that says why, never skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.common.errors import AbliterateError, WriterError, shorten
from abliterate.models.handle import Handle
from abliterate.models.memory import no_room, out_of_memory
from abliterate.models.placement import value
from abliterate.models.sums import as_rows, explain, pieces, why_not
from abliterate.models.trace import Call, Norm, as_norm, is_linear, linear_parameters, record

PROBE_TOKENS = 8
STREAM = "stream."  # what the names of the stream's own sites begin with


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
            the number is 1.0 for Gemma's norms, 0.0 for others. None without a gain, or where one is no parameter.
        gain_times: the same of further norms behind that norm; gain is the product of all.
        centred: whether the norm behind it also subtracts the mean over features (LayerNorm).
        bias_axis: the bias's dimension that runs along d_model (1 where each expert has one).
        at: "input" or "output" of `module` where it is no parameter but the stream itself (`stream_layout`).
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
    gain_times: tuple[tuple[str, float], ...] = ()
    centred: bool = False
    bias_axis: int = 0
    at: str = ""


class Layout(NamedTuple):
    """What writes to a model's stream, and how that lies in its tensors.

    Attributes:
        writers: embedding first, then block by block.
        mid_readers: per block the module whose input is the `mid` site (None in parallel blocks).
        rows: how many vectors of d_model the stream keeps of each token: 1 but for hyper-connections.
        rows_first: they stand before the batch (AltUp), not behind the tokens.
    """

    writers: tuple[Writer, ...]
    mid_readers: tuple[nn.Module | None, ...]
    rows: int = 1
    rows_first: bool = False


def probe_ids(handle: Handle, seed: int, tokens: int) -> Tensor:
    """Random token ids [1, token], at most as many as the model's context holds."""
    generator = torch.Generator().manual_seed(seed + 1)
    length = min(tokens, handle.context_length or tokens)
    return torch.randint(0, handle.vocabulary, (1, length), generator=generator).to(handle.device)


def stream_layout(handle: Handle) -> Layout:
    """The stream's own sites in the place of writers: what enters the first block, and what each block gives.

    A direction taken out there is out, whatever writes and whatever norms and scales are in between; no weight holds
    such an edit, so it lives only while the model runs.
    """
    calls, tokens = _calls(handle, handle.blocks)
    first = calls[0].input if calls else None
    rows = None if first is None else as_rows(first, _positions(first, tokens, handle.d_model), handle.d_model)
    if first is None or rows is None:
        raise WriterError(f"model {handle.source}: what enters its blocks is no stream of d_model {handle.d_model}")
    names, width = handle.module_names, (handle.d_model,)
    layer = [*handle.blocks].index(calls[0].module)
    sites = [Writer(f"{STREAM}{layer}.pre", names[calls[0].module], None, "embedding", width, 0, at="input")]
    for layer, block in enumerate(handle.blocks):
        sites.append(Writer(f"{STREAM}{layer}.post", names[block], layer, "mlp", width, 0, at="output"))
    return Layout(tuple(sites), (None,) * handle.layers, rows.shape[1], 1 < rows.shape[1] == len(first))


def _calls(handle: Handle, modules: Iterable[nn.Module]) -> tuple[list[Call], int]:
    """The calls of modules as a few tokens go through the model, and how many those are."""
    ids = probe_ids(handle, 0, PROBE_TOKENS)
    try:
        found = record(modules, lambda: handle.hidden_states(input_ids=ids, use_cache=False), handle.d_model)
        return found, ids.numel()
    except AbliterateError:
        raise
    except Exception as error:  # whatever a model's code says of an input that it can't do without
        if out_of_memory(error):
            raise no_room(handle, "a pass over a few tokens") from error
        raise WriterError(
            f"model {handle.source} doesn't run on token ids alone ({type(error).__name__}: "
            f"{shorten(str(error), 120)}), so what writes to its stream can't be seen"
        ) from error


def _positions(stream: Tensor, tokens: int, width: int) -> int:
    """How many positions a stream has: those of the tokens, and of a prefix that a model puts before them (CPM-Ant)."""
    return stream.numel() // width if stream.ndim < 4 and stream.shape[-1] == width else tokens


def find_layout(handle: Handle) -> Layout:
    """Run a few tokens, then explain every addition to the stream by modules' outputs."""
    calls, tokens = _calls(handle, handle.decoder.modules())
    layers = {block: layer for layer, block in enumerate(handle.blocks)}
    runs = [call for call in calls if call.module in layers and call.input is not None]
    if not runs:
        raise WriterError(f"model {handle.source} runs none of its blocks on token ids alone")
    first = runs[0].input
    assert first is not None
    tokens = _positions(first, tokens, handle.d_model)
    inner = {id(c) for run in runs for c in calls[run.start : calls.index(run) + 1]}
    outside = [call for call in calls if id(call) not in inner]
    finder = Finder(handle, tokens)
    writers = finder.behind(torch.zeros_like(first), first, outside, None, "embedding")
    mids: list[nn.Module | None] = [None] * handle.layers
    for run in runs:
        layer = layers[run.module]
        inside = calls[run.start : calls.index(run)]
        cut = pieces(run.input, run.output, inside, handle.d_model, tokens)  # type: ignore[arg-type]
        for place, (before, after, reader) in enumerate(cut):
            writers += finder.behind(before, after, inside, layer, _side(place, len(cut)))
            if place == 0 and reader is not None:
                mids[layer] = reader.module
    idle = [layer for block, layer in layers.items() if not any(run.module is block for run in runs)]
    if idle:
        handle.notes.append(f"blocks {', '.join(map(str, idle))} don't run on text alone and are left as they are")
    unique = {writer.name: writer for writer in reversed(writers)}  # blocks may share what they call
    rows = first.numel() // (tokens * handle.d_model)
    return Layout(tuple(w for w in writers if unique[w.name] is w), tuple(mids), rows, 1 < rows == len(first))


def _side(place: int, of: int) -> str:
    """What writes in a piece of a block: attention and MLP in turn, or MLPs only after the first of an odd number."""
    if of == 1:
        return "attention and mlp"
    return "attention" if place == 0 or (of % 2 == 0 and place % 2 == 0) else "mlp"


class Finder:
    """Traces additions to the stream to parameters; remembers what it learnt of one kind of module."""

    def __init__(self, handle: Handle, tokens: int = PROBE_TOKENS) -> None:
        self.handle, self.tokens = handle, tokens
        self.kinds: dict[Any, dict[str, int]] = {}

    def explain(self, before: Tensor, after: Tensor, calls: Sequence[Call]) -> list[Call]:
        return explain(before, after, calls, self.handle.d_model, self.tokens)

    def behind(
        self, before: Tensor, after: Tensor, calls: Sequence[Call], layer: int | None, side: str
    ) -> list[Writer]:
        """The writers of after - before.

        Raises:
            WriterError: when calls don't add up to it, or one of them isn't linear in any parameter.
        """
        place = f"block {layer}, {side}" if layer is not None else f"the {side}"
        group = self.explain(before, after, calls)
        if not group:
            why = why_not(before, after, calls, self.handle.d_model, self.tokens)
            raise WriterError(
                f"model {self.handle.source}: can't tell what writes to the residual stream at {place}: {why}; "
                f"nothing was changed"
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
            found = self._feeding(call, calls, layer, side)
            # a mean taken out behind a gain isn't one behind the product of gains
            if found and not (norm.centred and any(w.gain is not None for w in found)):
                return self._through(norm, name, found)
        else:
            found = self._inside(call, calls, layer, side)
            if found:
                return found
            descendants = set(module.modules()) - {module}
            inner = [c for c in calls if c.module in descendants]
            parts = self.explain(torch.zeros_like(call.output), call.output, inner)
            if parts:
                return [w for c in parts for w in self.writers(c, inner, layer, side)]
        place = f"block {layer}, {side}" if layer is not None else f"the {side}"
        raise WriterError(
            f"model {self.handle.source}: at {place} the stream is written by {name} ({type(module).__name__}), "
            f"which isn't a linear layer or embedding; nothing was changed"
        )

    def _feeding(self, norm: Call, calls: Sequence[Call], layer: int | None, side: str) -> list[Writer]:
        """The writers of what a norm was given: outputs, or what the embedding that it belongs to looked up itself."""
        given, earlier = norm.input, calls[: calls.index(norm)]
        assert given is not None
        feeding = self.explain(torch.zeros_like(given), given, earlier)
        if feeding:
            return [w for c in feeding for w in self.writers(c, earlier, layer, side)]
        for call in calls[len(earlier) + 1 :]:
            if isinstance(call.module, nn.Embedding) and norm.module in set(call.module.modules()):
                table = value(self.handle.model, f"{self.handle.module_names[call.module]}.weight")
                looked_up = replace(call, output=nn.functional.embedding(call.args[0].to(table.device), table))
                if self.explain(torch.zeros_like(given), given, [looked_up]):
                    return [self._writer(call.module, {"weight": 1}, layer, side, hooked=False)]
        return []

    def _through(self, norm: Norm, name: str, found: list[Writer]) -> list[Writer]:
        """Writers seen through a norm behind them, and the norm's own bias."""
        seen = []
        own = (f"{name}.{norm.gain_from[0]}", norm.gain_from[1]) if norm.gain_from else None
        for w in found:
            w = replace(w, centred=w.centred or norm.centred)
            if norm.gain is not None and w.gain is None:
                w = replace(w, gain=norm.gain, gain_from=own)
            elif norm.gain is not None and w.gain is not None:
                both = w.gain_from if own else None, (*w.gain_times, own) if own and w.gain_from else ()
                w = replace(w, gain=w.gain * norm.gain, gain_from=both[0], gain_times=both[1])
            seen.append(w)
        if norm.bias:
            seen.append(replace(seen[0], name=f"{name}.{norm.bias}", module=name, shape=(self.handle.d_model,), axis=0,
                                bias=None, gain=None, gain_from=None, gain_times=(), centred=False))  # fmt: skip
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
