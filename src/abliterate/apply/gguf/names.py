"""Which tensors of a GGUF a recipe's writers are.

Names are translated by the `gguf` package's own map, the one llama.cpp's converter uses. In a GGUF a linear layer is
[out, in] whatever the checkpoint has, so d_model runs down the columns of a weight that writes to the stream, along
the rows of an embedding, and experts are stacked in front. llama.cpp permutes rows of query and key weights of some
models for its rotary embedding; what writes to the stream it leaves in the checkpoint's order. The gain of a norm is
in a GGUF what it multiplies by: the converter has added the 1 of Gemma's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gguf import get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS

from abliterate.common.errors import ModelError, RecipeError, WriterError
from abliterate.edit.algebra import Factors, factors
from abliterate.edit.stored_tensor import StoredTensor
from abliterate.models.gguf.file import GgufFile, GgufTensor
from abliterate.models.gguf.types import unpack

if TYPE_CHECKING:
    from abliterate.edit.recipe import Recipe

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
# Looked up, not multiplied: d_model runs along the rows.
_TABLES = (EMBEDDING, "position_embd.weight", "token_types.weight")
_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<rest>.+)$")
_CLASS_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "LMHead", "Model")


class Place(NamedTuple):
    """Where a tensor of a checkpoint is in a GGUF: the tensor's name, and which of its stacked experts."""

    name: str
    expert: int | None = None


class Target(NamedTuple):
    """A matrix or vector of a GGUF and what is taken out of it.

    Attributes:
        writer: the recipe's name for it.
        tensor: the tensor of the file.
        experts: which of the matrices stacked in it; None where it is one.
        bias: whether it is a bias: d_model runs along its last dimension.
        axis: of one matrix, 0 where d_model runs down the columns, 1 where along the rows.
        change: what is taken out of it, with d_model first.
    """

    writer: str
    tensor: GgufTensor
    experts: tuple[int, ...] | None
    bias: bool
    axis: int
    change: Factors


class Names:
    """Translates a checkpoint's tensor names into those of one architecture's GGUF.

    Raises:
        ModelError: when the `gguf` package doesn't know the architecture.
    """

    def __init__(self, architecture: str, blocks: int) -> None:
        known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        if architecture not in known:
            raise ModelError(
                f"the gguf package doesn't know the architecture {architecture!r}; a newer one may: pip install -U gguf"
            )
        self.architecture = architecture
        self._map = get_tensor_name_map(known[architecture], blocks)
        self.untied_head = MODEL_TENSOR.OUTPUT in MODEL_TENSORS[known[architecture]]

    def place(self, name: str) -> Place | None:
        """Where the tensor of a checkpoint is in a GGUF, or None when llama.cpp has no name for it."""
        expert = None
        match = _EXPERT.match(name)
        found = self._found(name)
        if found is None and match:
            expert = int(match["index"])
            found = self._found(f"{match['experts']}.{match['rest']}")
        return Place(found, expert) if found else None

    def _found(self, name: str) -> str | None:
        """A name in the map, with the wrappings that multimodal models put around it taken off."""
        stem, suffix = name, ".weight"  # fused experts have no ending
        for ending, meant in ((".weight", ".weight"), (".bias", ".bias"), ("_bias", ".bias")):
            if name.endswith(ending):
                stem, suffix = name.removesuffix(ending), meant
                break
        bare = stem.replace("language_model.", "")
        shorter = bare.removeprefix("model.").removeprefix("transformer.")
        for candidate in (stem, bare, shorter, f"model.{bare}", f"transformer.{bare}"):
            found = self._map.get_name(candidate)
            if found:
                return str(found) + suffix
        return None


def targets(recipe: Recipe, file: GgufFile, *, force: bool = False) -> list[Target]:
    """What a recipe's edit takes out of which tensors of a GGUF, writer by writer.

    Args:
        recipe: its `tensors` say what biases and post-norms the writers have; without them the file says it.
        file: the GGUF.
        force: don't compare the architectures' names.

    Raises:
        RecipeError: when the recipe is for a model of another width, number of blocks or architecture.
        WriterError: when a writer isn't in the file, or is there in another shape; names it.
    """
    check_model(recipe, file, force=force)
    names = Names(file.architecture, file.number("block_count") or 0)
    found = []
    for writer, part in recipe.edit.parts.items():
        stored = recipe.tensors.get(writer) or tuple(_guessed(writer, names, file))
        for tensors in _stacks(stored, names):
            found.append(_target(writer, part, tensors, names, file, recipe))
    return found


def by_tensor(found: Iterable[Target]) -> dict[str, list[Target]]:
    """Targets by the names of their tensors: a weight and experts of it may be several."""
    jobs: dict[str, list[Target]] = {}
    for target in found:
        jobs.setdefault(target.tensor.name, []).append(target)
    return jobs


