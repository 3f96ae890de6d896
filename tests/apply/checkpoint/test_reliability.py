"""An apply that is killed, cut short or given damaged files leaves nothing half-written, and the next one succeeds."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.apply.checkpoint import journal, pieces
from abliterate.apply.checkpoint.journal import JOURNAL, interrupted
from abliterate.apply.checkpoint.pieces import Change
from abliterate.common.errors import ModelError, OutputError, RecipeError, WriterError
from abliterate.common.files import host_tag
from abliterate.common.reporting import Silent
from abliterate.edit.algebra import Factors
from abliterate.edit.recipe import save_recipe
from abliterate.models.shards import open_checkpoint, read_shard
from apply.checkpoints import D_MODEL, apply_to, small_recipe, small_shards, write_checkpoint
from command import listing, succeeds

FIRST = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NOTHING = Factors(np.zeros((0, D_MODEL), np.float32), np.zeros((0, D_MODEL), np.float32))


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "model", small_shards())


def weights(folder):
    return {name: data for name, data in listing(folder).items() if name.endswith(".safetensors")}


# --- damaged files, found before anything is written ---


def headed(path, change):
    """Rewrite a shard's header."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def offsets(name, low, high):
    def change(header):
        header[name]["data_offsets"] = [header[name]["data_offsets"][0] + low, header[name]["data_offsets"][1] + high]

    return change


def patch(name, **fields):
    return lambda header: header[name].update(fields)


DAMAGES = {
    "empty": (lambda p: p.write_bytes(b""), "0 bytes"),
    "seven bytes": (lambda p: p.write_bytes(b"1234567"), "7 bytes"),
    "cut in the header": (lambda p: os.truncate(p, 100), "header claims"),
    "cut in the data": (lambda p: os.truncate(p, p.stat().st_size - 1), "cut short"),
    "bytes after the end": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "1 stray bytes at its end"),
    "length of the header": (lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]), "header claims"),
    "not JSON": (lambda p: headed(p, lambda h: b"{" * 40), "not JSON"),
    "nested too deep": (lambda p: headed(p, lambda h: b"[" * 100_000), "not JSON"),
    "not UTF-8": (lambda p: headed(p, lambda h: b"\xff\xfe" * 20), "not JSON"),
    "a list": (lambda p: headed(p, lambda h: b"[]"), "not an object"),
    "a tensor twice": (lambda p: headed(p, lambda h: b'{"a":1,"a":2}'), "a is there twice"),
    "an entry that is none": (lambda p: headed(p, lambda h: h.update(x=3)), "entry of x"),
    "an unknown dtype": (lambda p: headed(p, patch("a.bias", dtype="Q4")), "unknown dtype Q4"),
    "a dtype that is none": (lambda p: headed(p, patch("a.bias", dtype=[1])), "unknown dtype"),
    "a negative shape": (lambda p: headed(p, patch("a.bias", shape=[-1])), "no proper shape"),
    "a huge shape": (lambda p: headed(p, patch("a.bias", shape=[2**62, 2**62])), "bytes"),
    "a shape of booleans": (lambda p: headed(p, patch("a.bias", shape=[True])), "no proper shape"),
    "offsets turned round": (lambda p: headed(p, patch("a.bias", data_offsets=[9, 3])), "no proper shape"),
    "no offsets": (lambda p: headed(p, lambda h: h["a.bias"].pop("data_offsets") and None), "no proper shape"),
    "another shape": (lambda p: headed(p, patch("a.bias", shape=[17])), "32 bytes"),
    "an overlap": (lambda p: headed(p, offsets("a.weight", -2, -2)), "overlaps|stray"),
    "beyond the end": (lambda p: headed(p, offsets("rotary.inv_freq", 10**6, 10**6)), "stray|cut short"),
    "a hole": (lambda p: headed(p, lambda h: h.pop("a.weight") and None), "stray bytes before"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_found_first(tmp_path, folder, damage):
    harm, match = DAMAGES[damage]
    harm(folder / FIRST)
    before = listing(tmp_path)
    with pytest.raises(ModelError, match=match) as caught:
        apply_to(small_recipe(), folder, tmp_path / "out")
    assert FIRST in str(caught.value)
    assert listing(tmp_path) == before


def test_two_tensors_in_the_same_bytes(tmp_path):
    entry = {"dtype": "F16", "shape": [16], "data_offsets": [0, 32]}
    text = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))
    with pytest.raises(ModelError, match="b overlaps a"):
        read_shard(tmp_path / "model.safetensors")


