"""Addresses of endpoints, and what is tried again: all against an endpoint on this machine that fails as told."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from abliterate.common.errors import AbliterateError
from abliterate.measure import endpoint as module
from abliterate.measure.endpoint import Endpoint, Reply, split_address
from fake_endpoint import Action, Drop, Fake, Stall, Status, endpoint

BODY = {"messages": [{"role": "user", "content": "<request>\nask\n</request>\n\n<reply>\nSECRET\n</reply>"}]}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    for name in module.KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with endpoint() as fake:
        yield fake


def at(fake: Fake, **calls: float) -> Endpoint:
    return Endpoint(fake.url, **{"at_once": 2, "timeout": 5.0, "retries": 3, **calls})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "url", "model"),
    [
        ("http://127.0.0.1:8080/v1:qwen", "http://127.0.0.1:8080/v1", "qwen"),
        ("http://localhost:11434/v1:hf.co/o/Qwen:Q4_K_M", "http://localhost:11434/v1", "hf.co/o/Qwen:Q4_K_M"),
        ("http://localhost:1234/v1:qwen@q4", "http://localhost:1234/v1", "qwen@q4"),
        ("http://localhost:8080", "http://localhost:8080/v1", ""),
        ("http://localhost:8080/", "http://localhost:8080/v1", ""),
        ("http://localhost:8080:qwen2.5:7b", "http://localhost:8080/v1", "qwen2.5:7b"),
        ("https://host.org/api/v1:meta-llama/llama-3:free", "https://host.org/api/v1", "meta-llama/llama-3:free"),
        ("http://[::1]:8080/v1:m", "http://[::1]:8080/v1", "m"),
    ],
)  # fmt: skip
def test_an_address_is_url_and_model(text: str, url: str, model: str) -> None:
    assert split_address(text) == (url, model)


@pytest.mark.parametrize(
    "text",
    [
        "", "qwen", "localhost:8080", "ftp://host/v1", "http://", "http://h/v1?key=SECRET", "http://h/v1#x",
        "http://user:SECRET@host/v1:m", "http://SECRET@host", "http://user:SEC/RET@host/v1", "http://a b/v1",
    ],
)  # fmt: skip
def test_other_addresses_are_refused_and_not_quoted(text: str) -> None:
    with pytest.raises(AbliterateError, match="llm:URL") as error:
        split_address(text)
    assert "SEC" not in str(error.value)


@pytest.mark.parametrize(
    "failures",
    [
        [Status(500)], [Status(502), Status(503), Status(504)], [Status(429, ("Retry-After", "0"))], [Drop()],
        [Drop(late=True)], [Stall(9)], [Stall(9, late=True)],
    ],
)  # fmt: skip
def test_failures_that_pass_are_waited_out(fake: Fake, failures: list[Action]) -> None:
    left = list(failures)
    fake.act = lambda _: left.pop(0) if left else "refused"
    assert at(fake, timeout=0.3).chat(BODY) == Reply("refused", False)
    assert len(fake.bodies) == len(failures) + 1
    assert all(body == BODY for body in fake.bodies)


def test_a_wait_is_as_long_as_the_endpoint_says_within_reason(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    left = ["7", "", "Fri, 31 Dec 1999 23:59:59 GMT", "86400"]
    fake.act = lambda _: Status(429, ("Retry-After", left.pop(0))) if left else "ok"
    assert at(fake, retries=4).chat(BODY).text == "ok"
    assert waits == [7, 0.02, 0.04, module.LONGEST_WAIT]


@pytest.mark.parametrize(
    ("failure", "said"),
    [(Status(503), "status 503"), (Drop(), "drops the connection"), (Stall(9), "no reply within 0.2 s")],
)
def test_failures_that_stay_are_one_line_without_what_was_asked(fake: Fake, failure: Action, said: str) -> None:
    fake.act = lambda _: failure
    with pytest.raises(AbliterateError) as error:
        at(fake, timeout=0.2, retries=1).chat(BODY)
    assert str(error.value).startswith(f"the endpoint {fake.url} ") and said in str(error.value)
    assert "SECRET" not in str(error.value) and len(fake.bodies) == 2


@pytest.mark.parametrize(
    ("status", "said"), [(400, "context"), (401, module.KEYS[0]), (404, "no such model"), (301, "301")]
)
def test_what_will_not_pass_is_asked_once(fake: Fake, status: int, said: str) -> None:
    fake.act = lambda _: Status(status, ("Location", "http://127.0.0.1:9/v1"))
    with pytest.raises(AbliterateError, match=said) as error:
        at(fake).chat(BODY)
    assert "SECRET" not in str(error.value) and len(fake.bodies) == 1


def test_something_else_than_chat_completions_is_said_so(fake: Fake) -> None:
    fake.act = lambda _: {"text": "refused"}
    with pytest.raises(AbliterateError, match="something else than chat completions"):
        at(fake).chat(BODY)


def test_a_reply_may_come_in_parts_or_empty_and_be_cut_off(fake: Fake) -> None:
    parts = [{"type": "text", "text": "ref"}, {"type": "text", "text": "used"}]
    fake.act = lambda _: {"message": {"content": parts}, "finish_reason": "length"}
    assert at(fake).chat(BODY) == Reply("refused", True)
    fake.act = lambda _: {"message": {"content": None}, "finish_reason": "stop"}
    assert at(fake).chat(BODY) == Reply("", False)


def test_nobody_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 1000.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(AbliterateError, match="doesn't answer; is a server running there") as error:
        Endpoint(url, at_once=1, timeout=5, retries=6).models()
    assert "\n" not in str(error.value)


def test_models_are_listed_or_not() -> None:
    with endpoint(["a", "b"]) as fake:
        assert at(fake).models() == ["a", "b"]
    with endpoint(None) as fake:
        assert at(fake).models() == []


def test_the_key_comes_from_the_environment_alone(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    netrc = tmp_path_factory.mktemp("home") / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody is there: a machine asks itself without
    for name, value, sent in (
        ("", "", None),
        (module.KEYS[1], "two\n", "Bearer two"),
        (module.KEYS[0], "one", "Bearer one"),
    ):
        if name:
            monkeypatch.setenv(name, value)
        assert at(fake).models() == ["qwen"]
        assert fake.headers[-1].get("Authorization") == sent
    monkeypatch.setenv(module.KEYS[0], "SEC\nRET")
    with pytest.raises(AbliterateError, match=module.KEYS[0]) as error:
        at(fake)
    assert "SEC" not in str(error.value)
