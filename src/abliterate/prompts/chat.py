"""Chat formatting: what a model reads when a prompt is the user's turn, as text and as token ids.

transformers and jinja2 are imported only by the functions that need them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.common.errors import ModelError, PromptError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


DATE, DATE_STRING = "2024-07-26", "26 Jul 2024"
"""The day it is in every prompt: templates write today's, and a recipe must not depend on that."""
_DAY = {
    "%-d": "26", "%d": "26", "%e": "26", "%-m": "7", "%m": "07", "%B": "July", "%b": "Jul", "%h": "Jul", "%Y": "2024",
    "%y": "24", "%A": "Friday", "%a": "Fri", "%u": "5", "%w": "5", "%j": "208", "%V": "30", "%W": "30", "%U": "29",
    "%G": "2024", "%C": "20", "%-H": "12", "%H": "12", "%-I": "12", "%I": "12", "%M": "00", "%S": "00", "%f": "000000",
    "%p": "PM", "%Z": "UTC", "%z": "+0000", "%F": DATE, "%D": "07/26/24", "%x": "07/26/24", "%T": "12:00:00",
    "%X": "12:00:00", "%R": "12:00", "%c": "Fri Jul 26 12:00:00 2024", "%s": "1721995200", "%%": "%",
}  # fmt: skip
THINKING_ON = {"enable_thinking": True, "thinking": True, "reasoning": True}


def has_date(template: str) -> bool:
    """Whether a template writes a date."""
    return "strftime_now" in template or "date_string" in template


def fixed(template: str, switches: Mapping[str, Any] | None = None) -> str:
    """A chat template with its day and its switches set before it, which then don't depend on who renders it.

    transformers puts a function `strftime_now` into every template's names; a macro of that name hides it.

    Args:
        template: Jinja text.
        switches: names and values that the template is to see, such as {"enable_thinking": False}.
    """
    lines = [f"{{% set {name} = {json.dumps(value)} %}}" for name, value in (switches or {}).items()]
    if "strftime_now" in template:
        written = "".join(f" | replace({code!r}, {text!r})" for code, text in _DAY.items())
        lines.append(f"{{% macro strftime_now(form) %}}{{{{ form{written} }}}}{{% endmacro %}}")
    if "date_string" in template:
        lines.append(f"{{% set date_string = {DATE_STRING!r} %}}")
    return "".join(f"{line}\n" for line in lines) + template


def format_prompts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    prefill: str | None = None,
    switches: Mapping[str, Any] | None = None,
    before: Sequence[Message] = (),
) -> list[list[int]]:
    """Token ids of each prompt as a chat: template, generation prompt, then the prefill.

    Args:
        tokenizer: of the model that will read the ids.
        texts: user messages.
        system_prompt: system message; None leaves the template's own default.
        chat_template: a Jinja file, a template's text or `"chatml"`; None takes the tokenizer's own.
        prefill: text with which the answer begins.
        switches: names and values that the template is to see; see `fixed`.
        before: turns that go before each prompt.

    Returns:
        One list of ids a prompt, of different lengths, without padding.

    Raises:
        ModelError: there is no chat template, or it can't render the messages.
    """
    rendered = render(tokenizer, conversations(texts, system_prompt, before), chat_template, prefill, switches)
    return _tokenise(tokenizer, rendered)


