"""`abliterate chat`: a prompt piped in prints only the answer; in a terminal, the slash commands."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from abliterate.edit.edit import Edit
from abliterate.edit.recipe import save_recipe
from abliterate.models.loading import load
from abliterate.models.recipes import recipe_for
from abliterate.models.writers import find_writers
from command import abliterate, succeeds
from models import save_tiny, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("chat") / "model", tiny_llama())


@pytest.fixture(scope="module")
def recipe(folder, tmp_path_factory):
    handle = load(str(folder))
    direction = torch.randn(handle.d_model, generator=torch.Generator().manual_seed(3))
    path = tmp_path_factory.mktemp("recipe") / "r.safetensors"
    save_recipe(recipe_for(Edit.uniform(find_writers(handle), direction), handle), path)
    return path


class Typed(io.StringIO):
    def isatty(self):
        return True


def session(monkeypatch, folder, *lines, options=()):
    """What is printed when these lines are typed."""
    left = list(lines)

    def typed(prompt=""):
        print(prompt, end="")
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr(sys, "stdin", Typed())
    monkeypatch.setattr(builtins, "input", typed)
    return succeeds("chat", folder, "--max-new-tokens", "8", *options)


def piped(monkeypatch, text, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return abliterate("chat", *arguments, "--max-new-tokens", "8")


def test_a_prompt_piped_in_prints_only_the_answer(monkeypatch, folder, recipe):
    plain = piped(monkeypatch, "Tell me about boats\n", folder)
    assert plain.code == 0 and plain.err == "" and plain.out.strip()
    edited = piped(monkeypatch, "Tell me about boats\n", folder, "--recipe", recipe)
    half = piped(monkeypatch, "Tell me about boats\n", folder, "--recipe", recipe, "--strength", "0")
    assert edited.out != plain.out
    assert half.out == plain.out


def test_an_empty_pipe_is_an_error(monkeypatch, folder):
    done = piped(monkeypatch, "  \n", folder)
    assert done.code == 2 and "standard input is empty" in done.err


def test_slash_commands(monkeypatch, folder, recipe, tmp_path):
    saved = tmp_path / "talk.json"
    done = session(
        monkeypatch, folder, "/help", "Tell me about boats", "/original", "And the sea?", "/strength 0.5", "/compare",
        "Old maps", "/system Be brief.", "Hello", f"/save {saved}", "/nonsense", "/strength much", "/quit",
        options=("--recipe", recipe),
    )  # fmt: skip
    assert "/strength 0.5   scale" in done.out
    for mark in ("[1] > ", "[original] > ", "[0.5] > ", "[compare] > ", "--- original ---", "--- edited ---"):
        assert mark in done.out, mark
    assert "/nonsense is not known" in done.err and "'much' is not a number" in done.err
    turns = json.loads(saved.read_text())["messages"]
    assert [m["content"] for m in turns if m["role"] != "assistant"] == ["Be brief.", "Hello"]


def test_without_a_recipe_there_is_nothing_to_scale(monkeypatch, folder):
    done = session(monkeypatch, folder, "/strength 0.5", "/compare")
    assert done.err.count("there is no edit to scale") == 2


def test_another_models_recipe_is_refused(monkeypatch, recipe, tmp_path):
    other = save_tiny(tmp_path / "other", tiny_llama(layers=3))
    done = piped(monkeypatch, "Hello", other, "--recipe", recipe)
    assert done.code == 2 and "--force" in done.err


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(folder):
    """In a real terminal of its own, as over SSH."""
    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "abliterate.cli", "chat", str(folder), "--max-new-tokens", "400"]
    process = subprocess.Popen(program, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                               preexec_fn=_own_terminal)  # fmt: skip
    os.close(theirs)
    seen = ""
    try:
        seen += _until(ours, "[original] > ", 120)
        os.write(ours, b"Tell me about boats\n")
        _until(ours, "boats\r\n", 30)
        assert select.select([ours], [], [], 60)[0]  # the answer has begun
        os.write(ours, b"meanwhile")
        time.sleep(0.5)
        os.write(ours, b"\x03")
        assert "meanwhile" not in _until(ours, "[original] > ", 60)  # what is typed doesn't show in it
        assert process.poll() is None
        for _ in range(30):  # Ctrl-C throws away what is typed ahead of it
            os.write(ours, b"/quit\n")
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert process.wait(2) == 0
                break
        assert process.poll() == 0
    finally:
        process.kill()
        os.close(ours)


def _own_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where tests run in the background


def _until(fd, text, seconds):
    """Read until a text appears."""
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        if not select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
            raise AssertionError(f"{text!r} didn't appear in {seen[-500:]!r}")
        seen += os.read(fd, 4096).decode(errors="replace")
    return seen
