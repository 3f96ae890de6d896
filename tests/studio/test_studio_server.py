"""Where the page is served, to whom, and what it answers."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from abliterate.common.errors import AbliterateError
from abliterate.studio import server
from command import abliterate, fails

pytest.importorskip("gradio", reason="gradio isn't installed")
LOCAL = "http://127.0.0.1"


@pytest.fixture
def studio(served, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    from abliterate.models.loading import load
    from abliterate.studio.folder import Folder
    from abliterate.studio.models import Models
    from abliterate.studio.shared import Studio

    return Studio(Folder(served), Models(load), tmp_path / "gradio" / "downloads")


@pytest.fixture
def client(studio):
    from starlette.testclient import TestClient

    with TestClient(server.make_app(studio), base_url=LOCAL) as found:
        yield found


def test_the_page_asks_nothing_of_anybody_else(client):
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert config["run_history"] is False
    assert "fonts.googleapis" not in page.text
    fonts = client.get("/theme.css").text
    assert not re.search(r"@import|url\(['\"]?https?:", fonts)
    assert "system-ui" in fonts


def test_another_name_for_this_machine_is_refused(client):
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:7860", ""):
        assert client.get("/", headers={"host": host}).status_code == 421
    assert client.get("/", headers={"host": "localhost:7860"}).status_code == 200


def test_no_file_of_the_folder_is_served(client, served):
    (served / "secret.txt").write_text("not for the page")
    for path in (
        served / "secret.txt",
        served / "recipe.safetensors",
        "/etc/hostname",
        served / "x" / ".." / "secret.txt",
    ):
        answer = client.get(f"/gradio_api/file={path}")
        assert answer.status_code in (403, 404), path
        assert "not for the page" not in answer.text
    assert client.get(f"/gradio_api/file={LOCAL}/config").status_code == 404


def test_addresses_that_the_page_does_not_need_are_not_served(client):
    for path in (
        "gradio_api/runs",
        "gradio_api/info",
        "gradio_api/run-history/records",
        "gradio_api/vibe-code",
        "gradio_api/proxy=http://x",
        "docs",
        "openapi.json",
        "gradio_api/run/predict",
        "gradio_api/call/x",
    ):
        assert client.get(f"/{path}").status_code == 404, path


def test_uploads_are_limited_in_size(client):
    address = "/gradio_api/upload"
    assert client.post(address, content=b"", headers={"content-length": str(2**27)}).status_code == 413
    assert client.post(address, content=iter([b"x"]), headers={"transfer-encoding": "chunked"}).status_code == 411
    assert client.post(address, files={"files": ("r.safetensors", b"x" * 100)}).status_code == 200


def test_uploads_are_checked_and_not_kept(studio, tmp_path):
    from abliterate.studio.page import build
    from abliterate.studio.session import Session
    from abliterate.studio.tabs.controls import Controls
    from abliterate.studio.tabs.talk import Grid

    recipe, prompts = part(Controls, studio).uploaded, part(Grid, studio).uploaded
    for name, event in (("x.pkl", lambda f: recipe(Session(), f)), ("x.exe", prompts)):
        file = tmp_path / name
        file.write_bytes(b"x")
        with pytest.raises(AbliterateError, match="is not a"):
            event(str(file))
        assert not file.exists()
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"text": f"Name {i}\nrivers."}) + "\n" for i in range(20)))
    assert prompts(str(file)).splitlines()[:2] == ["Name 0 rivers.", "Name 1 rivers."]
    assert not file.exists()
    assert build(studio)


def part(kind, studio):
    """What a part's events call, without a page."""
    made = kind.__new__(kind)
    made.studio = studio
    return made


def handler(studio):
    from abliterate.studio.tabs.keep import Keep

    return part(Keep, studio)


@pytest.fixture
def session(studio):
    from abliterate.studio.session import Session

    made = Session()
    studio.load(made, "model", "recipe.safetensors")
    return made


def test_an_export_tells_how_far_it_is(studio, session, served):
    shown = list(handler(studio).export_form(session, "checkpoint", "", "edited"))
    assert "Wrote edited as checkpoint" in shown[-1]
    assert (served / "edited" / "model.safetensors").is_file()
    assert session.export.state.total > 0 and session.export.state.lines  # it was told, by the form itself


