"""The marks between which models write their reasoning, and what puts an end to it before it begins.

One table: tags of usual words in any brackets (<think>, <seed:think>, ◁think▷, [THINK], <|START_THINKING|>), whose
closing mark mirrors them, and pairs that don't. Settings add to it (`marks_of`), and so does looking at answers and
at the template (`looked_for`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

INVISIBLE = "\u00ad\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\ufe0e\ufe0f\ufeff"
_WORDS = "think|thinking|thoughts?|reason|reasoning|analysis|reflection|scratchpad|cot"
_INSIDE = rf"(?:[\w.▁-]+[:_▁])?(?:{_WORDS})(?:[:_▁][\w.▁-]+)?"
_NOT_END = r"(?![^>▷\s]*(?<![a-zA-Z])(?i:end)(?![a-zA-Z]))"
_USUAL = re.compile(
    rf"(?:<[|｜]?|◁){_NOT_END}(?i:{_INSIDE})(?:[|｜]?>|▷)|\[(?:[A-Z]+_)?(?:{_WORDS.upper()})(?:_[A-Z]+)?\]"
)
_TAG = re.compile(r"<[^<>\s]{2,40}>|\[[A-Z_]{3,30}\]|◁[^◁▷\s]{2,30}▷")
_USUAL_END = re.compile(
    rf"</(?i:{_INSIDE})>|\[/(?:{_WORDS.upper()})\]|◁/(?i:{_INSIDE})▷|<[|｜](?=[^>\s]*(?i:end))(?i:\w*[_▁](?:{_WORDS}))[|｜]>"
)
_MESSAGE = "<|message|>"  # gpt-oss writes it behind the mark of a channel


class Marks(NamedTuple):
    """What reasoning stands between.

    Attributes:
        opening, closing: the texts.
        between: of an empty block: what a template writes between them.
        after: and behind it.
    """

    opening: str
    closing: str
    between: str = "\n\n"
    after: str = "\n\n"

    @property
    def closed(self) -> str:
        """An empty block, which a model takes for the end of its reasoning."""
        return f"{self.opening}{self.between}{self.closing}{self.after}"

    @property
    def ends(self) -> re.Pattern[str]:
        """What closes a block: its mark in any case; tags of usual words close each other."""
        others = r"</(?:think|thinking|thought|reasoning)>|" if self.closing.startswith("</") else ""
        return re.compile(others + re.escape(self.closing), re.IGNORECASE)

    def rest(self, prompt: str) -> str:
        """What a prompt that ends with the opening lacks of an empty block."""
        tail = prompt[prompt.rindex(self.opening) :]
        return self.closed[len(tail) :] if self.closed.startswith(tail) else f"{self.closing}{self.after}"


_PAIRS = (
    Marks("<|inner_prefix|>", "<|inner_suffix|>", "", ""),
    Marks("<|channel>thought", "<channel|>", "\n", ""),
    Marks("<unused94>thought", "<unused95>", "\n", ""),
    Marks("<|channel|>analysis", "<|channel|>final<|message|>", "<|message|><|end|><|start|>assistant", ""),
)


class Block(NamedTuple):
    """A block of reasoning that begins: its marks, and where its text does."""

    marks: Marks
    start: int


def mirrored(opening: str) -> Marks:
    """A tag with the one that closes it: <x> and </x>, <|begin_of_x|> and <|end_of_x|>."""

    def end(found: re.Match[str]) -> str:
        return "END" if found[0].isupper() else "end"

    closing = re.sub(r"(?i)(?<![a-z])(?:begin|start)(?![a-z])", end, opening)
    if closing == opening:
        at = 2 if opening[1] in "|｜" else 1
        closing = f"{opening[:at]}/{opening[at:]}"
    return Marks(opening, closing, "", "") if opening.isupper() else Marks(opening, closing)


def block_at(text: str, start: int = 0, more: Sequence[Marks] = ()) -> Block | None:
    """The block of reasoning that begins at a place of a text, white space left out; None where none does.

    Args:
        text: an answer, its special tokens kept where marks are such.
        start: the place.
        more: marks beside the table's.
    """
    start = len(text) - len(text[start:].lstrip(f" \t\r\n\f\v{INVISIBLE}"))
    for marks in (*more, *_PAIRS):
        if text.startswith(marks.opening, start):
            end = start + len(marks.opening)
            return Block(marks, end + len(_MESSAGE) * text.startswith(_MESSAGE, end))
    usual = _USUAL.match(text, start)
    return Block(mirrored(usual[0]), usual.end()) if usual else None


def open_at_end(text: str, more: Sequence[Marks] = ()) -> Marks | None:
    """The marks of the block that a prompt ends by opening."""
    end = text.rstrip()[-80:]
    blocks = (block_at(end, place, more) for place in range(len(end)) if not end[place].isspace())
    return next((block.marks for block in blocks if block and block.start == len(end)), None)


def closed_at_end(text: str) -> bool:
    """Whether a prompt ends by closing a block of reasoning."""
    end = text.rstrip()[-80:]
    return any(m.end() == len(end) for ends in (_USUAL_END, *(p.ends for p in _PAIRS)) for m in ends.finditer(end))


def after_reasoning(text: str) -> str:
    """What a reply says after its last block of reasoning, wherever blocks stand in it, and before one left open."""
    ends = [m.end() for m in _USUAL_END.finditer(text)] + [m.end() for p in _PAIRS for m in p.ends.finditer(text)]
    said = text[max(ends, default=0) :]
    opened = [m.start() for m in _USUAL.finditer(said)] + [said.find(p.opening) for p in _PAIRS if p.opening in said]
    return said[: min(opened, default=None)].strip()


def find_prefill(answers: Sequence[str], prompts: Sequence[str], more: Sequence[Marks] = ()) -> str | None:
    """What to put before answers so that a reasoning model answers at once.

    Args:
        answers: openings of answers, special tokens kept.
        prompts: the formatted prompts they answer.
        more: marks beside the table's.

    Returns:
        The prefill when every prompt ends with, or every answer opens with, one reasoning mark; else None.
    """
    ends = [open_at_end(prompt, more) for prompt in prompts]
    if ends and ends[0] and all(marks == ends[0] for marks in ends):
        return ends[0].rest(prompts[0])
    blocks = [block_at(answer, 0, more) for answer in answers]
    if blocks and blocks[0] and all(block and block.marks == blocks[0].marks for block in blocks):
        return blocks[0].marks.closed
    return None


def marks_of(text: str | None) -> tuple[Marks, ...]:
    """The marks that the setting `load.reasoning_marks` names: a line each, what opens and what closes."""
    return tuple(Marks(*line.split()[:2]) for line in (text or "").splitlines() if line.strip())


def common_opening(answers: Sequence[str]) -> str:
    """The words that all of several answers open with."""
    words = [answer.split() for answer in answers]
    shared = 0
    while len(words) > 1 and shared < min(map(len, words)) and len({tuple(w[: shared + 1]) for w in words}) == 1:
        shared += 1
    return " ".join(words[0][:shared]) if words else ""


def opening_tag(answers: Sequence[str]) -> str | None:
    """The tag, such as <ponder>, that all answers open with."""
    found = [_TAG.match(answer.lstrip()) for answer in answers]
    tags = {match[0] if match else None for match in found}
    return tags.pop() if len(tags) == 1 else None


def looked_for(opening: str, answers: Sequence[str], template: str) -> Marks | None:
    """The marks of a tag that all answers open with, where the template or the answers show what closes it.

    Args:
        opening: from `opening_tag`.
        answers: as long as they are there, special tokens kept.
        template: the chat template, which splits earlier answers where their reasoning ends.

    Returns:
        None where nothing does, or nothing is said after it: then the tags stand around the answer itself.
    """
    guess = mirrored(opening)
    split = {tag for tag in re.findall(r"split\(\s*['\"]([^'\"]+)['\"]", template) if _TAG.fullmatch(tag)}
    if guess.closing in split:
        return guess
    own = [tag for tag in split - {opening} if "/" not in tag]  # </x> closes another tag than this
    if len(own) == 1:
        return guess._replace(closing=own[0])
    tags = [set(_TAG.findall(answer.lstrip()[len(opening) :])) - {opening} for answer in answers]
    seen = [tag for tag in set().union(*tags) if 2 * sum(tag in of_one for of_one in tags) >= len(tags)]
    for closing in sorted(seen, key=lambda tag: (tag != guess.closing, tag)):
        said = [_TAG.sub("", answer.split(closing, 1)[1]).strip() for answer in answers if closing in answer]
        if all(said):
            return guess._replace(closing=closing)
    return None
