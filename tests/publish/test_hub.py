"""Pushing to the Hub, against a fake of its HTTP API on this machine that fails where it is told to."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import torch
import yaml

from abliterate.common.errors import OutputError
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe, save_recipe
from abliterate.publish.hub import HubError, push
from command import abliterate, fails, succeeds
from models import save_tiny, tiny_llama

TOKEN = "hf_secretsecretsecretsecretsecret"
LFS = (".safetensors", ".gguf")
RECIPE = Recipe(
    Edit.uniform(["model.layers.0.mlp.down_proj.weight"], torch.arange(1.0, 33.0), 0.5)
    + Edit.shifting(1, torch.arange(1.0, 33.0), 2.5),
    {"source": "org/fox", "revision": "abc"},
    {"found_at": {"layer": 2, "site": "pre", "position": -1}},
)


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory. `trouble` holds (method, part of the path, what) still to happen, each once: a status;
    "drop" closes the connection in the middle of the request; "lose" does what is asked and closes it unanswered."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.trouble: list[tuple[str, str, Any]] = []
        self.uploaded: list[str] = []
        self.echo = False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_args: Any) -> None:
        pass  # a dropped connection is meant

    def files(self, repo: str = "me/fox", branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo]["branches"][branch]

    def add(self, repo: str, private: bool = False) -> None:
        self.repos[repo] = {"private": private, "branches": {"main": {".gitattributes": b"*"}}, "commits": 0}

    def requests(self, method: str, part: str) -> int:
        return sum(m == method and part in p for m, p in self.log)


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: in two, the second waits for the first one's acknowledgement

    def log_message(self, *_args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.dispatch("GET")

    def do_POST(self) -> None:
        self.dispatch("POST")

    def do_PUT(self) -> None:
        self.dispatch("PUT")

    def dispatch(self, method: str) -> None:
        hub, path = self.server, unquote(urlparse(self.path).path)
        hub.log.append((method, path))
        what = next((t for t in hub.trouble if t[0] == method and t[1] in path), None)
        if what:
            hub.trouble.remove(what)
        length = int(self.headers.get("Content-Length") or 0)
        if what and what[2] == "drop":
            self.rfile.read(length // 2)
            return self.hang_up()
        body = self.read_chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if what and isinstance(what[2], int):
            return self.answer(what[2], {"error": f"trouble {self.headers.get('Authorization') if hub.echo else ''}"})
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        status, document = self.respond(method, path, body)
        if what and what[2] == "lose":
            return self.hang_up()
        self.answer(status, document)

    def read_chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        if status >= 400:
            self.send_header("X-Error-Message", document["error"])
            if document.get("code"):
                self.send_header("X-Error-Code", document["code"])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def respond(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        hub = self.server
        asked = json.loads(body) if body and "/commit/" not in path and not path.startswith("/lfs/") else {}
        if path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == oid
            hub.blobs[oid] = body
            hub.uploaded.append(oid)
            return 200, {}
        if path == "/api/repos/create":
            repo = f"{asked['organization'] or 'me'}/{asked['name']}"
            if repo in hub.repos:
                return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}
            hub.add(repo, asked.get("visibility") == "private")
            return 200, {"url": f"{hub.url}/{repo}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self.lfs_object(o) for o in asked["objects"]]}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path)
        assert found, path
        name, what, revision = found[1], found[2], found[3] or "main"
        if name not in hub.repos:
            return 404, {"error": "Repository not found", "code": "RepoNotFound"}
        repo = hub.repos[name]
        branches = repo["branches"]
        if what == "branch":
            if revision in branches:
                return 409, {"error": "Reference already exists"}
            branches[revision] = dict(branches["main"])
            return 200, {}
        if revision not in branches:
            return 404, {"error": "Invalid rev id", "code": "RevisionNotFound"}
        files = branches[revision]
        if what in (None, "revision"):
            return 200, {"id": name, "sha": f"{repo['commits']:040x}", "private": repo["private"], "tags": []}
        if what == "tree":
            return 200, [self.entry(p, c) for p, c in files.items()]
        if what == "preupload":
            return 200, {"files": [self.mode(f, files) for f in asked["files"]]}
        assert what == "commit", path
        self.commit(files, [json.loads(line) for line in body.splitlines()])
        repo["commits"] += 1
        oid = f"{repo['commits']:040x}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"}

    def lfs_object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        there = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in self.server.blobs:
            there["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
        return there

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if path.endswith(LFS):
            entry["oid"] = "0" * 40
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def mode(self, file: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        path = file["path"]
        there = self.entry(path, files[path]) if path in files else None
        oid = there and there.get("lfs", there)["oid"]
        return {
            "path": path, "uploadMode": "lfs" if path.endswith(LFS) else "regular", "shouldIgnore": False, "oid": oid,
        }  # fmt: skip

    def commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running fake Hub that huggingface_hub talks to, with a token; nothing waits."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    close_session()
    yield server
    close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def fox(tmp_path_factory):
    """A model folder with a card, in two shards."""
    folder = tmp_path_factory.mktemp("hub") / "fox"
    model = tiny_llama(tied=False)
    save_tiny(folder, model)
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Fox\n")
    return folder


class Told(list):
    """A reporter that keeps what it is told."""

    def say(self, text: str) -> None:
        self.append(text)

    def progress(self, stage: str, total: int) -> Any:
        self.append(f"{stage} {total}")
        return lambda _done: None


def same(folder: Path, files: dict[str, bytes]) -> bool:
    here = {p.name: p.read_bytes() for p in folder.iterdir()}
    return here == {name: content for name, content in files.items() if name != ".gitattributes"}


def test_model_arrives_whole_in_one_commit(hub, fox):
    summary = push(fox, "me/fox")
    assert same(fox, hub.files())
    assert hub.repos["me/fox"]["commits"] == 1
    assert summary["kind"] == "model"
    assert summary["url"] == f"{hub.url}/me/fox"
    assert summary["bytes_sent"] == summary["bytes"] == sum(p.stat().st_size for p in fox.iterdir())
    assert all(entry["sent"] for entry in summary["files"])


def test_name_alone_goes_to_ones_own(hub, fox):
    assert push(fox, "fox")["repo"] == "me/fox"
    assert same(fox, hub.files())


def test_second_push_sends_nothing(hub, fox):
    push(fox, "me/fox")
    uploads = len(hub.uploaded)
    again = push(fox, "me/fox")
    assert again["bytes_sent"] == 0
    assert again["commit"] == f"{1:040x}"
    assert (len(hub.uploaded), hub.repos["me/fox"]["commits"]) == (uploads, 1)


def test_only_what_changed_is_sent(hub, tmp_path, fox):
    push(fox, "me/fox")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in fox.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "README.md").write_text("---\nlicense: mit\n---\n# Another fox\n")
    uploads = len(hub.uploaded)
    summary = push(copy, "me/fox")
    assert [entry["path"] for entry in summary["files"] if entry["sent"]] == ["README.md"]
    assert len(hub.uploaded) == uploads
    assert same(copy, hub.files())


@pytest.mark.parametrize(
    "trouble",
    [
        ("POST", "/repos/create", 500), ("POST", "/repos/create", "drop"), ("GET", "/tree/", 503),
        ("POST", "/preupload/", 502), ("POST", "/objects/batch", 500), ("PUT", "/lfs/", 500), ("PUT", "/lfs/", "drop"),
        ("POST", "/commit/", 500), ("POST", "/commit/", "drop"), ("POST", "/repos/create", "lose"),
        ("PUT", "/lfs/", "lose"), ("POST", "/repos/create", 429),
    ],
)  # fmt: skip
def test_passing_trouble_is_lived_through(hub, fox, trouble):
    hub.trouble = [trouble, trouble]
    push(fox, "me/fox")
    assert not hub.trouble
    assert same(fox, hub.files())
    assert hub.repos["me/fox"]["commits"] == 1


def test_commit_whose_answer_is_lost_is_not_made_twice(hub, fox):
    hub.trouble = [("POST", "/commit/", "lose")]
    told = Told()
    summary = push(fox, "me/fox", reporter=told)
    assert same(fox, hub.files())
    assert hub.repos["me/fox"]["commits"] == 1
    assert summary["commit"] == f"{1:040x}"
    assert all(entry["sent"] for entry in summary["files"])
    assert any("the commit broke off" in text for text in told)


def test_broken_push_is_resumed_with_what_is_missing(hub, fox):
    shards = sorted(fox.glob("*.safetensors"))
    assert len(shards) > 1
    last = hashlib.sha256(shards[-1].read_bytes()).hexdigest()
    hub.trouble = [("PUT", last, "drop")] * 100
    with pytest.raises(HubError, match=r"the connection to the Hub broke 5 times; run the same command again"):
        push(fox, "me/fox")
    arrived = set(hub.uploaded)
    assert arrived == {hashlib.sha256(s.read_bytes()).hexdigest() for s in shards[:-1]}
    assert hub.repos["me/fox"]["commits"] == 0
    hub.trouble, hub.uploaded = [], []
    push(fox, "me/fox")
    assert hub.uploaded == [last]
    assert same(fox, hub.files())


def test_no_end_of_trouble_is_an_error(hub, fox):
    hub.trouble = [("GET", "/tree/", 503)] * 1000
    told = Told()
    with pytest.raises(HubError, match=r"the Hub answered 503 for me/fox, 5 times .*run the same command again"):
        push(fox, "me/fox", reporter=told)
    assert any("answered 503; trying again in 8 s" in text for text in told)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, r"doesn't accept the token.*\(401\); run `hf auth login` or set HF_TOKEN"),
        (403, r"the token may not write to me/fox \(403\)"),
        (404, r"no repository me/fox that the token may see \(404\)"),
        (409, r"changed by somebody else meanwhile.*\(409\); run the same command again"),
        (413, r"\(413\); save the model in smaller shards"),
    ],
)
def test_refusals_are_explained_and_not_tried_again(hub, fox, status, says):
    hub.trouble = [("POST", "/commit/", status)]
    with pytest.raises(HubError, match=says):
        push(fox, "me/fox")
    assert hub.requests("POST", "/commit/") == 1


def test_wrong_token(hub, fox, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(HubError, match=r"\(401\)"):
        push(fox, "me/fox")
    assert not hub.repos


def test_without_token_says_where_from(hub, fox, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"huggingface.co/settings/tokens.*`hf auth login`, or set HF_TOKEN"):
        push(fox, "me/fox")
    assert not hub.log


def test_private_is_made_so(hub, fox):
    push(fox, "me/fox", private=True)
    assert hub.repos["me/fox"]["private"] is True
    push(fox, "me/open")
    assert hub.repos["me/open"]["private"] is False


def test_private_never_goes_to_a_public_repository(hub, fox):
    hub.add("me/fox")
    with pytest.raises(HubError, match=r"me/fox exists and is public.*Nothing was sent"):
        push(fox, "me/fox", private=True)
    assert not hub.uploaded
    assert set(hub.files()) == {".gitattributes"}


def test_branch_is_made_and_main_left_alone(hub, fox):
    push(fox, "me/fox", revision="try/one")
    assert same(fox, hub.files(branch="try/one"))
    assert set(hub.files()) == {".gitattributes"}
    assert push(fox, "me/fox", revision="try/one")["bytes_sent"] == 0


def test_token_appears_nowhere(hub, fox, caplog, capfd):
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "huggingface_hub")
    hub.echo = True  # a server, or a proxy, that repeats what it was sent
    hub.trouble = [("POST", "/commit/", 403), ("PUT", "/lfs/", 500)]
    told = Told()
    with pytest.raises(HubError) as failure:
        push(fox, "me/fox", reporter=told)
    captured = capfd.readouterr()
    shown = "\n".join([str(failure.value), *told, *(r.getMessage() for r in caplog.records), *captured])
    assert TOKEN not in shown
    assert "***" in str(failure.value)
    assert TOKEN not in json.dumps(push(fox, "me/fox"))


def test_recipe_gets_a_card(hub, tmp_path):
    save_recipe(RECIPE, tmp_path / "r.safetensors")
    assert push(tmp_path / "r.safetensors", "me/fox")["kind"] == "recipe"
    files = hub.files()
    assert files["r.safetensors"] == (tmp_path / "r.safetensors").read_bytes()
    text = files["README.md"].decode()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == "org/fox"
    assert {"abliterate", "recipe"} <= set(head["tags"])
    assert "1 weight, 1 direction of width 32, strength 0.5" in text
    assert "2.5 along a direction added at the output of block 1" in text
    assert "layer 2, site `pre`, position -1" in text
    assert "Guardrails are now yours to provide" in text


def test_gguf_gets_a_card_unless_there_is_one(hub, tmp_path):
    from gguf import GGUFWriter

    def write(name: str) -> Path:
        writer = GGUFWriter(tmp_path / name, "llama")
        writer.add_name("Fox")
        writer.add_license("mit")
        writer.add_tensor("a", torch.ones(32).numpy())
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        return tmp_path / name

    assert push(write("fox-q8.gguf"), "me/fox")["kind"] == "gguf"
    card = hub.files()["README.md"]
    assert b"license: mit" in card
    assert b"`fox-q8.gguf`" in card
    hub.files()["README.md"] = b"# Better\n"
    push(write("fox-q4.gguf"), "me/fox")
    assert hub.files()["README.md"] == b"# Better\n"
    assert {"fox-q8.gguf", "fox-q4.gguf"} <= set(hub.files())


@pytest.fixture
def out(tmp_path, fox):
    """What `run` leaves: model, recipe, results, and something else."""
    folder = tmp_path / "out"
    (folder / "model").mkdir(parents=True)
    for path in fox.iterdir():
        (folder / "model" / path.name).write_bytes(path.read_bytes())
    save_recipe(RECIPE, folder / "recipe.safetensors")
    results = {"model": {"source": "/home/somebody/models/fox"}, "edited": {"divergence": {"answer": 0.1}}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "report.html").write_text("<html>")
    return folder


def test_output_of_run(hub, out):
    summary = push(out, "me/fox")
    files = hub.files()
    assert set(files) == {".gitattributes", "recipe.safetensors", "results.json"} | {
        p.name for p in (out / "model").iterdir()
    }
    assert json.loads(files["results.json"])["model"]["source"] == "fox"
    assert summary["left_out"] == [{"path": "report.html", "why": "not part of the model"}]
    assert push(out, "me/fox")["bytes_sent"] == 0


def test_dry_run_needs_no_token_and_no_network(out, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    told = succeeds("push", out, "me/fox", "--dry-run").out
    assert "would go" in told
    assert "model-00001-of" in told
    assert "stays here" in told
    assert "nothing was sent" in told
    document = succeeds("push", out, "me/fox", "--dry-run", "--json").json
    sizes = {p.name: p.stat().st_size for p in (out / "model").iterdir()}
    assert {e["path"]: e["bytes"] for e in document["files"] if e["path"] in sizes} == sizes
    assert document["dry_run"] is True
    assert document["commit"] is None
    assert not any(entry["sent"] for entry in document["files"])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "looks incomplete: there is no config.json"),
        (lambda f: min(f.glob("*.safetensors")).unlink(), "looks incomplete: model-00001-of-.* is missing"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "looks incomplete: there are no weights"),
        (lambda f: (f / ".model.safetensors.12.tmp").write_text(""), "looks incomplete: .* is half-written"),
        (lambda f: (f / "model-00001.safetensors.part").write_text(""), "looks incomplete: .* is half-written"),
        (lambda f: truncate(next(f.glob("*.safetensors"))), "damaged or half-written"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "samples.json").write_text('[{"prompt": "p", "completions": ["x"]}]'), "'completions'"),
        (lambda f: (f / "samples.json").write_text('{"a": {"Answer": "x"}}'), "samples.json holds texts under"),
    ],
)
def test_incomplete_and_answers_stay_here(out, spoil, says):
    spoil(out / "model")
    with pytest.raises(OutputError, match=says):
        push(out, "me/fox", dry_run=True)
    assert re.search(says, fails(out, "push", out, "me/fox", "--dry-run"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def test_answers_and_pickles_are_left_out(hub, fox, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in fox.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    for name in ("answers.jsonl", "training_args.bin", ".DS_Store"):
        (copy / name).write_text("x")
    summary = push(copy, "me/fox")
    assert {e["path"]: e["why"] for e in summary["left_out"]} == {
        "answers.jsonl": "may hold answers", "training_args.bin": "a pickle", ".DS_Store": "hidden",
    }  # fmt: skip
    assert same(fox, hub.files())


@pytest.mark.parametrize("name", ["nothing", "fox.txt", "other.safetensors"])
def test_what_is_no_model_is_refused(tmp_path, name):
    from safetensors.torch import save_file

    (tmp_path / "fox.txt").write_text("x")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    assert "abliterate: " in fails(tmp_path, "push", tmp_path / name, "me/fox", "--dry-run")


@pytest.mark.parametrize("repo", ["a/b/c", "-fox", "fox..x", ""])
def test_bad_repository_names(fox, repo):
    with pytest.raises(HubError, match="can't name a repository"):
        push(fox, repo, dry_run=True)


def test_offline_is_said(fox, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(fox, "me/fox")


def test_command_in_a_process_of_its_own(hub, fox):
    """HF_ENDPOINT and HF_TOKEN from the environment, through the real entry point; nothing of torch is loaded."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    code = "import sys; from abliterate.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "push", str(fox), "me/fox", "--private"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same(fox, hub.files())
    assert hub.repos["me/fox"]["private"] is True
    assert f"sent: {hub.url}/me/fox" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
    assert TOKEN not in done.stdout + done.stderr


def test_command_prints_one_line_on_refusal(hub, fox):
    hub.trouble = [("POST", "/repos/create", 403)]
    failed = abliterate("push", fox, "me/fox", "--quiet")
    assert failed.code == 2
    assert failed.err.startswith("abliterate: the token may not write to me/fox (403)")
    assert len(failed.err.splitlines()) == 1