def test_a_bar_shows_what_an_export_was_told(studio, served):
    from abliterate.studio.exporting import Export
    from abliterate.studio.views import progress_view

    export = Export()
    export.say(f"looking at {served / 'model'}")
    tick = export.progress("factors of weights", 4)
    tick(1), tick(2)
    seen = progress_view(export.state, studio.folder, going=True)
    assert "factors of weights: 3 of 4, about" in seen
    assert "<progress max='4' value='3' aria-label='factors of weights'>" in seen
    assert "looking at model</pre>" in seen
    assert "<progress" not in progress_view(export.state, studio.folder, going=False)
    export.stop()
    for word in (lambda: export.say("x"), lambda: export.progress("x", 1), lambda: tick(1)):
        with pytest.raises(AbliterateError, match="was stopped"):
            word()


def test_an_export_is_stopped_and_leaves_nothing(studio, session, served, monkeypatch):
    from abliterate.studio import shared

    apply, before = shared.apply_recipe, sorted(served.iterdir())

    def begin(recipe, source, path, form, options, reporter):
        handler(studio).export_stopped(session)
        return apply(recipe, source, path, form, options, reporter)

    with pytest.raises(AbliterateError, match="no export of yours"):
        handler(studio).export_stopped(session)
    monkeypatch.setattr(shared, "apply_recipe", begin)
    for form in shared.FORMS:
        if "gguf" not in form and form != "control-vector":
            shown = handler(studio).export_form(session, form, "", "edited")
            with pytest.raises(AbliterateError, match="was stopped; nothing of it is left"):
                list(shown)
            assert sorted(served.iterdir()) == before, form


def test_exports_end_with_the_studio(studio, session, served, monkeypatch):
    from abliterate.studio import shared

    apply, before = shared.apply_recipe, sorted(served.iterdir())

    def begin(*arguments):
        studio.end()
        return apply(*arguments)

    monkeypatch.setattr(shared, "apply_recipe", begin)
    with pytest.raises(AbliterateError, match="was stopped"):
        list(handler(studio).export_form(session, "checkpoint", "", "edited"))
    assert sorted(served.iterdir()) == before


def test_the_page_names_no_folder_of_this_machine(studio, served, tmp_path):
    from abliterate.common.watching import Progress
    from abliterate.studio.page import told
    from abliterate.studio.runs import View
    from abliterate.studio.views import run_view

    studio.folder.granted["theirs"] = str(tmp_path / "some where" / "else")
    lines = [
        (1.0, f"loading {served / 'model'}"),
        (2.0, f"loading {tmp_path / 'some where' / 'else'}"),
        (3.0, "read /root/.cache/x/demo-model-1: 3 of 4 and/or Qwen/Qwen3"),
        (4.0, f"folder {served} is full"),
    ]
    view = View(served / "new", "failed", Progress(lines=lines), f"{served / 'new'} isn't empty, nor is /srv/data/x")
    shown = run_view(view, studio.folder)
    assert str(tmp_path) not in shown and "/root" not in shown and "/srv" not in shown
    for text in (
        "loading model\n",
        "loading theirs\n",
        "read demo-model-1: 3 of 4 and/or Qwen/Qwen3",
        "folder the folder is full",
        "new failed: new isn&#x27;t empty, nor is x",
    ):
        assert text in shown, text

    def fails_there():
        raise AbliterateError(f"{served / 'model' / 'config.json'} can't be read")

    import gradio as gr

    with pytest.raises(gr.Error) as caught:
        told(fails_there, studio.folder.public)()
    assert caught.value.message.startswith("model/config.json can")
    assert caught.value.duration is None  # it stands until it was read


