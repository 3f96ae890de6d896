"""Serving the page: on this machine alone unless told otherwise, and with nothing fetched from anywhere else."""

from __future__ import annotations

import asyncio
import hmac
import importlib.util
import ipaddress
import os
import re
import socket
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.common.errors import AbliterateError
from abliterate.edit.recipe import MOST_BYTES

if TYPE_CHECKING:
    from abliterate.models.handle import Handle
    from abliterate.studio.shared import Studio

INSTALL = "pip install 'abliterate[studio]'"
FIRST_PORT, PORTS = 7860, 20
MULTIPART = 64 * 2**10  # what surrounds a file in an upload
WRONG_PASSWORD = 1.0  # seconds until the next try
# What the page needs of gradio's many addresses; the rest (run history, editing the app, proxies ...) isn't served.
ROUTES = re.compile(
    r"/(gradio_api/)?(|login|logout|login_check|config|app_id|token|theme\.css|favicon\.ico|robots\.txt|manifest\.json|"
    r"(assets|static|svelte)/.*|queue/(join|data)|cancel|reset|heartbeat/\w+|startup-events|upload|upload_progress|"
    r"file=(?!https?:).*)/?"
)
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
        "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def check_installed() -> None:
    """Raise AbliterateError, naming the extra, when gradio isn't installed."""
    if importlib.util.find_spec("gradio") is None:
        raise AbliterateError(f"the studio needs gradio, which isn't installed; {INSTALL}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_host(host: str, password: str | None) -> None:
    """Raise AbliterateError when others could reach the page without a password."""
    if not is_loopback(host) and not password:
        raise AbliterateError(
            f"on {host} others can reach the studio: set a password in ABLITERATE_STUDIO_PASSWORD (or --password), "
            "or leave --host out to serve this machine alone"
        )


def listening(host: str, port: int | None) -> socket.socket:
    """A socket to serve on; without a port, the first free one from 7860.

    Raises:
        AbliterateError: when the host isn't this machine's, or no port is free.
    """
    reason = ""
    for number in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            family, *_, address = socket.getaddrinfo(host.strip("[]"), number, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address[:2], family=family)
        except socket.gaierror as error:
            raise AbliterateError(
                f"host {host} isn't known here: {error.strerror}; give an address of --host"
            ) from None
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
    named = f"port {port}" if port is not None else f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
    raise AbliterateError(f"can't serve on {host}, {named}: {reason}; name another with --port")


def make_app(studio: Studio, *, host: str = "127.0.0.1", password: str | None = None) -> Any:
    """The page as an ASGI application.

    Args:
        studio: what it shows.
        host: served on; on a loopback address only requests for this machine's names are answered, so that no web
            page elsewhere can reach it under a name of its own.
        password: asked for when set; any user name will do.
    """
    import gradio as gr
    from fastapi import FastAPI

    from abliterate.studio.page import STYLE, build

    page = build(studio)
    page.queue(api_open=False, default_concurrency_limit=None)
    system = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "monospace"]
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    gr.mount_gradio_app(
        app, page, path="/", auth=_auth(password) if password else None,
        auth_message="The password that the studio was started with; any user name will do.", show_error=False,
        allowed_paths=[], max_file_size=MOST_BYTES, run_history=False, footer_links=[], ssr_mode=False,
        mcp_server=False, pwa=False, theme=gr.themes.Base(primary_hue="blue", font=system, font_mono=mono).set(
            block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
            body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
            button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        ),
        css=STYLE.read_text(encoding="utf-8"),
    )  # fmt: skip
    return Guarded(app, LOCAL_NAMES if is_loopback(host) else None)


def _auth(password: str) -> Callable[[str, str], Any]:
    async def check(_user: str, given: str) -> bool:
        if hmac.compare_digest(given.encode(), password.encode()):
            return True
        await asyncio.sleep(WRONG_PASSWORD)
        return False

    return check


class Guarded:
    """An ASGI application behind the checks that gradio leaves to others.

    Requests for another host's name are refused, as are addresses that the page doesn't need, uploads that say they
    are too large, and websockets. Answers carry HEADERS: the browser fetches nothing from elsewhere either.
    """

    def __init__(self, app: Any, names: tuple[str, ...] | None) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse
        from starlette.websockets import WebSocketClose

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] == "websocket":
            await WebSocketClose(1008)(scope, receive, send)
        elif scope["type"] == "http" and (refusal := self._refusal(scope["path"], Headers(scope=scope))):
            await PlainTextResponse(refusal[1], refusal[0])(scope, receive, send)
        else:
            await self.app(scope, receive, with_headers)

    def _refusal(self, path: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if self.names is not None and host not in self.names:
            return 421, "this studio serves its own machine alone"
        if not ROUTES.fullmatch(path):
            return 404, "the studio has no such page"
        if path.rstrip("/").endswith("/upload"):
            size = headers.get("content-length", "")
            if not size.isdigit():
                return 411, "say how long the upload is"
            if int(size) > MOST_BYTES + MULTIPART:
                return 413, f"at most {MOST_BYTES:,} bytes can be uploaded"
        return None


def quiet_gradio(temporary: Path) -> None:
    """Have gradio tell nobody and write nowhere else; before it is imported."""
    off = ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY", "GRADIO_SHARE")
    os.environ.update(dict.fromkeys(off, "False"), HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=str(temporary))


def serve(
    folder: str | Path,
    open_model: Callable[[str], Handle],
    *,
    model: tuple[str, str] | None = None,
    recipe: tuple[str, str] | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    password: str | None = None,
    granted: dict[str, str] | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the studio until it is interrupted.

    Args:
        folder: all the page may read and write in.
        open_model: loads a source.
        model: (name, source) loaded before the page is served; it may lie anywhere.
        recipe: (name, file) to start with; it may lie anywhere.
        host, port: where; the first free port from 7860 by default.
        password: asked for when set; needed unless `host` is a loopback address.
        granted: further sources the page may use, name -> source.
        ready: called with the address once the page is served.

    Raises:
        AbliterateError: when gradio isn't installed, the model or the recipe can't be loaded, or it can't serve there.
    """
    check_installed()
    check_host(host, password)
    with tempfile.TemporaryDirectory(prefix="abliterate-studio-") as temporary:
        quiet_gradio(Path(temporary))
        import uvicorn

        from abliterate.studio.folder import Folder
        from abliterate.studio.models import Models
        from abliterate.studio.session import Session
        from abliterate.studio.shared import NO_RECIPE, Studio

        named = {**(granted or {}), **dict(pair for pair in (model, recipe) if pair)}
        recipe_name = recipe[0] if recipe else NO_RECIPE
        studio = Studio(Folder(folder, named), Models(open_model), Path(temporary) / "downloads")
        first = Session()  # held, so that the model named stays loaded
        if model:
            studio.load(first, model[0], recipe_name)
            studio.first = (model[0], recipe_name)
        with listening(host, port) as listener:
            shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
            address = f"http://{shown}:{listener.getsockname()[1]}"
            config = uvicorn.Config(
                make_app(studio, host=host, password=password), log_level="critical", access_log=False,
                server_header=False, timeout_graceful_shutdown=1, lifespan="on",
            )  # fmt: skip
            server = _server(config, lambda: ready(address) if ready else None)
            try:
                with suppress(KeyboardInterrupt):
                    server.run(sockets=[listener])
            finally:
                studio.end()


def _server(config: Any, started: Callable[[], None]) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started()

    return Server(config)
