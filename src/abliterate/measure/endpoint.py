"""A language model behind an OpenAI-compatible endpoint, asked again where it is busy, stalls or drops the connection.

Errors quote nothing of a request or a reply, as answers to harmful prompts are among them, and no key.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import NewConnectionError

from abliterate.common.errors import AbliterateError

KEYS = ("ABLITERATE_JUDGE_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the endpoint's key; the first that does is taken."""
FIRST_WAIT, LONGEST_WAIT, CONNECT_TIMEOUT = 1.0, 120.0, 10.0  # seconds

_ADDRESS = re.compile(
    r"(?P<host>https?://(?:\[[0-9a-fA-F:.]+\]|[^/:@?#\[\]\s]+)(?::\d+)?)(?P<path>/[^:?#\s]*)?(?::(?P<model>\S+))?"
)
_HINTS = {
    400: "it knows a field of [request] in the grading file not, or the text is longer than its context",
    401: f"put its key in the environment variable {KEYS[0]}",
    403: f"put its key in the environment variable {KEYS[0]}",
    404: "it has no such model, or its URL has another path, often /v1",
}


def split_address(text: str) -> tuple[str, str]:
    """URL and model of "URL[:MODEL]"; where the URL has no path it gets /v1, and the model may have colons.

    Raises:
        AbliterateError: when it is no such address, or holds a user or a key; it isn't quoted then.

    Example:
        >>> split_address("http://localhost:11434/v1:qwen2.5:7b")
        ('http://localhost:11434/v1', 'qwen2.5:7b')
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or (not match["path"] and "@" in text):
        raise AbliterateError(
            "the llm judge needs an endpoint: llm:URL[:MODEL], like llm:http://127.0.0.1:8080/v1:qwen, without a user, "
            f"key or ? in the URL; a key goes in the environment variable {KEYS[0]}"
        )
    path = (match["path"] or "").rstrip("/")
    return match["host"] + (path or "/v1"), match["model"] or ""


class Reply(NamedTuple):
    """What the model said, and whether it was cut off at its limit of tokens."""

    text: str
    cut: bool


class Endpoint:
    """An endpoint that threads may ask together.

    Args:
        url: up to the part before /chat/completions.
        at_once: requests under way together.
        timeout: seconds that a reply may take.
        retries: how often a request is made again after 408, 429, 5xx, a timeout or a dropped connection.

    Raises:
        AbliterateError: when the key in the environment can't be sent.
    """

    def __init__(self, url: str, *, at_once: int, timeout: float, retries: int) -> None:
        self.url, self._timeout, self._retries, key = url, timeout, retries, _key()

        def signed(request: requests.PreparedRequest) -> requests.PreparedRequest:
            if key:
                request.headers["Authorization"] = f"Bearer {key}"
            return request

        self._session = requests.Session()
        self._session.auth = signed  # also where there is no key: else requests looks for one in ~/.netrc
        self._session.trust_env = not _is_this_machine(url)  # no proxy between a machine and itself
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=at_once))

    def models(self) -> list[str]:
        """Names of the models there; empty where the endpoint doesn't list them.

        Raises:
            AbliterateError: when nobody answers, or the key is wrong.
        """
        response = self._ask("GET", "/models", while_away=False)
        if response.status_code in (401, 403):
            raise self._error(response)
        try:
            return [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, LookupError, TypeError):
            return []

    def chat(self, body: Mapping[str, Any]) -> Reply:
        """What the model replies to a body for /chat/completions.

        Raises:
            AbliterateError: when the endpoint refuses the request, or keeps failing.
        """
        response = self._ask("POST", "/chat/completions", body)
        if response.status_code != 200:
            raise self._error(response)
        try:
            choice = response.json()["choices"][0]
            content = choice["message"].get("content") or ""
            text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
            return Reply(text, choice.get("finish_reason") == "length")
        except (ValueError, LookupError, TypeError, AttributeError):
            problem = f"the endpoint {self.url} gives something else than chat completions; is the URL right?"
            raise AbliterateError(problem) from None

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, while_away: bool = True
    ) -> requests.Response:
        for past in range(self._retries + 1):
            wait = FIRST_WAIT * 2**past
            try:
                response = self._session.request(
                    method, self.url + path, json=body, timeout=(CONNECT_TIMEOUT, self._timeout), allow_redirects=False
                )
            except requests.RequestException as error:
                problem = self._reason(error)
                if not while_away and isinstance(error, requests.ConnectionError):
                    break
            else:
                if response.status_code < 500 and response.status_code not in (408, 429):
                    return response
                problem = f"answers with status {response.status_code}"
                with contextlib.suppress(ValueError):  # it may be a date
                    wait = max(wait, float(response.headers.get("Retry-After", "")))
            if past < self._retries:
                time.sleep(min(wait, LONGEST_WAIT))
        raise AbliterateError(f"the endpoint {self.url} {problem}")

    def _reason(self, error: requests.RequestException) -> str:
        cause = getattr(error.args[0], "reason", None) if error.args else None
        if isinstance(cause, NewConnectionError) or isinstance(error, requests.ConnectTimeout):
            return "doesn't answer; is a server running there?"
        if isinstance(error, requests.exceptions.SSLError):
            return "has a certificate that isn't trusted here, or doesn't speak https"
        if isinstance(error, requests.Timeout) or "timed out" in str(error):
            return f"gives no reply within {self._timeout:g} s (timeout, under [calls] in the grading file)"
        if isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
            return "drops the connection"
        return f"can't be asked ({type(error).__name__})"

    def _error(self, response: requests.Response) -> AbliterateError:
        hint = _HINTS.get(response.status_code)
        return AbliterateError(
            f"the endpoint {self.url} answers with status {response.status_code}" + (f": {hint}" if hint else "")
        )


def _key() -> str:
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), None)
    key = os.environ[name].strip() if name else ""
    if not (key.isascii() and key.isprintable()) and key:
        raise AbliterateError(f"the key in the environment variable {name} has characters that can't be sent")
    return key


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
