"""The handle that every stage passes around: a loaded model and how its prompts are formatted."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.common.errors import AbliterateError, ModelError, NonFiniteError, WriterError
from abliterate.edit.recipe import config_hash
from abliterate.models.cache import run_cached
from abliterate.models.placement import device_of
from abliterate.models.pretrained import text_config
from abliterate.prompts.chat import THINKING_ON, Message, check_context, format_conversation, format_prompts
from abliterate.prompts.reasoning import Marks

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from abliterate.edit.edit import Edit

Found = TypeVar("Found")


@dataclass
class Handle:
    """A loaded model with its tokenizer and the way its prompts are formatted.

    Attributes:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer, padding on the left and with a pad token.
        source: the Hub id, folder or GGUF file it came from.
        revision: the pinned Hub revision, if any.
        system_prompt, chat_template, prefill: how a prompt becomes a conversation; see `chat.format_prompts`.
        source_dtype: the dtype most of the weights have on disk, where known.
        thinks: answers are decoded with the reasoning before them; see `reasoning_open`.
        marks: of reasoning, beside those that are known; answers are read without what stands between them.
        switches: names and values that the chat template is given, such as enable_thinking.
        quantised: how its weights are packed in memory ("4bit", "8bit", or another method's name); such a model can
            be measured but not baked.
        at_stream: an edit is one of the stream itself, at every site, in the place of what writes to it.
        notes: what loading found that people should know.
        folder: the folder, snapshot or converted GGUF that its weights were read from; None of one made in memory.
        before: turns of a conversation that prompts are asked behind (`behind`).
        workers: where stages send their rows (`replicas`); None where this model runs them all.
        edits: those attached to it, as they were attached.
    """

    model: Any
    tokenizer: Any
    source: str
    revision: str | None = None
    system_prompt: str | None = None
    chat_template: str | None = None
    prefill: str | None = None
    source_dtype: torch.dtype | None = None
    quantised: str | None = None
    trust_remote_code: bool = False
    thinks: bool = False
    marks: tuple[Marks, ...] = ()
    switches: dict[str, Any] = field(default_factory=dict)
    at_stream: bool = False
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None
    before: Sequence[Message] = ()
    workers: Any = None
    edits: list[Edit] = field(default_factory=list)

    @functools.cached_property
    def decoder(self) -> nn.Module:
        """The module that holds the blocks: run it when no logits are wanted."""
        get_decoder = getattr(self.model, "get_decoder", None)
        found = get_decoder() if get_decoder else None
        modules = found.modules() if isinstance(found, nn.Module) and found is not self.model else ()
        if found is not None and any(isinstance(module, nn.ModuleList) for module in modules):
            return found  # ModernBERT's `decoder`, which transformers gives as well, is its head
        return self.model.base_model

    @functools.cached_property
    def blocks(self) -> nn.ModuleList:
        """The decoder's blocks: its longest list of modules that is in no other list, as lists of experts are.

        Raises:
            ModelError: when the model holds no list of modules.
        """
        every = [m for m in self.decoder.modules() if isinstance(m, nn.ModuleList)]
        inner = {id(m) for outer in every for m in outer.modules() if m is not outer}
        lists = [m for m in every if id(m) not in inner]
        if not lists:
            raise ModelError(f"{self.source}: no list of decoder blocks found in {type(self.model).__name__}")
        return max(lists, key=len)

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def embedding(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def vocabulary(self) -> int:
        """Number of rows of the token embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def d_model(self) -> int:
        width = getattr(text_config(self.model.config), "hidden_size", None)
        if not isinstance(width, int):
            raise ModelError(f"{self.source}: the config of {type(self.model).__name__} names no hidden_size")
        return width

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return device_of(self.embedding)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def tied(self) -> bool:
        """Whether the embedding and the head are one parameter."""
        head = self.model.get_output_embeddings()
        if head is None or not hasattr(head, "weight") or not hasattr(self.embedding, "weight"):
            return False
        if head.weight.is_meta or self.embedding.weight.is_meta:  # brought for each pass, each on its own
            return self.module_names[head] + ".weight" in getattr(self.model, "all_tied_weights_keys", {})
        return head.weight is self.embedding.weight

    @property
    def context_length(self) -> int | None:
        most = getattr(text_config(self.model.config), "max_position_embeddings", None)
        return most if isinstance(most, int) and most > 0 else None  # XLNet says -1

    @functools.cached_property
    def module_names(self) -> dict[nn.Module, str]:
        return {module: name for name, module in self.model.named_modules()}

    @functools.cached_property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end an answer."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list | tuple) else [configured]
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id) if i is not None)

    @property
    def config_hash(self) -> str:
        """Sha256 of the fields of config.json that say what shape the model has."""
        return config_hash(self.model.config.to_dict())

    @property
    def template_switches(self) -> dict[str, Any]:
        """What the chat template is given: its switch for reasoning is on while the handle thinks."""
        return dict(THINKING_ON) if self.thinks else self.switches

    def prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as the user's turn, up to where the answer begins.

        Raises:
            PromptError: when a prompt is longer than the model's context.
            ModelError: when there is no chat template, or a token has no row in the embedding.
        """
        ids = format_prompts(
            self.tokenizer,
            list(texts),
            system_prompt=self.system_prompt,
            chat_template=self.chat_template,
            prefill=self.prefill,
            switches=self.template_switches,
            before=self.before,
        )
        self.check_known(ids)
        if self.context_length:
            check_context(ids, self.context_length, texts)
        return ids

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation of several turns, up to where the next answer begins.

        Raises:
            ModelError: as `prompt_ids`.
        """
        ids = format_conversation(
            self.tokenizer, messages, chat_template=self.chat_template, prefill=self.prefill,
            switches=self.template_switches,
        )  # fmt: skip
        self.check_known([ids])
        return ids

    def check_width(self, width: int, whose: str, error: type[AbliterateError] = WriterError) -> None:
        """Raise an error when vectors are of another width than the stream; `whose` says what they are."""
        if width != self.d_model:
            raise error(
                f"{whose} have {width} entries, {self.source} has d_model {self.d_model}; is it for another model?"
            )

    def check_known(self, rows: Sequence[Sequence[int]]) -> None:
        """Raise ModelError when the tokenizer gives a token that the embedding has no row for."""
        largest = max((max(row, default=0) for row in rows), default=0)
        if largest >= self.vocabulary:
            raise ModelError(
                f"model {self.source}: the tokenizer gives {self.tokenizer.convert_ids_to_tokens(largest)!r} the id "
                f"{largest}, and the embedding has {self.vocabulary} rows; take the tokenizer's files from where the "
                "weights are from, or a chat template without that token (--chat-template)"
            )

    def hidden_states(self, **inputs: Any) -> Any:
        """Run the blocks alone: what the model does, less the logits. A cache goes in as `cache`."""
        return self.hidden_states_and_cache(**inputs)[0]

    def hidden_states_and_cache(self, **inputs: Any) -> tuple[Any, Any]:
        """The same with the cache it leaves, None without `use_cache`; see `cache.run_cached`."""
        return run_cached(self.decoder, inputs)

    def last_logits(self, keep: int = 1, **inputs: Any) -> tuple[Float[Tensor, "batch keep vocab"], Any]:
        """Logits at the last `keep` positions only, and the cache, None without `use_cache`."""
        if self._plain_head:
            output, cache = self.hidden_states_and_cache(**inputs)
            head = self.model.get_output_embeddings()
            # contiguous: from a slice, the matrix product would copy the whole head
            states = output.last_hidden_state[:, -keep:].contiguous()
            return head(states.to(device_of(head))), cache
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            inputs["logits_to_keep"] = keep
        output, cache = run_cached(self.model, inputs)
        return output.logits[:, -keep:], cache

    def logits(self, states: Float[Tensor, "position d_model"]) -> Float[Tensor, "position vocab"]:
        """What the model's head makes of the decoder's last states, its scale and soft cap included."""
        head = self.model.get_output_embeddings()
        if self._plain_head:
            return head(states.to(device_of(head)))
        from transformers.modeling_outputs import BaseModelOutputWithPast

        forward = self.decoder.forward
        ids = torch.zeros(1, len(states), dtype=torch.long, device=self.device)
        try:  # the model's own path from states to logits, whatever it does there
            self.decoder.forward = lambda *_a, **_k: BaseModelOutputWithPast(last_hidden_state=states[None])  # type: ignore[method-assign]
            return self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            self.decoder.forward = forward  # type: ignore[method-assign]

    @functools.cached_property
    def _plain_head(self) -> bool:
        """Whether logits are the head applied to the last states and nothing else; tried on a few tokens.

        Bit for bit: a soft cap, as in Gemma 2, is within a per cent of nothing where logits are small.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            return False
        with torch.inference_mode():
            ids = torch.arange(8, device=self.device)[None]
            states = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            ours = head(states.to(device_of(head)))
            theirs = self.model(input_ids=ids, use_cache=False).logits
        return torch.equal(ours.float().to(theirs.device), theirs.float())

    if TYPE_CHECKING:  # what needs rooms above this one: `abliterate.api` has them

        def attached(self, edit: Edit) -> AbstractContextManager[Handle]: ...
        def bake(self, edit: Edit, *, keep_tied: bool = False) -> None: ...


def once(look: Callable[[Handle], Found]) -> Callable[[Handle], Found]:
    """What is found out about a handle is kept with it, under the function's name, and not looked for again."""
    name = f"_{look.__name__.lstrip('_')}"

    @functools.wraps(look)
    def found(handle: Handle) -> Found:
        if name not in handle.__dict__:
            handle.__dict__[name] = look(handle)
        known: Found = handle.__dict__[name]
        return known

    return found


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading token ids that all sequences share."""
    shortest, longest = min(map(list, sequences)), max(map(list, sequences))
    for index, (left, right) in enumerate(zip(shortest, longest, strict=False)):
        if left != right:
            return index
    return min(len(shortest), len(longest))


@contextmanager
def reasoning_open(handle: Handle, wanted: bool = True) -> Iterator[None]:
    """While this lasts answers reason first, if the model does: no prefill closes it, a template's switch is on.

    What is decoded then is taken apart: an answer's text is what follows the reasoning.
    """
    before = handle.prefill, handle.thinks
    if wanted:
        handle.prefill, handle.thinks = None, True
    try:
        yield
    finally:
        handle.prefill, handle.thinks = before


@contextmanager
def behind(handle: Handle, turns: Sequence[Message]) -> Iterator[None]:
    """While this lasts prompts are asked behind these turns of a conversation."""
    was, handle.before = handle.before, turns
    try:
        yield
    finally:
        handle.before = was


def check_finite(activations: Tensor, what: str) -> None:
    """Raise NonFiniteError when a tensor [layer, ...] is not finite, naming the first bad layer."""
    if not bool(torch.isfinite(activations).all()):
        bad = (~torch.isfinite(activations)).flatten(1).any(1).nonzero()[0].item()
        raise NonFiniteError(f"{what}: activation at layer {bad} is NaN or infinite; try --dtype float32")
