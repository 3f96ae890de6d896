"""A tensor of a checkpoint that belongs to a writer, as a recipe names it. No torch, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.common.errors import shorten

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredGain:
    """The norm between a stored tensor and the stream: it multiplies by plus + its weight, [d_model].

    Attributes:
        name: the norm's weight in the checkpoint.
        plus: 1.0 where the gain is 1 + weight (Gemma), else 0.0.
        centred: whether the norm takes the mean off first (LayerNorm), so that what reaches the stream is
            gain * (x - mean(x)).
        times: (name, plus) of further norms behind it, whose gains multiply (Gemma 4's mixtures).
    """

    name: str
    plus: float = 0.0
    centred: bool = False
    times: tuple[tuple[str, float], ...] = ()

    @property
    def norms(self) -> tuple[tuple[str, float], ...]:
        """(name, plus) of every norm; the gain is the product of theirs."""
        return ((self.name, self.plus), *self.times)

    def to_json(self) -> dict[str, Any]:
        more = {"times": [{"name": name, "plus": plus} for name, plus in self.times]} if self.times else {}
        return {"name": self.name, "plus": self.plus, "centred": self.centred, **more}

    @classmethod
    def from_json(cls, entry: Any) -> StoredGain:
        """Read one back.

        Raises:
            ValueError: naming the field that is missing or of another type.
        """
        entry = dict(entry)
        times = entry.pop("times", [])
        if not isinstance(times, list):
            raise ValueError("'times' of a gain is a list")
        found = _fields(entry, {"name": str, "plus": (int, float), "centred": bool})
        norms = [found, *(_fields(one, {"name": str, "plus": (int, float)}) for one in times)]
        for norm in norms:
            if norm["plus"] not in (0.0, 1.0):
                raise ValueError(f"a gain has plus {norm['plus']}, which is 0 or 1")
        (name, plus), *further = [(norm["name"], float(norm["plus"])) for norm in norms]
        return cls(name, plus, found["centred"], tuple(further))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that belongs to a writer.

    Attributes:
        name: its name in the checkpoint.
        shape: its shape there.
        axis: the dimension that runs along d_model.
        bias: whether it is the writer's bias (or one expert's).
        gain: the norm behind it, if there is one.
    """

    name: str
    shape: Shape
    axis: int
    bias: bool = False
    gain: StoredGain | None = None

    def to_json(self) -> dict[str, Any]:
        gain = self.gain and self.gain.to_json()
        return {"name": self.name, "shape": list(self.shape), "axis": self.axis, "bias": self.bias, "gain": gain}

    @classmethod
    def from_json(cls, entry: Any) -> StoredTensor:
        """Read one back.

        Raises:
            ValueError: naming the field that is missing or of another type.
        """
        fields = _fields(entry, {"name": str, "shape": list, "axis": int, "bias": bool, "gain": (dict, type(None))})
        shape, axis, gain = fields["shape"], fields["axis"], fields["gain"]
        if not shape or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"the shape of {fields['name']} is not a list of positive integers")
        if not 0 <= axis < len(shape):
            raise ValueError(f"the axis of {fields['name']} is {axis}, its shape {shape}")
        stored = None if gain is None else StoredGain.from_json(gain)
        return cls(fields["name"], tuple(shape), axis, fields["bias"], stored)


def _fields(entry: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a JSON object that has exactly these, each of its type."""
    if not isinstance(entry, dict) or set(entry) != set(kinds):
        raise ValueError(f"a stored tensor is not an object with the keys {', '.join(kinds)}")
    for key, kind in kinds.items():
        value = entry[key]
        # bool is an int to Python, but not to JSON
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits or (key == "name" and not value.isprintable()):
            raise ValueError(f"'{key}' of a stored tensor is {shorten(repr(value), 40)}")
    return entry


def misfit(tensors: Mapping[str, Sequence[StoredTensor]], there: Mapping[str, Shape | None]) -> str:
    """The first tensor that a checkpoint lacks or has in another shape; empty when all fit.

    Args:
        tensors: writer -> its tensors, as a recipe has them.
        there: name -> shape of the checkpoint's; None where that isn't known.
    """
    for tensor in (t for entries in tensors.values() for t in entries):
        if tensor.name not in there:
            return f"it has no tensor {tensor.name}"
        if there[tensor.name] not in (None, tensor.shape):
            return f"its {tensor.name} is {list(there[tensor.name] or ())}, not {list(tensor.shape)}"
        lacking = [name for name, _ in (tensor.gain.norms if tensor.gain else ()) if name not in there]
        if lacking:
            return f"it has no tensor {lacking[0]}"
    return ""