INDEX_DAMAGES = {
    "not JSON": (lambda i: "{", "is damaged"),
    "a list": (lambda i: "[]", "is damaged"),
    "no map": (lambda i: json.dumps({"weight_map": {}}), "is damaged"),
    "no file names": (lambda i: json.dumps({"weight_map": {"a.weight": 3}}), "is damaged"),
    "another folder": (lambda i: json.dumps({"weight_map": {"a.weight": "../x.safetensors"}}), "not a file of this"),
    "a missing file": (
        lambda i: i.replace(FIRST, "model-00003-of-00002.safetensors"),
        "names model-00003.*isn't there",
    ),
    "an edited tensor elsewhere": (
        lambda i: i.replace('"a.weight": "model-00001', '"a.weight": "model-00002'), "no tensor a.weight",
    ),
}  # fmt: skip


def test_tensors_that_the_index_names_in_vain_are_noted(tmp_path, folder):
    path = folder / INDEX
    path.write_text(path.read_text().replace("rotary.inv_freq", "rotary.freq"))
    summary = apply_to(small_recipe(), folder, tmp_path / "out")
    assert any("rotary.freq, which no file holds" in note for note in summary["notes"])


def test_of_two_sets_of_weights_the_one_that_transformers_loads_is_edited(tmp_path, folder):
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    save_file(
        {name: t + 1 if t.is_floating_point() else t for name, t in tensors.items()}, folder / "model.safetensors"
    )
    summary = apply_to(small_recipe(), folder, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(new["rotary.inv_freq"], tensors["rotary.inv_freq"] + 1)
    assert any(FIRST in note for note in summary["notes"])


def test_an_index_without_metadata_gets_it(tmp_path, folder):
    path = folder / INDEX
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]}))
    apply_to(small_recipe(), folder, tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for file in folder.glob("*.safetensors") for t in read_shard(file).tensors.values()
    )


