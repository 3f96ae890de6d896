"""What memory a pass takes, what is free, and what becomes of a batch that it doesn't hold.

A pass is measured without weights and on no device: a twin of the model on "meta" is run, and what its tensors would
take is added up.
"""

from __future__ import annotations

import contextlib
import copy
import math
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from abliterate.common.errors import ModelError
from abliterate.common.reporting import default_reporter
from abliterate.models.cache import run_cached
from abliterate.models.handle import Handle
from abliterate.models.placement import devices_of

USABLE = 0.8  # of what is free; the rest is for what isn't counted, such as buffers of matrix products
ROWS, WIDTH = 2, 64  # of the passes measured: their tokens are few, and their difference is what a token takes
WIDE = 4  # bytes of a float32
SMALLER = "--quantise 4bit, a smaller --batch-size, or --max-memory, which brings weights from disk"
_SAID = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Footprint(NamedTuple):
    """Bytes that a token takes.

    Attributes:
        passing: of a forward pass, at most at once; no matter how many blocks it goes through.
        kept: in one block, for the backward pass.
        cached: keys and values (or states) in all blocks.
        logits: of logits and log-probabilities, where they are wanted.
    """

    passing: float
    kept: float
    cached: float
    logits: float

    def row(self, tokens: float, outputs: float = 0) -> float:
        """Of a row of so many tokens, with logits at some of them."""
        return tokens * (self.passing + self.cached) + outputs * self.logits


def footprint(handle: Handle) -> Footprint:
    """What a token takes in this model, measured once per handle; guessed from its width where no twin can be run."""
    known = handle.__dict__.get("_footprint")
    if known is None:
        try:
            known = measured(twin(handle))
        except Exception:  # whatever a model's own code says of tensors without values
            state = handle.d_model * handle.dtype.itemsize
            known = Footprint(16 * state, 25 * state, 2 * handle.layers * state, _logit_bytes(handle))
        handle.__dict__["_footprint"] = known
    return known


def twin(handle: Handle) -> Handle:
    """The same model without weights, on "meta"."""
    config = copy.deepcopy(handle.model.config)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = type(handle.model)._from_config(config, dtype=handle.dtype)
    return Handle(model.eval().requires_grad_(False), None, handle.source)


@torch.inference_mode(False)
def measured(handle: Handle) -> Footprint:
    """The same of a model on "meta".

    Raises:
        Whatever a model's code raises that looks at values.
    """
    few, more = (_peak(handle, rows) for rows in (ROWS, 2 * ROWS))
    tokens = ROWS * WIDTH
    with torch.no_grad():
        layers = getattr(_run(handle, ROWS), "layers", [])
    cached = sum({id(t): t.numel() * t.element_size() for layer in layers for t in _tensors(vars(layer))}.values())

    def with_gradient(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out.detach().requires_grad_()

    hook = handle.embedding.register_forward_hook(with_gradient)
    try:
        with torch.enable_grad(), saved(handle.model) as kept:
            _run(handle, ROWS)
    finally:
        hook.remove()
    passing, kept_each = (more - few - cached) / tokens, kept.bytes / tokens / handle.layers
    return Footprint(passing, kept_each, cached / tokens, _logit_bytes(handle))


class Saved:
    """What was kept for a backward pass so far.

    Attributes:
        bytes: of all but weights.
    """

    def __init__(self, apart_from: nn.Module) -> None:
        self.bytes = 0
        self._seen = {p.untyped_storage()._cdata for p in (*apart_from.parameters(), *apart_from.buffers())}

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor


@contextlib.contextmanager
def saved(apart_from: nn.Module) -> Iterator[Saved]:
    """Count what is kept for a backward pass while this lasts, a module's own weights left out."""
    found = Saved(apart_from)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.note(tensor.detach()), lambda tensor: tensor):
        yield found


class Live(TorchDispatchMode):
    """Bytes of tensors made while this lasts that are alive, and the most there were at once.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._note(tensor.untyped_storage(), 0)  # it was there before, or is counted
        made = func(*args, **kwargs)
        for tensor in _tensors(made):
            self._note(storage := tensor.untyped_storage(), storage.nbytes())
        return made

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_reference: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)


def _peak(handle: Handle, rows: int) -> int:
    with torch.no_grad(), Live() as live:
        _run(handle, rows)
    return live.peak


def _run(handle: Handle, rows: int) -> Any:
    """Run the decoder and give its cache; without one, models would look at values to see what they are to mask."""
    ids = torch.zeros(rows, WIDTH, dtype=torch.long, device="meta")
    with _Fused():
        return run_cached(handle.decoder, {"input_ids": ids, "use_cache": True})[1]


class _Fused(TorchFunctionMode):
    """Attention as devices compute it, without a matrix of weights; on "meta" torch would make one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _logit_bytes(handle: Handle) -> float:
    item = handle.dtype.itemsize
    return handle.vocabulary * (item + (WIDE if item < WIDE else 0) + WIDE)  # widened, and as log-probabilities