def format_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    chat_template: str | None = None,
    prefill: str | None = None,
    switches: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation of several turns, up to where the next answer begins.

    Args:
        tokenizer: of the model that will read the ids.
        messages: {"role", "content"} of each turn, the last one the user's.
        chat_template, prefill, switches: as in `format_prompts`.

    Raises:
        ModelError: there is no chat template, or it can't render the messages.
    """
    return _tokenise(tokenizer, render(tokenizer, [list(messages)], chat_template, prefill, switches))[0]


def render_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """A conversation in the tokenizer's own template, as text, up to where the next answer begins.

    Raises:
        ModelError: there is no chat template, or it can't render the messages.
    """
    return render(tokenizer, [list(messages)], None, None)[0]


def instruction_suffix_length(
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    prefill: str | None = None,
    switches: Mapping[str, Any] | None = None,
) -> int:
    """Number of tokens after the instruction, such as `<|im_end|>\\n<|im_start|>assistant\\n`; at least 1.

    Positions -1 to minus this number are the same tokens for every prompt, so directions found there
    compare like with like (Arditi et al. 2024, section 2.3).
    """
    rendered = render(
        tokenizer,
        conversations(["Describe a quiet river in autumn", "How many moons does Jupiter have?"], system_prompt),
        chat_template,
        prefill,
        switches,
    )
    first, second = _tokenise(tokenizer, rendered)
    shared = _common_suffix(first, second)
    # A small vocabulary maps the instructions' own words to one <unk>: never count more tokens than the
    # text that follows them has.
    tail = rendered[0][len(rendered[0]) - _common_suffix(*rendered) :]
    return max(1, min(shared, len(_tokenise(tokenizer, [tail])[0]) if tail else 0))


def check_context(ids: Sequence[Sequence[int]], context_length: int, texts: Sequence[str] | None = None) -> None:
    """Raise a PromptError that names the first prompt with more tokens than the context holds.

    Args:
        ids: token ids of each prompt.
        context_length: tokens that the model can read, less those kept for its answer.
        texts: the prompts, to quote the one that is too long.
    """
    for index, prompt in enumerate(ids):
        if len(prompt) > context_length:
            quote = f" ('{shorten(texts[index])}')" if texts is not None else ""
            raise PromptError(
                f"prompt {index + 1}{quote} has {len(prompt)} tokens and the context {context_length}; "
                "shorten the prompt or leave it out"
            )


def resolve_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """The Jinja text of a template given as a file, as text, as `"chatml"`, or as the tokenizer's own (None).

    Raises:
        ModelError: the file is missing or not UTF-8, or there is no template anywhere.
    """
    if chat_template == "chatml":
        # The special tokens are left to the template, so a beginning that the tokenizer would add is
        # written here. ({{ bos_token }} alone would be wrong: SmolLM2's is <|im_start|> itself.)
        return ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + CHATML
    if chat_template is None:
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        if not own:
            raise ModelError(
                f"{_name(tokenizer)} has no chat template; pass --chat-template FILE or --chat-template chatml"
            )
        return own
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"chat template file {chat_template} can't be read ({error}); give a Jinja file or 'chatml'"
        ) from error


def conversations(
    texts: Iterable[str], system_prompt: str | None, before: Sequence[Message] = ()
) -> list[list[Message]]:
    system: list[Message] = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [[*system, *before, {"role": "user", "content": text}] for text in texts]


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    chat_template: str | None,
    prefill: str | None,
    switches: Mapping[str, Any] | None = None,
) -> list[str]:
    """Each conversation as the text that the model reads."""
    template = fixed(resolve_chat_template(tokenizer, chat_template), switches)
    rendered = []
    for messages in conversations:
        system_prompt = next((m["content"] for m in messages if m["role"] == "system"), None)
        try:
            chat = tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # whatever the template does
            cause = "with a system prompt " if system_prompt is not None else ""
            remedy = (
                "correct it" if system_prompt is None else "leave --system-prompt out or pass another --chat-template"
            )
            raise ModelError(
                f"the chat template of {_name(tokenizer)} can't be rendered {cause}({error}); {remedy}"
            ) from error
        assert isinstance(chat, str)
        if system_prompt is not None and system_prompt.strip() not in chat:
            raise ModelError(
                f"the chat template of {_name(tokenizer)} leaves the system prompt out; "
                "leave --system-prompt out or pass another --chat-template"
            )
        rendered.append(chat + (prefill or ""))
    return rendered


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token before plain text by itself."""
    return tokenizer.bos_token_id is not None and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def _tokenise(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[str]) -> list[list[int]]:
    # The template has written the special tokens already: adding them again would double the first.
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in rendered]


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "the tokenizer"


def _common_suffix(first: Sequence[object], second: Sequence[object]) -> int:
    length = 0
    for a, b in zip(reversed(first), reversed(second), strict=False):
        if a != b:
            break
        length += 1
    return length
