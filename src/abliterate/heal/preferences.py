"""Preference pairs: reading them from the Hub or a file, dropping what can't teach, splitting off a held-out part.

A row gives a prompt, an answer that is preferred (chosen) and one that isn't (rejected). Three forms are read, and
may be mixed:

- text: `prompt`, `chosen`, `rejected` are strings;
- messages: `prompt` is a list of {"role", "content"}, or text, and the answers are lists with one assistant message;
- conversations: `chosen` and `rejected` are whole conversations that differ in their last message, as in
  mlabonne/orpo-dpo-mix-40k; `prompt` isn't needed then, and isn't read.

pyarrow and datasets are imported only where they are needed.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.common.errors import PromptError, shorten
from abliterate.common.reporting import Reporter, Silent
from abliterate.prompts.chat import DATE_STRING
from abliterate.prompts.sources import Origin, read_tables
from abliterate.prompts.tables import Table, kind_of, listed
from abliterate.settings.heal import HealSettings

if TYPE_CHECKING:
    from abliterate.measure.judges import Judge
    from abliterate.models.handle import Handle

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")
JUDGED_AT_ONCE = 512


@dataclass(frozen=True)
class Pair:
    """A prompt with the answer that is preferred and the one that isn't.

    Attributes:
        prompt: the conversation up to the answer, the last message the user's.
        chosen, rejected: the answers' texts.
    """

    prompt: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str

    @property
    def messages(self) -> list[Message]:
        return [{"role": role, "content": content} for role, content in self.prompt]

    def after(self, system: str | None) -> list[Message]:
        """The messages behind a system prompt, unless they have one of their own."""
        messages = self.messages
        if system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": system}, *messages]

    @property
    def question(self) -> str:
        """The last thing the user says."""
        return next((content for role, content in reversed(self.prompt) if role == "user"), "")


@dataclass
class Preferences:
    """Pairs to train on and pairs to judge by, and how many of the source's were left out.

    Attributes:
        source: the data set's id or the file.
        train, held_out: pairs; no prompt is in both.
        counts: pairs read, and left out by reason; `cut` counts pairs of which an answer was shortened.
        sha256: of the pairs that are left, in order.
    """

    source: str
    train: list[Pair]
    held_out: list[Pair]
    counts: dict[str, int]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for pair in (*self.train, *self.held_out):
            digest.update(repr((pair.prompt, pair.chosen, pair.rejected)).encode())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source, "train": len(self.train), "held_out": len(self.held_out), **self.counts,
            "sha256": self.sha256,
        }  # fmt: skip


def load_preferences(
    heal: HealSettings,
    handle: Handle | None = None,
    *,
    seed: int = 0,
    judge: Judge | None = None,
    reporter: Reporter | None = None,
) -> Preferences:
    """Read, filter and split the pairs that the settings name.

    Args:
        heal: the data, its columns and what is left out.
        handle: whose tokenizer (with a chat template) and system prompt say how long a conversation is; None
            leaves lengths alone.
        seed: of the choice of held-out prompts.
        judge: decides which chosen answers refuse; the lexical judge by default.
        reporter: told what is left out.

    Raises:
        PromptError: the source can't be read, a row isn't a pair (the text names file, line and field), or too
            few pairs are left.
    """
    reporter = reporter or Silent()
    source = heal.data
    reporter.say(f"reading preference pairs from {source}")
    rows = read_pairs(heal)
    counts = {"read": len(rows), **Counter(row for row in rows if isinstance(row, str))}
    pairs = [row for row in rows if isinstance(row, Pair)]
    if not heal.keep_refusals:
        pairs = _without_refusals(pairs, judge, counts, reporter)
    if heal.most_pairs is not None:
        pairs = sorted(pairs, key=lambda pair: _digest(pair, seed))[: heal.most_pairs]
    if handle is not None:
        pairs = _fitting(pairs, handle, heal.max_length, counts, reporter)
    if len(pairs) < 2:
        raise PromptError(
            f"{source} gives {len(pairs)} usable preference pairs ({_left_out(counts)}); at least 2 are needed"
        )
    train, held_out = split(pairs, heal.held_out, heal.most_held_out, seed)
    found = Preferences(source, train, held_out, counts)
    reporter.say(
        f"{len(train)} pairs to train on, {len(held_out)} held out; of {counts['read']} read, {_left_out(counts)}"
    )
    return found


LEFT_OUT = {
    "refusing": "whose chosen answer refuses", "empty": "with an empty prompt or answer",
    "same": "whose answers are the same", "apart": "whose conversations differ before the answer",
    "too_long": "whose prompt alone is too long",
}  # fmt: skip


def _left_out(counts: Mapping[str, int]) -> str:
    parts = [f"{counts[key]} {words}" for key, words in LEFT_OUT.items() if counts.get(key)]
    text = f"left out {', '.join(parts)}" if parts else "none left out"
    cut = counts.get("cut", 0)
    return f"{text}; answers of {cut} cut" if cut else text


# --- Reading -------------------------------------------------------------------------------------


def read_pairs(heal: HealSettings) -> list[Pair | str]:
    """Every row of the source as a pair, or the reason (a key of `LEFT_OUT`) why it can't be one.

    Raises:
        PromptError: the source or a row can't be read; the text names file, line and field.
    """
    origin = _locate(heal.data, heal.data_split)
    table = _one_table(read_tables(origin), origin, heal.data_split)
    columns = [heal.prompt_column, heal.chosen_column, heal.rejected_column]
    for option, name in zip(("chosen", "rejected"), columns[1:], strict=True):
        if name not in table.columns:
            raise PromptError(
                f"{origin.label} has no column {name!r}{listed(filter(None, table.columns))}; "
                f"name one with --{option}-column"
            )
    prompts = table.columns.get(heal.prompt_column) or [None] * len(table.places)
    rows = zip(prompts, table.columns[columns[1]], table.columns[columns[2]], table.places, strict=True)
    return [_pair(row, columns, f"{origin.label}, {place}") for *row, place in rows]


def _locate(source: str, split: str | None) -> Origin:
    path = Path(source).expanduser()
    if path.exists():
        kind = "folder" if path.is_dir() else "file"
        return Origin(source, f"preference {kind} {source}", "baseline", path=path, split=split)
    if kind_of(path) is not None or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise PromptError(
            f"preference file {source} was not found (looked for {path.absolute()}); "
            "check the path, or give a Hub data set as id[:split]"
        )
    name, _, named = source.partition(":")
    if not name.strip():
        raise PromptError("the preference data has no name; give a file or a Hub data set with --data")
    return Origin(source, f"Hub data set {name}", "baseline", dataset=name, split=split or named or None)


def _one_table(tables: Mapping[str, Table], origin: Origin, split: str | None) -> Table:
    """The split asked for; else `train`, else the only one."""
    wanted = split if origin.dataset is None else None  # the Hub gave only the split asked for
    if wanted is not None:
        if wanted not in tables:
            raise PromptError(f"{origin.label} has no split {wanted!r}{listed(filter(None, tables))}")
        return tables[wanted]
    if "train" in tables:
        return tables["train"]
    if len(tables) != 1:
        raise PromptError(f"{origin.label} has no split 'train'{listed(tables)}; name one with --data-split")
    return next(iter(tables.values()))


def _pair(row: Sequence[object], columns: Sequence[str], where: str) -> Pair | str:
    prompt, chosen, rejected = row
    answers, contexts = [], []
    for name, value in zip(columns[1:], (chosen, rejected), strict=True):
        context, answer = _answer(value, f"{where}, field '{name}'")
        contexts.append(context)
        answers.append(answer)
    if contexts[0] or contexts[1]:
        if contexts[0] != contexts[1]:
            return "apart"
        messages = contexts[0]
    else:
        messages = _prompt(prompt, f"{where}, field '{columns[0]}'")
    pair = Pair(tuple((m["role"], m["content"]) for m in messages), answers[0].strip(), answers[1].strip())
    if not pair.question.strip() or not pair.chosen or not pair.rejected:
        return "empty"
    return "same" if pair.chosen == pair.rejected else pair


def _answer(value: object, where: str) -> tuple[list[Message], str]:
    """An answer's text, and the conversation before it where that is given with it."""
    if isinstance(value, str):
        return [], value
    messages = _ending(value, where, "assistant", "an answer")
    return messages[:-1], messages[-1]["content"]


