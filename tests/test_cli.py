"""The entry point: whatever goes wrong is one line and an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from abliterate import cli
from abliterate.common.errors import NothingToDoError


def test_an_error_that_nobody_foresaw_is_one_line_and_a_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))

    def fails():
        raise IndexError("index 7 is\nout of range")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("abliterate: unforeseen IndexError: index 7 is out of range; its trace is in ")
    (log,) = Path(tmp_path).iterdir()
    assert str(log) in line and "in fails" in log.read_text()


def test_a_known_error_has_its_own_code(monkeypatch, capsys):
    def fails():
        raise NothingToDoError("x hardly refuses")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 3 and capsys.readouterr().err == "abliterate: x hardly refuses\n"
