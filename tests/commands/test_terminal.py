"""What every command does alike in a terminal: exit codes, completion, JSON, log files, bars and lines."""

from __future__ import annotations

import contextlib
import importlib.machinery
import inspect
import io
import os
import pty
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer
from rich.console import Console

from abliterate.cli import app
from abliterate.commands.terminal import Terminal
from abliterate.common import errors
from abliterate.common.watching import ProgressFile, progress_file
from command import abliterate

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
GUIDE = Path(__file__).parents[2] / "docs" / "commands.md"


def test_exit_codes_are_documented():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]
    codes = {0, *(kind.exit_code for kind in kinds)}
    assert codes == {0, 2, 3, 130}
    for text in (" ".join(abliterate("--help").out.replace("│", " ").split()), GUIDE.read_text()):
        said = re.search(r"Exit codes: (.*?)\. ?", text.replace("\n", " "))
        assert said, text
        assert codes <= {int(number) for number in re.findall(r"\b\d+\b", said[1])}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_are_completed(shell):
    """The script that --install-completion puts in place asks the program itself; so does this."""

    def completed(*words):
        line = " ".join(words)
        asked = {
            "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
            "zsh": {"_TYPER_COMPLETE_ARGS": line},
            "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
        }[shell]
        environment = {**os.environ, **asked, "_ABLITERATE_COMPLETE": f"complete_{shell}"}
        program = [str(Path(sys.executable).with_name("abliterate"))]
        return subprocess.run(program, capture_output=True, text=True, env=environment).stdout

    assert "watch" in completed("abliterate", "wa")
    assert "--recipe" in completed("abliterate", "chat", "--rec")


def test_every_command_that_prints_a_result_does_so_as_json():
    options = {name: {parameter.name for parameter in command.params} for name, command in COMMANDS.items()}
    talks = {"chat", "studio"}  # they print no result: one is talked to, one serves a page
    assert {name for name in options if "json" not in options[name]} <= talks


def stages(console, steps=2, then=lambda: None, **more):
    """A terminal in which something is said and a stage of four steps goes so far."""
    with Terminal(console=console, **more) as terminal:
        terminal.say("loading [a] model")
        tick = terminal.progress("collecting activations", 4)
        for _ in range(steps if tick else 0):
            tick(1)
        if terminal.bars:
            terminal.bars.refresh()
        then()


def test_a_terminal_shows_a_bar_with_rate_and_remaining_time():
    file = io.StringIO()
    stages(Console(file=file, force_terminal=True, width=120, color_system=None))
    shown = file.getvalue()
    assert "loading [a] model" in shown
    bar = next(line for line in reversed(re.split(r"[\r\n]", shown)) if "2/4" in line)
    assert "collecting activations" in bar and "50%" in bar
    assert re.search(r"\d\.\d/s|s each", bar), bar
    assert len(re.findall(r"\d:\d\d:\d\d", bar)) == 2, bar  # elapsed and remaining


def test_results_go_to_standard_output_whatever_the_bars_do(capsys):
    """As with `abliterate run ... --json > results.json` in a terminal: the bars are its, the result is the file's."""
    file = io.StringIO()
    for steps in (2, 4):
        stages(Console(file=file, force_terminal=True, width=120), steps, then=lambda: print("the result"))
    assert capsys.readouterr().out == "the result\n" * 2
    assert "the result" not in file.getvalue()


def test_a_bar_is_taken_away_when_its_stage_is_done():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    stages(console, 4, then=lambda: file.write("|the result"))
    before = file.getvalue().split("|the result")[0]
    assert before.endswith("\x1b[1A\x1b[2K")  # up and erased: the line is free
    assert "\x1b[?25h" in before  # and the cursor is shown again


def test_elsewhere_there_is_a_line_per_stage_and_no_escape_sequence():
    file = io.StringIO()
    stages(Console(file=file, width=120))
    assert [line[9:] for line in file.getvalue().splitlines()] == ["loading [a] model", "collecting activations (4)"]
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("quiet", [True, False])
def test_the_log_has_every_line_also_where_bars_are_drawn(quiet):
    file, log = io.StringIO(), io.StringIO()
    stages(Console(file=file, force_terminal=True), quiet=quiet, log=log)
    assert (file.getvalue() == "") == quiet
    assert [line.split("s  ")[1] for line in log.getvalue().splitlines()] == [
        "loading [a] model", "collecting activations (4)"
    ]  # fmt: skip


def test_an_interrupt_while_progress_is_written_leaves_nothing(tmp_path, monkeypatch):
    file = ProgressFile(progress_file(tmp_path / "out"))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        file.stage("fitting", 2)
    assert list(tmp_path.iterdir())
    file.end()
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_watched_in_a_terminal(tmp_path):
    """In a real terminal of 100 columns: the lines, where it is, and the end, told by the exit code too."""
    out = tmp_path / "out"
    file = ProgressFile(progress_file(out))
    file.say("loading model")
    file.stage("fitting at weight 1", 40)
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(TERM="xterm", COLUMNS="100", LINES="30")
        os.execv(sys.executable, [sys.executable, "-m", "abliterate.cli", "watch", str(out)])
    seen, ended = b"", False
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not data:
            break
        seen += data
        if b"fitting at weight 1: 0 of 40" in seen and not ended:
            ended = True
            out.mkdir()
            file.end()
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, seen
    assert b"loading model" in seen and b"done" in seen


@pytest.mark.slow
def test_a_bar_moves_in_a_notebook_that_has_widgets(monkeypatch):
    """In one that has none it is a line, and no warning of rich's."""
    import IPython.display

    shown = []

    class Output(contextlib.nullcontext):
        def clear_output(self, wait):
            shown.clear()

        def close(self):
            pass

    widgets = types.ModuleType("ipywidgets", "")
    widgets.Output, widgets.__spec__ = Output, importlib.machinery.ModuleSpec("ipywidgets", None)
    monkeypatch.setattr(IPython.display, "display", lambda *found: shown.extend(found))
    for there, wanted in ((widgets, "4/9"), (None, "(9)")):
        monkeypatch.setitem(sys.modules, "ipywidgets", there)
        with Terminal(console=Console(force_jupyter=True, highlight=False)) as terminal:
            terminal.progress("collecting", 9)(4)
            if terminal.bars:
                terminal.bars.refresh()  # which it does by itself ten times a second
        (last,) = [found.text for found in shown if hasattr(found, "text") and "collecting" in found.text]
        assert wanted in last
        shown.clear()


def test_a_notebook_is_told_how_a_run_goes():
    code = (
        "import sys, types\n{}import abliterate.api\nfrom abliterate.common.reporting import default_reporter\n"
        "told = default_reporter(); told.say('[loading] it'); print(type(told).__name__)"
    )
    shown = []
    for before in ("", "sys.modules['ipykernel'] = types.ModuleType('ipykernel')\n"):
        done = subprocess.run([sys.executable, "-c", code.format(before)], capture_output=True, text=True, check=True)
        shown.append(done.stdout)
    assert shown[0] == "Silent\n"
    assert "[loading] it" in shown[1] and shown[1].endswith("Terminal\n")
