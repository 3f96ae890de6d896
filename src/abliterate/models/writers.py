"""A model's writers, and the sites of its stream; that nothing was missed, `apply.proof` proves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.common.errors import WriterError
from abliterate.models.finder import STREAM, Finder, Layout, Writer, find_layout, probe_ids, stream_layout
from abliterate.models.handle import Handle, once
from abliterate.models.trace import first_tensor

__all__ = [
    "NO_WEIGHT", "SITES", "STREAM", "Layout", "Writer", "find_writers", "layout", "probe_ids", "stream_sites",
    "watch_sites",
]  # fmt: skip

SITES = ("pre", "mid", "post")
NO_WEIGHT = "is the stream itself, which no weight holds; chat, measure and studio attach such a recipe live"
OFFER = "the stream itself can be edited while the model runs, though in no weights: --at-stream"


@once
def layout(handle: Handle) -> Layout:
    """Find the model's writers (once per handle); of a handle `at_stream`, the sites of the stream itself.

    Raises:
        WriterError: when an addition to the stream can't be traced to a linear layer or embedding; the
            text names block and side, and why.
    """
    try:
        return stream_layout(handle) if handle.at_stream else find_layout(handle)
    except WriterError as error:
        raise error if handle.at_stream else WriterError(f"{error}; {OFFER}") from error


@once
def stream_sites(handle: Handle) -> dict[str, Writer]:
    """The sites of the stream itself, by the names that an edit has for them: what can be edited of any model, live."""
    found = layout(handle) if handle.at_stream else stream_layout(handle)
    return {site.name: site for site in found.writers}


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


@once
def _projector(handle: Handle) -> tuple[Writer, ...]:
    from abliterate.models.projector import projector_parameters

    owners = projector_parameters(handle)
    return tuple(Finder(handle).held(owners, set(owners), None, "projector"))


@contextlib.contextmanager
def watch_sites(handle: Handle, look: Callable[[int, str, Tensor], None], *, every_row: bool = False) -> Iterator[None]:
    """Call look(layer, site, stream [batch, position, d_model]) at every site of every block as the model runs.

    Of several streams it is shown their mean, or with `every_row` each: [batch, position, row, d_model].
    """
    found = layout(handle)
    shapes: dict[int, torch.Size] = {}

    def shown(stream: Tensor) -> Tensor:
        if found.rows == 1:
            return stream
        stream = stream.movedim(0, 2) if found.rows_first else stream
        rows = stream.reshape(*stream.shape[:2], found.rows, handle.d_model)
        return rows if every_row else rows.mean(-2)

    with contextlib.ExitStack() as undo:
        for layer, block in enumerate(handle.blocks):

            def pre(_m: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                stream = first_tensor(args, kwargs)
                shapes[layer] = stream.shape
                look(layer, "pre", shown(stream))

            def post(_m: nn.Module, _args: Any, out: Any, layer: int = layer) -> None:
                look(layer, "post", shown(first_tensor((out,))))

            undo.callback(block.register_forward_pre_hook(pre, with_kwargs=True).remove)
            undo.callback(block.register_forward_hook(post).remove)
            reader = found.mid_readers[layer]
            if reader is not None:

                def mid(_m: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                    look(layer, "mid", shown(first_tensor(args, kwargs).reshape(shapes[layer])))  # OPT flattens it

                undo.callback(reader.register_forward_pre_hook(mid, with_kwargs=True).remove)
        yield