# --- what was written is read back ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"norm_preserving": True}], ids=["plain", "norms"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_tensor_that_was_not_edited_after_all_is_found(tmp_path, monkeypatch, dtype, options, in_place):
    folder = write_checkpoint(tmp_path / "model", small_shards(dtype))
    before, edit = listing(folder), pieces._edit

    def forgetful(source, target, piece):
        change = piece.change if piece.tensor.name != "a.weight" else Change(piece.change.axis, NOTHING)
        edit(source, target, replace(piece, change=change))

    monkeypatch.setattr(pieces, "_edit", forgetful)
    out = folder if in_place else tmp_path / "out"
    with pytest.raises(WriterError, match=r"a\.weight as written is off by .* nothing was written"):
        apply_to(small_recipe(0.3), folder, out, in_place=in_place, **options)
    assert listing(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_a_damaged_index_is_found_first(tmp_path, folder, damage):
    harm, match = INDEX_DAMAGES[damage]
    path = folder / INDEX
    path.write_text(harm(path.read_text()))
    before = listing(tmp_path)
    with pytest.raises((ModelError, RecipeError), match=match):
        apply_to(small_recipe(), folder, tmp_path / "out")
    assert listing(tmp_path) == before


def test_shards_without_an_index(tmp_path, folder):
    (folder / INDEX).unlink()
    with pytest.raises(ModelError, match="get the index again"):
        apply_to(small_recipe(), folder, tmp_path / "out")


def test_a_header_of_nothing_but_noise_is_the_projects_own_error(tmp_path):
    generator = random.Random(0)
    whole = write_checkpoint(tmp_path / "model", {"model.safetensors": {"a": torch.ones(3, 4)}})
    data = (whole / "model.safetensors").read_bytes()
    broken = 0
    for _ in range(400):
        noisy = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            noisy[generator.randrange(len(data) - 48)] = generator.randrange(256)
        (whole / "model.safetensors").write_bytes(
            noisy[: generator.choice([len(data), generator.randrange(len(data))])]
        )
        try:
            shard = read_shard(whole / "model.safetensors")
        except ModelError:
            broken += 1
        else:  # what is let through tiles the file
            assert sum(t.nbytes for t in shard.tensors.values()) == shard.size - shard.data_start
    assert broken > 200


def test_a_shard_that_shrinks_while_it_is_read(tmp_path, folder, monkeypatch):
    begin = pieces.Output.begin
    monkeypatch.setattr(pieces.Output, "begin", lambda *a: (list(begin(*a)), os.truncate(folder / FIRST, 500))[0])
    with pytest.raises(ModelError, match="became shorter"):
        apply_to(small_recipe(), folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# --- a full disk, Ctrl-C ---


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("function", ["copy_range", "write_from"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_full_disk_leaves_the_source_and_nothing_else(tmp_path, folder, monkeypatch, function, in_place, after):
    real, calls = getattr(pieces, function), []

    def full(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(pieces, function, full)
    before = listing(tmp_path)
    with pytest.raises(OutputError, match="disk is full"):
        apply_to(small_recipe(), folder, folder if in_place else tmp_path / "out", in_place=in_place)
    assert listing(tmp_path) == before


def test_a_real_limit_on_what_may_be_written(tmp_path, folder):
    """The kernel itself refuses: a limit on file sizes, in a process of its own."""
    script = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from apply.checkpoints import apply_to, small_recipe\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
        "apply_to(small_recipe(), Path(sys.argv[2]), Path(sys.argv[3]))\n"
    )
    before = listing(tmp_path)
    tests = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, tests, folder, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "OutputError" in done.stderr.splitlines()[-1]
    assert "larger than" in done.stderr.splitlines()[-1]
    assert listing(tmp_path) == before


def test_too_little_room_is_said_before_the_work(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, 100))
    for out, options in ((tmp_path / "out", {}), (folder, {"in_place": True})):
        before = listing(tmp_path)
        with pytest.raises(OutputError, match="GiB free"):
            apply_to(small_recipe(), folder, out, **options)
        assert listing(tmp_path) == before


@pytest.mark.parametrize("in_place", [False, True])
def test_ctrl_c_leaves_nothing(tmp_path, folder, monkeypatch, in_place):
    class Interrupting(Silent):
        def progress(self, stage, total):
            def tick(done):
                raise KeyboardInterrupt

            return tick

    from abliterate.apply.forms import ApplyOptions, apply_recipe

    before = listing(tmp_path)
    out = folder if in_place else tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        apply_recipe(small_recipe(), str(folder), out, "checkpoint", ApplyOptions(in_place=in_place), Interrupting())
    assert listing(tmp_path) == before


# --- killed outright ---


def killed(work, at):
    """Run `work` in a forked child that is killed (-9) at its at-th change of the files; whether it came to that."""
    pid = os.fork()
    if pid == 0:
        calls = 0

        def dying(real):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls > at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        try:
            os.replace, os.fsync, os.unlink = dying(os.replace), dying(os.fsync), dying(os.unlink)
            pieces._run = dying(pieces._run)
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_killed_at_every_step_no_output_and_the_next_succeeds(tmp_path, folder):
    apply_to(small_recipe(), folder, tmp_path / "wanted")
    wanted = listing(tmp_path / "wanted")
    out, at, leftovers = tmp_path / "out", 0, 0
    while killed(lambda: apply_to(small_recipe(), folder, out), at):
        assert not out.exists()
        leftovers += any(p.name.startswith(".out.") for p in tmp_path.iterdir())
        if at % 4 == 0:
            apply_to(small_recipe(), folder, out)
            assert listing(out) == wanted
            assert {p.name for p in tmp_path.iterdir()} == {"model", "wanted", "out"}
            shutil.rmtree(out)
        at += 1
    assert at > 8
    assert leftovers == at
    assert listing(out) == wanted
    assert {p.name for p in tmp_path.iterdir()} == {"model", "wanted", "out"}


def test_killed_while_an_old_output_is_replaced(tmp_path, folder):
    out = tmp_path / "out"
    apply_to(small_recipe(0.5), folder, out)
    old = listing(out)
    at = 0
    while killed(lambda: apply_to(small_recipe(), folder, out, overwrite=True), at):
        if not out.exists():  # moved out of the way: the next run moves it back before anything else
            with pytest.raises(OutputError, match="--overwrite"):
                apply_to(small_recipe(), folder, out)
        if listing(out) != old:  # it was all done but for the clearing away
            break
        at += 1
    assert at > 8
    apply_to(small_recipe(), folder, out, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out"}
    assert weights(out) != {n: b for n, b in old.items() if n.endswith(".safetensors")}


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_killed_in_place_it_is_all_old_or_all_new_after_the_next_run(tmp_path, folder, strength):
    """At strength 0.5 an edit applied twice would show."""
    original = tmp_path / "original"
    shutil.copytree(folder, original)
    apply_to(small_recipe(strength), folder, tmp_path / "wanted")
    wanted, old = weights(tmp_path / "wanted"), weights(original)
    at, undone, ended = 0, 0, 0
    while True:
        shutil.rmtree(folder)
        shutil.copytree(original, folder)
        if not killed(lambda: apply_to(small_recipe(strength), folder, folder, in_place=True), at):
            break
        committed = interrupted(folder)
        if not committed:
            assert weights(folder) in (old, wanted)  # never some of each
        done = weights(folder) == wanted and not committed
        if done:
            break  # killed after the work, before nothing
        summary = apply_to(small_recipe(strength), folder, folder, in_place=True)
        assert bool(summary.get("recovered")) == committed
        assert weights(folder) == wanted
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
        undone, ended = undone + (not committed), ended + committed
        at += 1
    assert undone > 8
    assert ended > 3
    assert weights(folder) == wanted


def test_another_recipe_after_an_interrupted_one_is_applied_too(tmp_path, folder):
    work = lambda: apply_to(small_recipe(0.5), folder, folder, in_place=True)  # noqa: E731
    first = tmp_path / "first"
    apply_to(small_recipe(0.5), folder, first)
    at = 0
    while not interrupted(folder):
        assert killed(work, at)
        at += 1
    apply_to(small_recipe(1.0, 2), first, tmp_path / "both")
    summary = apply_to(small_recipe(1.0, 2), folder, folder, in_place=True)
    assert "recovered" not in summary
    assert weights(folder) == weights(tmp_path / "both")


def test_a_model_whose_change_was_interrupted_is_not_read(tmp_path, folder):
    at = 0
    while not interrupted(folder):
        assert killed(lambda: apply_to(small_recipe(), folder, folder, in_place=True), at)
        at += 1
    with pytest.raises(ModelError, match="interrupted"):
        apply_to(small_recipe(), folder, tmp_path / "out")


def test_a_journal_that_lies_is_not_followed(tmp_path, folder):
    (tmp_path / ".x.abliterate-new").write_text("mine")
    for text in ("{", "[]", json.dumps({"names": ["../x"], "work": {}}), json.dumps({"names": [1], "work": {}})):
        (folder / JOURNAL).write_text(text)
        before = listing(tmp_path)
        with pytest.raises(OutputError, match="can't be read"):
            apply_to(small_recipe(), folder, folder, in_place=True)
        assert listing(tmp_path) == before


def test_two_at_once_in_one_folder(folder):
    with journal.locked(folder), pytest.raises(OutputError, match="another process"):
        apply_to(small_recipe(), folder, folder, in_place=True)


def test_in_place_gives_what_a_copy_would(tmp_path, folder):
    apply_to(small_recipe(), folder, tmp_path / "out")
    kept = (folder / FIRST).stat().st_mode
    summary = apply_to(small_recipe(), folder, folder, in_place=True)
    ours, theirs = listing(folder), listing(tmp_path / "out")
    assert set(ours) == set(theirs)
    assert {n for n in ours if ours[n] != theirs[n]} == set()
    assert (folder / FIRST).stat().st_mode == kept
    assert summary["out"] == str(folder)
    open_checkpoint(folder)


def test_in_place_leaves_shards_without_edits_alone(tmp_path, folder):
    second = folder / "model-00002-of-00002.safetensors"
    was = second.stat()
    recipe = small_recipe()
    from abliterate.edit.edit import Edit

    recipe.edit = Edit.from_names({"a": 1.0}, recipe.edit.directions[0])
    apply_to(recipe, folder, folder, in_place=True)
    assert (second.stat().st_ino, second.stat().st_mtime_ns) == (was.st_ino, was.st_mtime_ns)


@pytest.mark.parametrize("out", ["elsewhere", "model/sub"])
def test_in_place_is_in_its_place(tmp_path, folder, out):
    with pytest.raises(OutputError, match="--in-place changes a local model folder"):
        apply_to(small_recipe(), folder, tmp_path / out, in_place=True)


@pytest.mark.slow
def test_kill_9_of_the_command_at_random_moments(tmp_path):
    """The real program on a model large enough to be caught in the middle of writing."""
    big = {f"model-0000{n}-of-00008.safetensors": {f"x{n}": torch.zeros(2**25, dtype=torch.uint8)} for n in range(1, 9)}
    shards = small_shards()
    big["model-00001-of-00008.safetensors"] |= {k: v for held in shards.values() for k, v in held.items()}
    folder = write_checkpoint(tmp_path / "model", big)
    save_recipe(small_recipe(), tmp_path / "recipe.safetensors")
    source = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}
    command = [
        sys.executable,
        "-m",
        "abliterate.cli",
        "apply",
        "recipe.safetensors",
        "model",
        "--out",
        "out",
        "--quiet",
    ]
    generator, caught = random.Random(0), 0
    for _ in range(12):
        process = subprocess.Popen(command, cwd=tmp_path)
        while process.poll() is None and not list(tmp_path.glob(".out.*.tmp")):
            time.sleep(0.001)
        time.sleep(generator.random() * 0.1)
        process.kill()
        killed_it = process.wait() == -signal.SIGKILL
        caught += killed_it and bool(list(tmp_path.glob(f".out.{host_tag()}-{process.pid}.tmp")))
        assert (tmp_path / "out").exists() != killed_it or not list(tmp_path.glob(".out.*"))
        assert len(list(tmp_path.glob(".out.*"))) <= 1  # each run clears away what the one before left
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if caught == 3:
            break
    assert caught >= 1
    assert {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()} == source
    succeeds("apply", tmp_path / "recipe.safetensors", folder, "--out", tmp_path / "out", "--quiet")
    assert {p.name for p in tmp_path.iterdir()} == {"model", "recipe.safetensors", "out"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*source, "README.md"}
