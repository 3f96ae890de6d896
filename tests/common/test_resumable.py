"""Half-done work: written whole, and read only by the job that wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from abliterate.common.errors import OutputError
from abliterate.common.resumable import beside, key_of, read_state, write_state

KEY = key_of(["model", {"seed": 0}])


def test_a_key_is_of_what_is_in_it_and_not_of_its_order():
    assert key_of({"a": 1, "b": Path("x")}) == key_of({"b": "x", "a": 1}) != key_of({"a": 2, "b": "x"})
    assert key_of([print], as_text=lambda value: value.__name__) == key_of(["print"])


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_what_was_written_is_read(tmp_path, name):
    path = tmp_path / name
    assert read_state(path, KEY, "a run") is None
    whole = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": whole, "part": whole[:, 1:], "turned": whole.T} if name.endswith("tensors") else None
    for step in (1, 2):
        write_state(path, KEY, {"step": step, "text": "é"}, tensors)
    found = read_state(path, KEY, "a run")
    assert found is not None and found[0] == {"step": 2, "text": "é"}
    assert found[1].keys() == (tensors or {}).keys()
    assert all(torch.equal(found[1][n], t) for n, t in (tensors or {}).items())
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_another_job_s_or_damaged_file_is_refused(tmp_path, name):
    path = tmp_path / name
    write_state(path, KEY, {"step": 1}, {} if name.endswith("tensors") else None)
    with pytest.raises(OutputError, match="left by an audit with another model, prompts or settings"):
        read_state(path, key_of("other"), "an audit")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(OutputError, match="can't be read, to go on from"):
        read_state(path, KEY, "an audit")
    path.write_text(json.dumps(["no", "object"]))
    with pytest.raises(OutputError, match="can't be read, to go on from"):
        read_state(path, KEY, "an audit")


def test_a_write_that_fails_leaves_the_state_before(tmp_path):
    path = tmp_path / "state.json"
    write_state(path, KEY, {"step": 1})
    with pytest.raises(TypeError):
        write_state(path, KEY, {"step": object()})
    assert read_state(path, KEY, "a run") == ({"step": 1}, {})


def test_the_file_is_hidden_beside_the_output(tmp_path):
    assert beside(tmp_path / "out", "fit.safetensors") == tmp_path / ".out.fit.safetensors"