def check_model(recipe: Recipe, file: GgufFile, *, force: bool = False) -> None:
    """Raise RecipeError when the recipe is for a model of another width, number of blocks or architecture."""
    about = recipe.model
    for key, said, what in (
        ("embedding_length", recipe.edit.d_model, "d_model"), ("block_count", about.get("layers"), "blocks"),
    ):  # fmt: skip
        here = file.number(key)
        if here is None:
            raise ModelError(f"GGUF {file.path} doesn't say its {file.architecture}.{key}; is it a language model?")
        # multi-token prediction adds blocks behind the last
        if said and here - (file.ahead if what == "blocks" else 0) != said:
            raise RecipeError(
                f"the recipe is for a model of {said} {what}, GGUF {file.path} has {here}; is it for another model?"
            )
    kind = str(about.get("class") or "")
    if not force and kind and not _may_be(kind, file.architecture):
        raise RecipeError(
            f"the recipe is for a {kind}, GGUF {file.path} is of architecture {file.architecture}; "
            "give the model it was made for, or --force to apply it all the same"
        )


def _may_be(kind: str, architecture: str) -> bool:
    """Whether a class of transformers may be converted to an architecture: it may unless llama.cpp has another one
    of the class's own name (Mistral has none and is a llama there)."""
    for ending in _CLASS_ENDINGS:
        kind = kind.removesuffix(ending)
    bare = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in MODEL_ARCH_NAMES.values()}
    own = bare.get(re.sub(r"[^a-z0-9]", "", kind.lower()))
    return own is None or own == architecture


def _guessed(writer: str, names: Names, file: GgufFile) -> Iterator[StoredTensor]:
    """The tensors of a writer of a recipe that doesn't list them: the weight, and its bias if the file has one.

    Raises:
        WriterError: when the block has a norm that may stand between the weight and the stream.
    """
    yield StoredTensor(writer, (1,), 0)
    place = names.place(writer)
    if place is None:
        return
    block = place.name.rpartition(".")[0].rpartition(".")[0]
    norms = [f"{block}.{norm}.weight" for norm in ("post_attention_norm", "post_ffw_norm")]
    if block.startswith("blk.") and any(norm in file.tensors for norm in norms):
        raise WriterError(
            f"{file.path} has norms behind its blocks' outputs, and the recipe doesn't say which writers they follow; "
            "make it again with this version"
        )
    bias = place.name.removesuffix(".weight") + ".bias"
    if place.name.endswith(".weight") and bias in file.tensors:
        yield StoredTensor(writer.removesuffix(".weight") + ".bias", (1,), 0, bias=True)


def _stacks(stored: tuple[StoredTensor, ...], names: Names) -> list[list[StoredTensor]]:
    """Those of a writer's tensors that one GGUF tensor holds, together."""
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in stored:
        place = names.place(tensor.name)
        groups.setdefault(place.name if place else tensor.name, []).append(tensor)
    return list(groups.values())


def _target(writer: str, part: Any, stored: list[StoredTensor], names: Names, file: GgufFile, recipe: Recipe) -> Target:
    first = stored[0]
    tensor = _tensor(first.name, names, file, f"writer {writer}")
    bias, d_model = first.bias or tensor.name.endswith(".bias"), recipe.edit.d_model
    axis = 1 if tensor.name in _TABLES else 0
    along_last = bias or axis == 1 or len(tensor.shape) == 1
    if (tensor.shape[-1] if along_last else tensor.shape[-2]) != d_model:
        raise WriterError(
            f"GGUF {file.path}: {tensor.name} (writer {writer}) has shape {list(tensor.shape)}, which doesn't run "
            f"along d_model {d_model} where it should; nothing was changed"
        )
    places = [names.place(t.name) for t in stored]
    listed = tuple(p.expert for p in places if p is not None and p.expert is not None)
    stacked = len(tensor.shape) > (1 if along_last and axis == 0 else 2)
    experts = (listed or tuple(range(tensor.shape[0]))) if stacked else None
    if experts and max(experts) >= tensor.shape[0]:
        raise WriterError(f"GGUF {file.path}: {tensor.name} has {tensor.shape[0]} experts, the recipe more ({writer})")
    return Target(writer, tensor, experts, along_last and axis == 0, axis, _change(part, first, names, file, writer))


def _change(part: Any, stored: StoredTensor, names: Names, file: GgufFile, writer: str) -> Factors:
    gain = None
    if stored.gain is not None:
        gain = np.ones(part.directions.shape[-1:])
        for name, _ in stored.gain.norms:  # a GGUF's norms hold 1 + weight where that is the gain
            norm = _tensor(name, names, file, f"the norm behind writer {writer}")
            one = unpack(np.array(file.raw(norm)), norm.kind)
            if one.shape != gain.shape:
                raise WriterError(
                    f"GGUF {file.path}: norm {norm.name} has shape {list(norm.shape)}; nothing was changed"
                )
            gain = gain * one
    return factors(part, gain, stored.gain.centred if stored.gain else False)


def _tensor(name: str, names: Names, file: GgufFile, what: str) -> GgufTensor:
    place = names.place(name)
    if place is None:
        raise WriterError(
            f"GGUF {file.path}: {what} ({name}) has no name in llama.cpp's architecture {file.architecture}; "
            "nothing was changed"
        )
    if place.name not in file.tensors:
        raise WriterError(f"GGUF {file.path} has no tensor {place.name} ({what}, {name}); is it for another model?")
    return file.tensors[place.name]