def free_bytes(device: torch.device | str) -> float:
    """What a device can still hold, what torch keeps ready on a card among it; infinite where that can't be told.

    On the CPU what the machine has available, or less where a control group allows less.
    """
    device = torch.device(device)
    if device.type == "cuda":
        kept_ready = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept_ready)
    return float(min(psutil.virtual_memory().available, *_allowed())) if device.type == "cpu" else math.inf


def _allowed(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """What each control group above this process leaves it, of both versions; at least infinity."""
    yield math.inf
    with contextlib.suppress(OSError):
        for line in proc.read_text(encoding="utf-8").splitlines():
            _, kinds, inside = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            root = mount / "memory" if kinds else mount
            most, used = ("limit_in_bytes", "usage_in_bytes") if kinds else ("max", "current")
            for folder in (below := root / inside.lstrip("/"), *below.parents):
                with contextlib.suppress(OSError, ValueError):  # "max" is no number
                    limit = float((folder / f"memory.{most}").read_text(encoding="ascii"))
                    stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                    files = float(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # can be let go
                    yield limit - float((folder / f"memory.{used}").read_text(encoding="ascii")) + files


def free_for(handle: Handle) -> float:
    """What a pass may take: the least that is free on a device that the model computes on."""
    devices = handle.__dict__.get("_devices")
    if devices is None:  # all modules are gone through for it, and this is asked before every batch
        devices = handle.__dict__["_devices"] = devices_of(handle.model)
    return min(map(free_bytes, devices), default=math.inf)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short: a device's, or the CPU's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(said in str(error).lower() for said in _SAID)


def no_room(handle: Handle, what: str) -> ModelError:
    """The error that memory doesn't hold even the least that a stage can run, with what is taken and what is free."""
    taken = sum(p.numel() * p.element_size() for p in handle.model.parameters()) / 2**30
    free = ", ".join(f"{free_bytes(device) / 2**30:.1f} GiB on {device}" for device in devices_of(handle.model))
    return ModelError(
        f"memory doesn't hold {what} beside model {handle.source}, whose weights take {taken:.1f} GiB; free are "
        f"{free}; try {SMALLER}"
    )


def halved(handle: Handle, rows: int, error: BaseException) -> int:
    """Half of the rows that memory didn't hold; says so, once per handle.

    Raises:
        ModelError: when it was one row.
        BaseException: the error itself when it is about something else.
    """
    if not out_of_memory(error):
        raise error
    if rows <= 1:
        raise no_room(handle, "one row") from error
    traceback.clear_frames(error.__traceback__)  # they hold what the batch made
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _say(handle, rows)
    return rows // 2


def fitting(handle: Handle, rows: int, each: float) -> int:
    """At most so many rows, fewer where they would take more than is free; at least one.

    Args:
        handle: what they are run through; what memory didn't hold before isn't tried again.
        rows: wanted at once.
        each: bytes of one.
    """
    room = min(USABLE * free_for(handle), handle.__dict__.get("_held", math.inf))
    if room >= rows * each:
        return rows
    _say(handle, rows)
    return max(1, int(room // each))


def in_parts(
    handle: Handle, rows: Sequence[Item], run: Callable[[Sequence[Item]], Result], tokens: int, outputs: int = 0
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Run a batch, cut into parts where memory doesn't hold it whole: first by what is free, then by halves.

    Args:
        handle: what it is run through.
        rows: of the batch.
        run: runs some of the rows.
        tokens: of the longest row, the shared prefix among them.
        outputs: at how many tokens of a row logits are wanted.

    Yields:
        Some of the rows, in their order, and what running them gave.

    Raises:
        ModelError: when memory doesn't hold one row.
    """
    each = footprint(handle).row(tokens, outputs)
    most, done = fitting(handle, len(rows), each), 0
    while done < len(rows):
        part = rows[done : done + most]
        try:
            result = run(part)
        except (RuntimeError, MemoryError) as error:
            most = halved(handle, len(part), error)
            handle.__dict__["_held"] = most * each
            continue
        yield part, result
        done += len(part)


def _say(handle: Handle, rows: int) -> None:
    if not handle.__dict__.get("_memory_said"):
        handle.__dict__["_memory_said"] = True
        text = f"memory doesn't hold {rows} rows at a time; fewer go in at once, with the same results up to rounding"
        handle.notes.append(text)
        default_reporter().say(text)
