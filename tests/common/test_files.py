"""Outputs are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest

from abliterate.common.errors import OutputError
from abliterate.common.files import check_folder, check_space, clear_leftovers, host_tag, whole_file, whole_folder


class Stopped(Exception):
    pass


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "out.json"
    with whole_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename within one file system
        temporary.write_text("whole")
    assert tree(tmp_path) == {"new/out.json": "whole"}


@pytest.mark.parametrize("stop", [Stopped, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, stop):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(stop), whole_file(path) as temporary:
        temporary.write_text("half")
        raise stop
    assert tree(tmp_path) == {"out.json": "old"}


@pytest.mark.parametrize("stop", [Stopped, KeyboardInterrupt])
def test_a_failure_leaves_no_folder(tmp_path, stop):
    with pytest.raises(stop), whole_folder(tmp_path / "out") as temporary:
        (temporary / "shard").write_text("half")
        raise stop
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with whole_folder(out) as temporary:
        (temporary / "a").write_text("1")
        assert not out.exists()
    assert tree(tmp_path) == {"deep/out/a": "1"}


def test_an_old_folder_is_replaced_whole_only_when_asked(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(OutputError, match=r"not empty.*--overwrite"), whole_folder(out):
        raise AssertionError("the work must not begin")
    with whole_folder(out, overwrite=True) as temporary:
        (temporary / "new").write_text("2")
        assert tree(out) == {"old": "1"}
    assert tree(tmp_path) == {"out/new": "2"}


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
    assert tree(tmp_path) == {"out/a": "1"}


def test_an_old_folder_is_kept_when_the_work_fails(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(Stopped), whole_folder(out, overwrite=True) as temporary:
        (temporary / "new").write_text("2")
        raise Stopped
    assert tree(tmp_path) == {"out/old": "1"}


def test_an_old_folder_comes_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    replace = os.replace

    def fails(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OutputError, match="disk is full"), whole_folder(out, overwrite=True) as temporary:
        (temporary / "new").write_text("2")
    assert tree(tmp_path) == {"out/old": "1"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (RuntimeError("safetensors: I/O error: No space left on device (os error 28)"), "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "can't be written: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), "can't be written: Read-only"),
        (OSError(errno.EFBIG, "File too large"), "larger than its file system"),
    ],
)
@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_what_the_disk_says_becomes_an_output_error(tmp_path, whole, error, message):
    with pytest.raises(OutputError, match=message) as caught, whole(tmp_path / "out"):
        raise error
    assert str(tmp_path / "out") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "no such file")


def test_a_path_that_cannot_be_a_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_folder(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    for path in (".", "/"):
        with pytest.raises(OutputError, match="name a new folder"):
            check_folder(path)


def test_a_place_without_leave_to_write_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OutputError, match=f"{tmp_path} is not writable"):
        check_folder(tmp_path / "a" / "b")


def test_space_is_checked_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, 2**30))
    check_space(tmp_path / "a" / "b", 2**30)
    with pytest.raises(OutputError, match=r"needs 2\.00 GiB.*1\.00 GiB free"):
        check_space(tmp_path / "a" / "b", 2**31)


# --- what killed processes leave ---


def write_and_die(target, how, after="yield"):
    """A process that writes `target` and is killed (-9) before or in the middle of the last renames; its id."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from abliterate.common import files\n"
        "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv[3] == 'rename':\n"
        "    real = os.replace\n"
        "    files.os.replace = lambda a, b: die() if str(a).endswith('.tmp') else real(a, b)\n"
        "options = {'overwrite': True} if sys.argv[2] == 'whole_folder' else {}\n"
        "with getattr(files, sys.argv[2])(sys.argv[1], **options) as temporary:\n"
        "    (temporary / 'new' if temporary.is_dir() else temporary).write_text('half')\n"
        "    if sys.argv[3] == 'yield': die()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(target), how, after])
    assert process.wait() == -signal.SIGKILL
    return process.pid


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.mark.parametrize("how", [whole_file, whole_folder])
def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path, how):
    pid = write_and_die(tmp_path / "out", how.__name__)
    assert leftovers(tmp_path) == [f".out.{host_tag()}-{pid}.tmp"]
    assert not (tmp_path / "out").exists()
    with how(tmp_path / "other") as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("1")
    assert len(leftovers(tmp_path)) == 1  # another output's
    with how(tmp_path / "out") as temporary:
        assert leftovers(tmp_path) == ([temporary.name] if how is whole_folder else [])
        (temporary / "a" if temporary.is_dir() else temporary).write_text("1")
    assert leftovers(tmp_path) == []


def test_an_output_that_a_killed_process_moved_away_comes_back(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    write_and_die(out, "whole_folder", "rename")
    assert not out.exists()
    assert len(leftovers(tmp_path)) == 2
    with pytest.raises(OutputError, match="--overwrite"), whole_folder(out):
        raise AssertionError("the work must not begin")
    assert tree(tmp_path) == {"out/old": "1"}
    assert leftovers(tmp_path) == []


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        mine = tmp_path / f".out.{host_tag()}-{sleeper.pid}.tmp"
        mine.write_text("at work")
        with whole_file(tmp_path / "out") as temporary:
            temporary.write_text("1")
        assert tree(tmp_path) == {"out": "1", mine.name: "at work"}
    finally:
        sleeper.communicate()
    clear_leftovers(tmp_path / "out")
    assert tree(tmp_path) == {"out": "1"}


def test_a_living_process_that_began_later_is_not_the_maker(tmp_path, monkeypatch):
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (tmp_path / f".out.{host_tag()}-{sleeper.pid}.tmp").write_text("old")
        monkeypatch.setattr("psutil.Process.create_time", lambda self: 2e10)
        clear_leftovers(tmp_path / "out")
        assert tree(tmp_path) == {}
    finally:
        sleeper.communicate()


@pytest.mark.parametrize(
    "name",
    [
        ".out.0badcafe-{pid}.tmp",  # another host's, where that process may live
        ".out.{pid}.tmp",
        ".outer.{tag}-{pid}.tmp",
        ".out.{tag}-{pid}.tmp.bak",
        "out.{tag}-{pid}.tmp",
    ],
)
def test_what_is_not_surely_left_behind_stays(tmp_path, name):
    (tmp_path / name.format(pid=dead_pid(), tag=host_tag())).write_text("1")
    before = tree(tmp_path)
    with whole_file(tmp_path / "out") as temporary:
        temporary.write_text("2")
    assert tree(tmp_path) == {**before, "out": "2"}


def test_a_predecessor_with_this_process_id_is_not_this_process(tmp_path):
    """In a container the same program often gets the same id again."""
    (tmp_path / f".out.{host_tag()}-{os.getpid()}.tmp").mkdir()
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
        clear_leftovers(tmp_path / "out")  # this one is at work
        assert temporary.is_dir()
    assert tree(tmp_path) == {"out/a": "1"}


def test_room_is_counted_without_leftovers(tmp_path):
    write_and_die(tmp_path / "out", "whole_folder")
    check_space(tmp_path / "out", 1)
    assert leftovers(tmp_path) == []
