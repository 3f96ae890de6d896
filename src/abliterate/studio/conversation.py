"""A conversation with a model, its edit attached live: answers streamed by token, the strength changed at will."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from abliterate.apply.hooks import Attachment
from abliterate.common.errors import AbliterateError
from abliterate.common.files import write_text
from abliterate.edit.edit import Edit
from abliterate.models.handle import Handle, common_prefix
from abliterate.prompts.chat import Message, check_context

Emit = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken: the likeliest at temperature 0, else drawn with a seed."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Conversation:
    """Turns between a user and a model.

    Attributes:
        handle: the loaded model.
        edit: attached to it while it answers; None for the model as it is.
        strength: the edit is scaled by it; 0 is the original.
        messages: the turns so far, {"role", "content"}.
    """

    handle: Handle
    edit: Edit | None = None
    strength: float = 1.0
    sampling: Sampling = field(default_factory=Sampling)
    messages: list[Message] = field(default_factory=list)
    _past: _Past | None = field(default=None, repr=False)

    def reply(self, text: str, emit: Emit | None = None) -> str:
        """Answer the user's next turn; both turns are remembered, also when the answer is interrupted.

        Args:
            text: the user's turn.
            emit: called with each new piece of the answer.

        Raises:
            AbliterateError: when the conversation is longer than the model's context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        said: list[str] = []
        try:
            for piece in self.stream(messages):
                said.append(piece)
                if emit:
                    emit(piece)
        finally:
            if said:
                self.messages = [*messages, {"role": "assistant", "content": "".join(said).strip()}]
        return "".join(said)

    def compare(self, text: str, emit: Callable[[str, str], None] | None = None) -> tuple[str, str]:
        """The original's and the edited model's answer to one more turn, which is not remembered.

        Args:
            text: the user's turn.
            emit: called with "original" or "edited" and each new piece.
        """
        answers = []
        for name, strength in (("original", 0.0), ("edited", self.strength)):
            pieces = []
            for piece in self.stream([*self.messages, {"role": "user", "content": text}], strength):
                pieces.append(piece)
                if emit:
                    emit(name, piece)
            answers.append("".join(pieces))
        return answers[0], answers[1]

    def stream(self, messages: list[Message], strength: float | None = None) -> Iterator[str]:
        """Pieces of the answer to these messages, at this strength of the edit; whole characters only.

        What was read before at the same strength isn't read again.
        """
        strength = self.strength if strength is None else strength
        handle = self.handle
        ids = handle.conversation_ids(messages)
        if handle.context_length:
            check_context([ids], handle.context_length)
        past = self._past if self._past is not None and self._past.strength == strength else _Past(strength)
        room = (handle.context_length or len(ids) + self.sampling.max_new_tokens) - len(ids)
        tokens: list[int] = []
        shown = ""
        with contextlib.closing(self._tokens(ids, past, strength, room)) as drawn:
            for token in drawn:
                tokens.append(token)
                text = handle.tokenizer.decode(tokens, skip_special_tokens=True)
                if text.endswith("�"):
                    continue  # half of a character still to come
                if len(text) > len(shown):
                    yield text[len(shown) :]
                    shown = text

    def _tokens(self, ids: list[int], past: _Past, strength: float, room: int) -> Generator[int]:
        generator = torch.Generator().manual_seed(self.sampling.seed)
        self._past = None  # what a token's exception leaves behind is not to be built on
        new = past.cut(ids)
        # Made ready once, in force for each token alone: others may ask the same model in between.
        edited = Attachment(self.handle, self.edit * strength) if self.edit and strength else nullcontext()
        for _ in range(max(1, min(self.sampling.max_new_tokens, room))):
            with edited, torch.inference_mode():
                inputs = torch.tensor([new], device=self.handle.device)
                logits, cache = self.handle.last_logits(input_ids=inputs, cache=past.cache, use_cache=True)
            token = _drawn(logits[0, -1], self.sampling, generator)
            past.cache, past.ids = cache, [*past.ids, *new]
            self._past = past
            if token in self.handle.end_tokens:
                return
            new = [token]
            yield token

    def save(self, path: str | Path) -> None:
        """Write the turns to a JSON file.

        Raises:
            AbliterateError: when it can't be written.
        """
        document = {"model": self.handle.source, "strength": self.strength if self.edit else None}
        write_text(path, json.dumps({**document, "messages": self.messages}, indent=2) + "\n")

    def system(self, text: str | None) -> None:
        """Start anew with a system prompt; None leaves the template's own."""
        self.messages = [] if not text else [{"role": "system", "content": text}]

    def check_strength(self, value: str) -> float:
        """A strength as typed.

        Raises:
            AbliterateError: when it isn't a number, or there is no edit to scale.
        """
        if self.edit is None:
            raise AbliterateError("there is no edit to scale; start with --recipe RECIPE")
        try:
            strength = float(value)
        except ValueError:
            raise AbliterateError(f"strength {value!r} is not a number; 0 is the original, 1 the whole edit") from None
        if not -10 <= strength <= 10:
            raise AbliterateError(f"strength {strength:g} is out of range; 0 is the original, 1 the whole edit")
        return strength


@dataclass
class _Past:
    """What the model has read at one strength: token ids and the cache they left."""

    strength: float
    ids: list[int] = field(default_factory=list)
    cache: Any = None

    def cut(self, ids: list[int]) -> list[int]:
        """Keep what these ids share with the past; returns those still to be read, at least one."""
        shared = min(common_prefix([self.ids, ids]), len(ids) - 1) if self.ids else 0
        if shared < len(self.ids):
            try:
                self.cache.crop(shared)
            except (AttributeError, ValueError, RuntimeError, NotImplementedError):  # recurrent states can't go back
                self.cache, shared = None, 0
        self.ids = ids[:shared]
        return ids[shared:]


def _drawn(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The likeliest token, or one drawn from the smallest set of likely ones that holds top_p."""
    if sampling.temperature <= 0:
        return int(logits.argmax())
    probabilities = (logits.float().cpu() / sampling.temperature).softmax(-1)
    ordered, tokens = probabilities.sort(descending=True)
    ordered[ordered.cumsum(0) - ordered > sampling.top_p] = 0.0
    return int(tokens[torch.multinomial(ordered, 1, generator=generator)])
