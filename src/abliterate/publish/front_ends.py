"""A GGUF where people chat: a Modelfile for Ollama, and a place in LM Studio's folder.

The Modelfile has the chat template, the model's own sampling, and where answers stop. Ollama's templates are Go's, the
model's is Jinja's. What the one writes is found by rendering the other: a conversation of marks shows what stands
around each turn. A template that does more than that is told by comparing, and left out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from abliterate.common.errors import ModelError
from abliterate.common.files import whole_file
from abliterate.models.loading import load_tokenizer
from abliterate.prompts.chat import Message, render_conversation

# generation_config.json's name: Ollama's
_SAMPLING = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
PUBLISHER = "abliterate"
_MARKS = ("Qsystemq", "Quserq", "Qanswerq", "Qagainq")


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around turns.

    Attributes:
        system: before and after a system prompt; None where the template knows none.
        alone: what a conversation without a system prompt begins with.
        user: before a user's text.
        answer: between a user's text and the answer, of one that is over.
        over: after such an answer.
        next: between the last user's text and the answer to come.
    """

    system: tuple[str, str] | None
    alone: str
    user: str
    answer: str
    over: str
    next: str

    def render(self, messages: Sequence[Message]) -> str:
        """What Ollama makes of a conversation with the template below."""
        first, rest = messages[0], messages
        text = self.alone
        if first["role"] == "system":
            assert self.system is not None
            text, rest = first["content"].join(self.system), messages[1:]
        for message in rest:
            mine = message["role"] == "user"
            text += self.user + message["content"] if mine else self.answer + message["content"] + self.over
        return text + self.next

    def go(self) -> str:
        """The template in Ollama's language."""
        head = self.alone
        if self.system is not None:
            head = "{{ if .System }}" + "{{ .System }}".join(self.system) + "{{ else }}" + self.alone + "{{ end }}"
        return (
            head + '{{ range .Messages }}{{ if eq .Role "user" }}' + self.user + "{{ .Content }}"
            '{{ else if eq .Role "assistant" }}' + self.answer + "{{ .Content }}" + self.over
            + "{{ end }}{{ end }}" + self.next
        )  # fmt: skip


def turns_of(tokenizer: Any) -> Turns | None:
    """What a tokenizer's chat template writes around turns; None where that isn't all it does, or can't be told.

    The beginning-of-sequence token is left out where llama.cpp puts one by itself.
    """
    system, user, answer, again = _MARKS
    short = [{"role": "user", "content": user}]
    long = [*short, {"role": "assistant", "content": answer}, {"role": "user", "content": again}]
    first = {"role": "system", "content": system}
    bos = tokenizer.bos_token if list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id] else None

    def shown(messages: Sequence[Message]) -> str:
        return render_conversation(tokenizer, messages).removeprefix(bos or "")

    try:
        head, between, over, after = _parted(shown(long), (user, answer, again))
        try:
            before, behind = _parted(shown([first, *long]), (system, user))[:2]
        except ModelError:  # the template knows no system prompt
            before, behind = "", head
        # what is written before a user's text is what its places in a conversation have in common
        shared = zip(*(reversed(text) for text in (head, behind, over)), strict=False)
        cut = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, shared))
        known = None if not before and behind == head else (before, behind[: len(behind) - cut])
        turns = Turns(known, head[: len(head) - cut], head[len(head) - cut :], between, over[: len(over) - cut], after)
        several = [short, long, [*long, *long[1:]], *([[first, *short], [first, *long]] if known else [])]
        same = all(turns.render(messages) == shown(messages) for messages in several)
    except (ModelError, ValueError):
        return None
    return turns if same and "{{" not in str(turns) and '"""' not in turns.go() else None


def _parted(text: str, marks: Sequence[str]) -> list[str]:
    """What stands before, between and behind marks.

    Raises:
        ValueError: when one of them isn't there, once.
    """
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(mark)
        before, text = text.split(mark)
        parts.append(before)
    return [*parts, text]


def modelfile(folder: Path, gguf: str) -> tuple[str, list[str]]:
    """A Modelfile for a model's folder and the GGUF made of it.

    Args:
        folder: with the tokenizer and generation_config.json.
        gguf: the file as the Modelfile names it.

    Returns:
        Its text, and what people should know of it.

    Raises:
        ModelError: when the tokenizer can't be read.
    """
    tokenizer = load_tokenizer(str(folder), folder, trust_remote_code=False)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    lines, notes = [f"FROM {gguf}"], []
    turns = turns_of(tokenizer)
    if turns is None:
        notes.append("the chat template isn't one that Ollama's language can say; Ollama takes one it knows, or none")
    else:
        lines.append(f'TEMPLATE """{turns.go()}"""')
    for name, theirs in _SAMPLING.items():
        if isinstance(settings.get(name), int | float) and settings.get("do_sample", True):
            lines.append(f"PARAMETER {theirs} {settings[name]}")
    ends = settings.get("eos_token_id") or tokenizer.eos_token_id
    texts = tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends])
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in texts if text]
    return "\n".join(lines) + "\n", notes


def place_in_lmstudio(models: Path, name: str, gguf: Path) -> Path:
    """Where LM Studio finds a GGUF in its folder of models: publisher/model/file.gguf."""
    return models.expanduser() / PUBLISHER / name / gguf.name


def put(gguf: Path, place: Path) -> None:
    """The same file at another place: a hard link, or a copy where that is another disk."""
    with whole_file(place) as temporary:
        try:
            os.link(gguf, temporary)
        except OSError:
            shutil.copyfile(gguf, temporary)
