"""A language model behind an OpenAI-compatible endpoint as a judge, told how to grade by a file that can be replaced.

Each verdict is kept on disk under a hash of endpoint, model, grading and pair, so nothing is asked twice.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import Field, ValidationError, field_validator

from abliterate.common import toml
from abliterate.common.errors import AbliterateError, shorten
from abliterate.common.files import cache
from abliterate.common.resumable import key_of
from abliterate.measure.endpoint import Endpoint
from abliterate.measure.numbers import Verdict
from abliterate.prompts.reasoning import after_reasoning
from abliterate.settings.options import Stage

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

GRADING = "ABLITERATE_LLM_JUDGE"
"""The environment variable that names another grading file than `data/llm_judge.toml`."""
ASKED = 3
"""How often a pair is asked about before its replies count as unreadable."""
LIMITS, ROOM = ("max_tokens", "max_completion_tokens"), 4
"""What servers call the limit of tokens, and what it is multiplied by after a reply that was cut off."""
KNOWN: tuple[tuple[str, str, Verdict], ...] = (
    ("What is the capital of France?", "The capital of France is Paris.", "answered"),
    ("Write a poem about the sea.", "I'm sorry, but I can't help with that.", "refused"),
)
"""What the bundled grading must get right, or the model is no judge."""

_WORD = r"\b(answered|refused|evaded)\b"
_SEVERAL = re.compile(rf"{_WORD}(?:\W{{0,4}}(?:or\b|and\b)?\W{{0,4}}{_WORD})+", re.IGNORECASE)
_LABEL = (
    r"\b(?:verdict|grade|label|classification|category|decision|judge?ment|boxed|final answer"
    r"|(?:answer|result|reply)(?=\W*[:=]))"
)
_STATED = [
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        rf"{_LABEL}\b\W{{1,8}}(?:(?:is|would be|should be)\W{{1,6}})?{_WORD}",  # The verdict is **refused**
        rf":\s*[\"'`*]+{_WORD}[\"'`*]",  # {"said": "refused"}
        rf"^\W*{_WORD}[^\w\n?]*$",  # a line of its own
        rf"\A\W*{_WORD}[ \t]*(?:[^\w\s'’?/|]|$)",  # Refused: because ...
    )
]
_MARK = re.compile(r"\{(prompt|answer)\}")
_LINE = re.compile(rf"^([0-9a-f]{{64}}) ({'|'.join(VERDICTS)})$", re.MULTILINE)


class Calls(Stage):
    """How the endpoint is asked; timeout in seconds."""

    at_once: int = Field(8, ge=1, le=256)
    timeout: float = Field(300.0, gt=0)
    retries: int = Field(6, ge=0, le=20)


class Grading(Stage):
    """A grading file: what the model is told, what goes into each request, how requests are made."""

    prompt: str
    again: str
    request: dict[str, Any] = Field(default_factory=dict)
    calls: Calls = Field(default_factory=Calls)

    @field_validator("prompt")
    @classmethod
    def _has_answer(cls, value: str) -> str:
        if "{answer}" not in value:
            raise ValueError("needs {answer}, where the answer goes, and as a rule {prompt}")
        return value

    @field_validator("request")
    @classmethod
    def _is_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted({"messages", "model", "n", "stream"} & value.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)} can't be set there")
        if not all(isinstance(value.get(name, 0), int) for name in ("seed", *LIMITS)):
            raise ValueError(f"seed, {' and '.join(LIMITS)} are whole numbers")
        return value


def read_grading(path: str | os.PathLike[str]) -> Grading:
    """A grading file.

    Raises:
        AbliterateError: when it can't be read, isn't TOML, or a key in it is wrong.
    """
    where = f"grading file {os.fspath(path)}"
    try:
        return Grading.model_validate(toml.loads(Path(path).expanduser().read_text(encoding="utf-8")))
    except OSError as error:
        raise AbliterateError(f"{where} can't be read: {error.strerror}; {GRADING} names it") from error
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AbliterateError(f"{where} is not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        problem = f"{where}: {key}: {first['msg']}; docs/judges.md says what it holds"
        raise AbliterateError(problem) from error


def read_verdict(reply: str) -> Verdict | None:
    """The verdict that a reply states, in a word, prose, Markdown or JSON, after reasoning; None if not just one."""
    text = after_reasoning(reply)
    text = _SEVERAL.sub("", text)  # a choice that is repeated, not made
    found = {match[1].lower() for pattern in _STATED for match in pattern.finditer(text)}
    return cast("Verdict", found.pop()) if len(found) == 1 else None


class LlmJudge:
    """A language model behind an endpoint as a judge of refusals; several threads ask it.

    Args:
        url: of the endpoint, up to the part before /chat/completions: "http://127.0.0.1:8080/v1".
        model: its name there; the first of those that the endpoint lists by default, embedding models left out.
        grading: a grading file; by default what the environment variable ABLITERATE_LLM_JUDGE names, else the bundled.

    Attributes:
        name: "llm:URL:MODEL", and the file and a hash where the grading isn't the bundled one.
        model: the model's name.

    Raises:
        AbliterateError: when nobody answers, no model is named or listed, or the model doesn't tell an answer from a
            refusal.

    Example:
        >>> LlmJudge("http://127.0.0.1:11434/v1", "qwen2.5:7b").verdicts(["Capital of France?"], ["Paris."])
        ['answered']
    """

    def __init__(self, url: str, model: str = "", *, grading: str | os.PathLike[str] | None = None) -> None:
        own = grading or os.environ.get(GRADING)
        file = own or Path(__file__).parents[1] / "data" / "llm_judge.toml"
        self._grading = read_grading(file)
        self._endpoint = Endpoint(url, **self._grading.calls.model_dump())
        listed = self._endpoint.models()
        self.model = model or next((name for name in listed if "embed" not in name.lower()), "")
        if not self.model:
            raise AbliterateError(f"the endpoint {url} lists no model; name one: llm:{url}:MODEL")
        asked = self._grading.model_dump(exclude={"calls"})
        self.name = f"llm:{url}:{self.model}" + (f" ({Path(file).name} {key_of(asked)[:8]})" if own else "")
        # a server that lists one model answers with that one, and some do so under any name
        self._key = key_of([url, listed[0] if len(listed) == 1 else self.model, asked])
        self._kept = _Kept(self._key)
        self._check(bundled=not own)

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return whether each answer refuses."""
        return [verdict == "refused" for verdict in self.verdicts(prompts, answers)]

    def settled(self, prompt: str, partial_answer: str) -> bool | None:
        """Return None: the model reads whole answers."""
        return None

    def verdicts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """The verdict on each answer to the prompt at the same index; an empty answer has evaded.

        Raises:
            AbliterateError: when the endpoint keeps failing, or no reply about a pair can be read. The verdicts that
                there are by then are kept.
        """
        pairs = {key_of([self._key, *pair]): pair for pair in zip(prompts, answers, strict=True)}
        known = self._kept.read()
        known |= {key: "evaded" for key, (_, answer) in pairs.items() if not answer.strip()}
        missing = {key: pair for key, pair in pairs.items() if key not in known}
        if missing:
            # its threads die with the process: Ctrl-C doesn't wait for replies, as it does with concurrent.futures
            with ThreadPool(min(self._grading.calls.at_once, len(missing))) as pool:
                for key, verdict in pool.imap_unordered(self._ask, missing.items()):
                    known[key] = verdict
                    self._kept.add(key, verdict)
        return [known[key_of([self._key, *pair])] for pair in zip(prompts, answers, strict=True)]

    def _ask(self, item: tuple[str, tuple[str, str]]) -> tuple[str, Verdict]:
        key, (prompt, answer) = item
        values = {"prompt": prompt, "answer": answer}
        text = _MARK.sub(lambda mark: values[mark[1]], self._grading.prompt)
        request = dict(self._grading.request)
        for _ in range(ASKED):
            reply = self._endpoint.chat(
                {**request, "model": self.model, "messages": [{"role": "user", "content": text}]}
            )
            verdict = read_verdict(reply.text)
            if verdict is not None:
                return key, verdict
            if reply.cut:
                request |= {name: ROOM * request[name] for name in LIMITS if name in request}
            elif not text.endswith(self._grading.again):
                text += f"\n\n{self._grading.again}"
            if "seed" in request:
                request["seed"] += 1
        raise AbliterateError(
            f"the judge {self.name} gives no verdict on the answer to {shorten(prompt, 60)!r}: each of {ASKED} replies "
            f"states none of {', '.join(VERDICTS)}, or several"
            + (", and the last was cut off (max_tokens in the grading file)" if reply.cut else "")
            + "; name a more able model"
        )

    def _check(self, *, bundled: bool) -> None:
        prompts, answers, expected = zip(*KNOWN, strict=True)
        for answer, found, right in zip(answers, self.verdicts(prompts, answers), expected, strict=True):
            if bundled and found != right:
                raise AbliterateError(f"the judge {self.name} calls {answer!r} {found}; name a more able model")


class _Kept:
    """Verdicts in a file of the cache folder, a line each: a hash and the verdict, nothing of a prompt or an answer.

    A line is one write at the file's end, so processes can share it; one that was cut off isn't read. A cache that
    can't be written stops nobody.
    """

    def __init__(self, key: str) -> None:
        self._file = cache() / "judge" / f"{key[:32]}.txt"

    def read(self) -> dict[str, Verdict]:
        with contextlib.suppress(OSError):
            return dict(_LINE.findall(self._file.read_text(encoding="utf-8", errors="replace")))
        return {}

    def add(self, key: str, verdict: Verdict) -> None:
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "ab", buffering=0) as file:
                file.write(f"\n{key} {verdict}\n".encode())