def test_the_lists_show_what_is_loaded(studio, session, served, tmp_path):
    from abliterate.studio.session import Session
    from abliterate.studio.shared import NO_RECIPE
    from abliterate.studio.tabs.controls import Controls
    from abliterate.studio.tabs.frontier import Frontier
    from abliterate.studio.tabs.run import Run

    page, frontier = part(Controls, studio), part(Frontier, studio)

    def shown(update):
        assert update["value"] in update["choices"]
        return update["value"]

    model, recipe, *_ = page.loaded(session, "model", "recipe.safetensors")
    assert (model["value"], shown(recipe)) == ("model", "recipe.safetensors")
    assert shown(page.loaded(session, "model", NO_RECIPE)[1]) == NO_RECIPE
    file = tmp_path / "mine.safetensors"
    file.write_bytes((served / "recipe.safetensors").read_bytes())
    assert shown(page.uploaded(session, str(file))[0]) == "mine.safetensors (uploaded)"
    assert not file.exists()
    uploaded = session.recipe
    assert shown(page.loaded(session, "model", "mine.safetensors (uploaded)")[1]) == "mine.safetensors (uploaded)"
    assert session.recipe is uploaded
    with pytest.raises(AbliterateError):
        page.loaded(Session(), "model", "mine.safetensors (uploaded)")  # nobody else has it
    point = frontier.points("out")[0]["choices"][1]
    assert shown(frontier.took(session, "out", point)[0]) == "out/frontier/01.safetensors"
    studio.first = ("model", "recipe.safetensors")
    (opened,) = part(Run, studio).opened(fresh := Session())
    assert (opened[0]["value"], shown(opened[1])) == ("model", "recipe.safetensors")
    assert fresh.recipe_name == "recipe.safetensors"


def test_an_unforeseen_error_is_one_line_without_a_trace(capfd):
    import gradio as gr

    from abliterate.studio.page import told

    def once(value):
        raise RuntimeError("first line\n<b>second</b> " + value)

    def stream(value):
        yield 1
        once(value)

    for call in (lambda: told(once)("x" * 999), lambda: list(told(stream)("x" * 999))):
        with pytest.raises(gr.Error) as caught:
            call()
        said = caught.value.message
        assert said.startswith("RuntimeError: first line &lt;b&gt;second")
        assert "\n" not in said and len(said) < 450
        assert caught.value.print_exception is False
    assert capfd.readouterr().err == ""


def test_the_grid_escapes_what_models_and_users_write():
    from abliterate.studio.session import Answers
    from abliterate.studio.views import grid_table

    table = grid_table(
        ["<script>x</script>"], [Answers("<img src=x>", "I'm sorry, but I can't help with that.", whole=True)]
    )
    assert "<script" not in table and "<img" not in table
    assert "&lt;img src=x&gt;" in table
    assert "0 of 1 refused by the original, 1 by the edited" in table


def test_a_password_is_asked_for(studio):
    from starlette.testclient import TestClient

    app = server.make_app(studio, host="0.0.0.0", password="let me in")
    with TestClient(app, base_url="http://studio.example") as client:
        assert client.get("/config").status_code == 401
        for path in ("queue/data?session_hash=x", "file=/etc/hostname", "upload_progress?upload_id=x"):
            assert client.get(f"/gradio_api/{path}").status_code == 401, path
        assert client.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0}).status_code == 401
        assert client.post("/gradio_api/upload", files={"files": ("r.safetensors", b"x")}).status_code == 401
        assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "me", "password": "let me in"}).status_code == 200
        assert client.get("/config").status_code == 200
        assert "let me in" not in client.get("/").text


def test_elsewhere_only_with_a_password(served, monkeypatch):
    for host in ("0.0.0.0", "::", "192.168.0.7", "studio.example"):
        line = fails(served, "studio", "--host", host, "--folder", served)
        assert "ABLITERATE_STUDIO_PASSWORD" in line
        server.check_host(host, "given")
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        server.check_host(host, None)
    monkeypatch.setenv("ABLITERATE_STUDIO_PASSWORD", "from-the-environment")
    line = fails(served, "studio", "--host", "0.0.0.0", "--folder", served / "nowhere")
    assert "nowhere" in line and "from-the-environment" not in line
    assert "from-the-environment" not in abliterate("studio", "--help").out


def test_bad_beginnings_are_one_line(served, monkeypatch):
    assert "--recipe needs the model" in fails(served, "studio", "--recipe", "x", "--folder", served)
    assert "not found" in fails(served, "studio", served / "nothing", "--folder", served)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = fails(served, "studio", "--port", taken.getsockname()[1], "--folder", served)
    assert "--port" in line
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert "pip install 'abliterate[studio]'" in fails(served, "studio", "--folder", served)


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, abliterate.cli; print([m for m in ('gradio', 'torch', 'uvicorn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.strip() == "[]", done.stderr
