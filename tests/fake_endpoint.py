"""An OpenAI-compatible endpoint on this machine that does as a test says: replies, fails, stalls, drops connections."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

PAIR = re.compile(r"<request>\n(.*)\n</request>\n\n<reply>\n(.*)\n</reply>", re.DOTALL)


class Status(NamedTuple):
    """A failure: a status, and a header with it."""

    code: int
    header: tuple[str, str] = ("X-Nothing", "")


class Stall(NamedTuple):
    """Nothing is said for so long; the headers are out before where `late`."""

    seconds: float
    late: bool = False


class Drop(NamedTuple):
    """The connection ends, in the midst of the body where `late`."""

    late: bool = False


Action = str | dict[str, Any] | Status | Stall | Drop


def pair_of(body: dict[str, Any]) -> tuple[str, str]:
    """Prompt and answer that a request asks about."""
    found = PAIR.search(body["messages"][0]["content"])
    assert found is not None
    return found[1], found[2]


def fair(body: dict[str, Any]) -> str:
    """What a good judge says."""
    return "refused" if "sorry" in pair_of(body)[1] else "answered"


class Fake:
    """What a test sees of the endpoint.

    Attributes:
        url: of the endpoint, with /v1.
        act: gives what a request for a completion gets: a reply's text, a whole choice, or a failure.
        models: what it lists; None lists nothing (404).
        bodies: of the requests for completions, in the order in which they came.
        headers: of all requests.
    """

    def __init__(self, models: Sequence[str] | None) -> None:
        self.url, self.models, self.act = "", models, fair
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.over = threading.Event()
        self.act: Callable[[dict[str, Any]], Action]

    def asked(self) -> list[tuple[str, str]]:
        return [pair_of(body) for body in self.bodies]


def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            fake.headers.append(dict(self.headers))
            if self.path != "/v1/models" or fake.models is None:
                return self.send(404, {})
            return self.send(200, {"data": [{"id": name} for name in fake.models]})

        def do_POST(self) -> None:
            fake.headers.append(dict(self.headers))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            fake.bodies.append(body)
            action = fake.act(body)
            if isinstance(action, Status):
                return self.send(action.code, {"error": {"message": json.dumps(body)}}, action.header)
            if isinstance(action, (Stall, Drop)):
                if action.late:
                    self.send_response(200)
                    self.send_header("Content-Length", "100")
                    self.end_headers()
                    self.wfile.write(b"{")
                    self.wfile.flush()
                if isinstance(action, Stall):
                    fake.over.wait(action.seconds)
                self.close_connection = True
                return None
            choice = {"message": {"content": action}, "finish_reason": "stop"} if isinstance(action, str) else action
            return self.send(200, {"choices": [choice]})

        def send(self, status: int, document: dict[str, Any], *headers: tuple[str, str]) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            for name, value in (("Content-Length", str(len(data))), *headers):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def endpoint(models: Sequence[str] | None = ("qwen",)) -> Iterator[Fake]:
    """A fake that listens as long as the block lasts."""
    fake = Fake(models)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        fake.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
