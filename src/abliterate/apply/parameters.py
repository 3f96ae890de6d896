"""A model's parameters as they would be in memory, one at a time from its files, without loading the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.apply.checkpoint.blocks import FLOATS
from abliterate.apply.checkpoint.folder import read_config
from abliterate.common.errors import ModelError, WriterError
from abliterate.edit.stored_tensor import StoredTensor
from abliterate.models.handle import Handle
from abliterate.models.packed import packed_in, unpacked_shapes
from abliterate.models.recipes import resolved
from abliterate.models.shards import open_checkpoint
from abliterate.models.stored import names_in, skeleton, stored_tensors
from abliterate.models.writers import Writer, layout


class Parameters:
    """A model's writers, and their values read from its folder when asked for.

    Attributes:
        handle: a skeleton, whose modules are true and whose values are not.
        writers: parameter name -> writer.
    """

    def __init__(self, folder: Path) -> None:
        self.handle: Handle = skeleton(folder)
        self.writers: dict[str, Writer] = {writer.name: writer for writer in layout(self.handle).writers}
        self._checkpoint = open_checkpoint(folder)
        self._packed = packed_in(self._checkpoint, read_config(folder))
        held = {name: place.shape for name, place in self._checkpoint.ranges.items()}
        self._sources = names_in(self.handle.model, unpacked_shapes(held, self._packed))
        self._stored = stored_tensors(self.handle, self._sources)

    def named(self, names: Sequence[str]) -> dict[str, Writer]:
        """The writer that each name means, as in memory.

        Raises:
            RecipeError: when one is no writer of this model.
        """
        owners: Mapping[str, str] = resolved(names, self._stored, self.handle.source)
        return {name: self.writers[owner] for name, owner in owners.items()}

    def value(self, writer: Writer) -> Tensor:
        """The writer's own parameter, in the dtype it has."""
        return self._whole([t for t in self._stored[writer.name] if not t.bias], writer.shape, writer.axis, writer.name)

    def bias(self, writer: Writer) -> Tensor | None:
        """Its bias, if it has one."""
        if writer.bias is None:
            return None
        shape = tuple(self.handle.model.get_parameter(writer.bias).shape)
        return self._whole([t for t in self._stored[writer.name] if t.bias], shape, writer.bias_axis, writer.bias)

    def gain(self, writer: Writer) -> Float[Tensor, " d_model"] | None:
        """What the norm behind it multiplies by, float32; None without one."""
        stored = self._stored[writer.name][0].gain
        if stored is None:
            return None
        return torch.stack([self._read(name).float() + plus for name, plus in stored.norms]).prod(0)

    def sibling(self, writer: Writer, name: str) -> Tensor:
        """Another parameter of the writer's module, by its name in it."""
        parameter = f"{writer.module}.{name}"
        found = self._sources.get(parameter, [])
        if len(found) != 1:
            raise WriterError(f"{self.handle.source}: {parameter} is not one tensor of the checkpoint")
        return self._read(found[0])

    def _whole(self, parts: Sequence[StoredTensor], shape: tuple[int, ...], axis: int, name: str) -> Tensor:
        """A parameter as in memory, from the one or several tensors it is stored as."""
        if len(parts) == 1 and len(parts[0].shape) == len(shape):
            tensor = _turned(self._read(parts[0].name), parts[0].axis, axis)
        elif len(parts) > 1 and len(shape) == len(parts[0].shape) + 1:
            tensor = torch.stack([_turned(self._read(part.name), part.axis, axis - 1) for part in parts])
        else:
            tensor = torch.empty(0)
        if tuple(tensor.shape) != shape:
            raise WriterError(
                f"{self.handle.source}: {name} {list(shape)} can't be made from what is stored "
                f"({parts[0].name} {list(parts[0].shape)})"
            )
        return tensor

    def _read(self, name: str) -> Tensor:
        if name in self._packed:
            packed = self._packed[name]
            return torch.from_numpy(packed.values(packed.raw(self._checkpoint)))
        place = self._checkpoint.tensor(name)
        if place.dtype not in FLOATS:
            raise ModelError(
                f"model folder {self._checkpoint.folder}: {name} is stored as {place.dtype}; "
                "an adapter is made from weights of 16 bits or more"
            )
        dtype: torch.dtype = getattr(torch, FLOATS[place.dtype].name)
        return torch.frombuffer(self._checkpoint.raw(name), dtype=dtype).view(place.shape)


def _turned(tensor: Tensor, axis: int, wanted: int) -> Tensor:
    """The tensor with its axis of size d_model where it is wanted; the other dimensions keep their order."""
    return tensor if axis == wanted else tensor.movedim(axis, wanted)