def _prompt(value: object, where: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if value is None:
        raise PromptError(f"{where} is missing; it is needed unless the answers are whole conversations")
    return _ending(value, where, "user", "a prompt")


def _ending(value: object, where: str, role: str, what: str) -> list[Message]:
    """Messages of which the last is this role's."""
    messages = _messages(value, where)
    if not messages or messages[-1]["role"] != role:
        last = f"its last message is the {messages[-1]['role']}'s" if messages else "it is empty"
        raise PromptError(f"{where}: {last}; {what} ends with a message of the {role}")
    return messages


def _messages(value: object, where: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise PromptError(
            f"{where} is {shorten(repr(value), 60)}; it must be a text or a list of messages with 'role' and 'content'"
        )
    messages = []
    for number, message in enumerate(value, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if not isinstance(content, str) or role not in ROLES:
            raise PromptError(
                f"{where}, message {number} is {shorten(repr(message), 60)}; "
                f"it must have a 'role' ({', '.join(ROLES)}) and a 'content' of text"
            )
        messages.append({"role": str(role), "content": content})
    return messages


# --- Choosing ------------------------------------------------------------------------------------


def _without_refusals(
    pairs: list[Pair], judge: Judge | None, counts: dict[str, int], reporter: Reporter
) -> list[Pair]:  # fmt: skip
    """The pairs whose chosen answer doesn't refuse: the edit took refusing out, and they would teach it again."""
    from abliterate.measure.judges import LexicalJudge

    judge = judge or LexicalJudge()
    tick = reporter.progress("judging chosen answers", len(pairs))
    kept: list[Pair] = []
    for start in range(0, len(pairs), JUDGED_AT_ONCE):
        part = pairs[start : start + JUDGED_AT_ONCE]
        verdicts = judge.judge([p.question for p in part], [p.chosen for p in part])
        kept += [pair for pair, refuses in zip(part, verdicts, strict=True) if not refuses]
        tick(len(part))
    counts["refusing"] = len(pairs) - len(kept)
    return kept


def _fitting(
    pairs: list[Pair], handle: Handle, max_length: int, counts: dict[str, int], reporter: Reporter
) -> list[Pair]:
    """The pairs whose prompt leaves room for an answer; answers that are cut at the end are counted."""
    kept: list[Pair] = []
    cut = 0
    tick = reporter.progress("measuring lengths", len(pairs))
    for pair in pairs:
        lengths = conversation_lengths(pair, handle)
        if lengths[0] < max_length:
            kept.append(pair)
            cut += max(lengths[1:]) > max_length
        tick(1)
    counts["too_long"], counts["cut"] = len(pairs) - len(kept), cut
    return kept


def as_row(pair: Pair, handle: Handle) -> dict[str, Any]:
    """A pair as TRL reads it: prompt, chosen and rejected as messages, the handle's system prompt in front."""
    return {
        "prompt": pair.after(handle.system_prompt),
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "chat_template_kwargs": {"date_string": DATE_STRING},
    }


def conversation_lengths(pair: Pair, handle: Handle) -> tuple[int, int, int]:
    """Tokens of the prompt, of the prompt with the chosen answer, and with the rejected one.

    Raises:
        PromptError: the chat template can't render the pair.
    """
    from jinja2 import TemplateError

    row = as_row(pair, handle)
    tokenizer, lengths = handle.tokenizer, []
    for extra, generation in (([], True), (row["chosen"], False), (row["rejected"], False)):
        try:
            text = tokenizer.apply_chat_template(
                row["prompt"] + extra, tokenize=False, add_generation_prompt=generation, **row["chat_template_kwargs"]
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise PromptError(
                f"the chat template can't render the preference pair {shorten(pair.question, 40)!r} ({error}); "
                "pass another --chat-template, or leave the pair out"
            ) from error
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return lengths[0], lengths[1], lengths[2]


def split(pairs: Sequence[Pair], share: float, most: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; all pairs of one prompt are on one side, whatever order they come in.

    Args:
        pairs: at least two.
        share: of the pairs to hold out, at least one; 0 holds none out. A prompt with more pairs than that stays.
        most: hold out at most so many.
        seed: another seed holds others out.

    Returns:
        Both parts in the order the pairs came in; training has at least one.
    """
    wanted = min(max(round(share * len(pairs)), 1), most, len(pairs) - 1) if share > 0 else 0
    groups: dict[bytes, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(_digest(pair, seed), []).append(index)
    held: set[int] = set()
    for key in sorted(groups):
        if len(held) + len(groups[key]) <= wanted:
            held.update(groups[key])
    train = [pair for index, pair in enumerate(pairs) if index not in held]
    return train, [pairs[index] for index in sorted(held)]


def _digest(pair: Pair, seed: int) -> bytes:
    """A number for the prompt that only it and the seed decide; spaces and case don't count."""
    text = re.sub(r"\s+", " ", repr(pair.prompt)).casefold()
    return hashlib.sha256(f"{seed}\n{text}".encode()).digest()
