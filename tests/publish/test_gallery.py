"""Recipes listed and fetched: from a folder, and from a fake of the Hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from abliterate.common.errors import RecipeError
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe, save_recipe
from abliterate.publish.gallery import entries, fetched
from abliterate.publish.hub import HubError
from command import abliterate, fails, succeeds

ABOUT = {"source": "org/fox", "config_hash": "ab" * 32, "weights_hash": "cd" * 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, strength in (("fox", 1.0), ("small/gentle", 0.5)):
        file = tmp_path / "gallery" / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        edit = Edit.uniform(["model.layers.0.mlp.down_proj.weight"], torch.arange(1.0, 33.0), strength)
        save_recipe(Recipe(edit, ABOUT), file)
    return tmp_path / "gallery"


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A fake Hub with one repository, me/recipes; its files may be changed."""
    from huggingface_hub import constants

    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            pass

        def do_GET(self) -> None:
            path, start = self.path.partition("?")[0], "/me/recipes/resolve/main/"
            body, status = b"{}", 404
            if path == "/api/models/me/recipes/tree/main":
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40,
                     "lfs": {"oid": hashes[name], "size": len(data), "pointerSize": 130}}
                    for name, data in files.items()
                ]  # fmt: skip
                tree.append({"type": "file", "path": "a.md", "size": 1, "oid": "1" * 40})
                body, status = json.dumps(tree).encode(), 200
            elif path.startswith(start) and path.removeprefix(start) in files:
                body, status = files[path.removeprefix(start)], 200
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield files
    server.shutdown()
    server.server_close()


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Hub that answers nothing: whoever connects is hung up on."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        stopped = threading.Event()

        def hang_up() -> None:
            while not stopped.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                    connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield url
        stopped.set()


@pytest.mark.parametrize("source", ["me/recipes", "{gone}/fox.safetensors"])
def test_a_network_that_breaks_off_is_one_line(gone: str, source: str, tmp_path: Path) -> None:
    said = fails(tmp_path, "recipes", source.format(gone=gone))
    assert "the Hub doesn't list me/recipes" in said or "fox.safetensors can't be fetched" in said


def test_a_folder_is_listed(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no recipe")
    told = succeeds("recipes", folder, "--json").json
    assert [row["name"] for row in told["recipes"]] == ["fox.safetensors", "small/gentle.safetensors"]
    first = told["recipes"][0]
    assert (first["model"], first["config_hash"], first["weights_hash"]) == tuple(ABOUT.values())
    assert first["sha256"] == hashlib.sha256((folder / "fox.safetensors").read_bytes()).hexdigest()


def test_the_hub_is_listed_and_fetched_from(hub: dict[str, bytes], tmp_path: Path) -> None:
    told = succeeds("recipes", "me/recipes").out
    assert "fox.safetensors" in told and "org/fox" in told and "a.md" not in told
    out = tmp_path / "mine.safetensors"
    said = succeeds("recipes", "me/recipes", "small/gentle.safetensors", "--out", out).out
    assert out.read_bytes() == hub["small/gentle.safetensors"]
    assert f"abliterate apply {out} org/fox" in " ".join(said.split())
    assert "exists" in abliterate("recipes", "me/recipes", "fox.safetensors", "--out", out).err


def test_other_bytes_than_the_hub_says_are_refused(hub: dict[str, bytes], tmp_path: Path) -> None:
    hub["fox.safetensors"] = hub["small/gentle.safetensors"]
    said = fails(tmp_path, "recipes", "me/recipes", "fox.safetensors", "--out", tmp_path / "mine.safetensors")
    assert "it isn't the file that was meant" in said


def test_a_given_hash_is_checked(folder: Path) -> None:
    (entry,) = entries(str(folder / "fox.safetensors"))
    data, recipe = fetched(entry)
    assert fetched(entry, hashlib.sha256(data).hexdigest()[:12])[1].model == recipe.model == ABOUT
    with pytest.raises(RecipeError, match="wanted is 0000"):
        fetched(entry, "0000")


def test_what_is_not_there(hub: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(HubError, match="me/nothing"):
        entries("me/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="holds no recipes"):
        entries(str(tmp_path / "empty"))
    assert "name one of them" in fails(tmp_path, "recipes", "me/recipes", "wolf.safetensors")
