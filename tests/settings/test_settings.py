"""Settings: TOML, then the environment, then flags."""

from __future__ import annotations

import pytest

from abliterate.common.errors import AbliterateError
from abliterate.settings.run import RunSettings, layer_range, resolve


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "abliterate.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_nothing_given_gives_the_defaults():
    assert resolve({}, environment={}) == RunSettings()


def test_the_environment_wins_over_the_file_and_flags_over_both(toml):
    path = toml("seed = 1\n[measure]\nmax_new_tokens = 10\nbatch_size = 11\njudge = 'file'\n")
    environment = {"ABLITERATE_MEASURE__MAX_NEW_TOKENS": "20", "ABLITERATE_MEASURE__BATCH_SIZE": "21"}
    got = resolve({"measure.max_new_tokens": 30}, path, environment)
    assert (got.measure.max_new_tokens, got.measure.batch_size, got.measure.judge, got.seed) == (30, 21, "file", 1)


def test_a_flag_not_given_leaves_the_rest_alone(toml):
    got = resolve({"seed": None, "search.layers": None}, toml("seed = 4\n[search]\nlayers = '2-5'\n"), {})
    assert (got.seed, got.search.layers) == (4, "2-5")


def test_the_environments_texts_become_numbers_and_truths():
    environment = {
        "ABLITERATE_SEED": "7",
        "ABLITERATE_SEARCH__MAX_REFUSAL_RATE": "0.2",
        "ABLITERATE_LOAD__TRUST_REMOTE_CODE": "true",
        "HOME": "/root",
        "ABLITERATE_SOMETHING_ELSE": "1",
    }
    got = resolve({}, environment=environment)
    assert (got.seed, got.search.max_refusal_rate, got.load.trust_remote_code) == (7, 0.2, True)


def test_the_environment_is_read_by_default(monkeypatch):
    monkeypatch.setenv("ABLITERATE_SEED", "9")
    assert resolve({}).seed == 9


@pytest.mark.parametrize(
    ("flags", "text", "environment", "name"),
    [
        ({}, "sed = 1\n", {}, "sed"),
        ({}, "[measure]\nmax_tokens = 3\n", {}, "measure.max_tokens"),
        ({}, "[measures]\nbatch_size = 3\n", {}, "measures"),
        ({"load.dtyp": "float32"}, "", {}, "load.dtyp"),
        ({}, "", {"ABLITERATE_MEASURE__NOPE": "1"}, "measure.nope"),
        ({"measure.batch_size": 0}, "", {}, "measure.batch_size = 0"),
        ({}, "[load]\ndtype = 'int8'\n", {}, "load.dtype = 'int8'"),
        ({}, "", {"ABLITERATE_SEED": "many"}, "seed = 'many'"),
        ({"search.layers": "9-2"}, "", {}, "search.layers = '9-2'"),
        ({"search.max_refusal_rate": 1.5}, "", {}, "search.max_refusal_rate = 1.5"),
        ({"measure.batch_size": 4}, "measure = 3\n", {}, "measure = 3 should be a table"),
    ],
)
def test_what_cannot_be_is_named(toml, flags, text, environment, name):
    with pytest.raises(AbliterateError) as caught:
        resolve(flags, toml(text), environment)
    assert f"setting {name}" in str(caught.value)


def test_files_that_are_missing_or_no_toml(toml, tmp_path):
    with pytest.raises(AbliterateError, match="not found"):
        resolve({}, tmp_path / "none.toml", {})
    with pytest.raises(AbliterateError, match="not valid TOML"):
        resolve({}, toml("seed = = 1"), {})
    path = toml("")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(AbliterateError, match="not valid TOML"):
        resolve({}, path, {})


def test_resolving_leaves_no_trace(toml):
    path = toml("[measure]\nbatch_size = 3\n")
    assert resolve({"measure.batch_size": 5}, path, {}).measure.batch_size == 5
    assert resolve({}, path, {}).measure.batch_size == 3
    assert resolve({}, environment={}) == RunSettings()


@pytest.mark.parametrize(("text", "layers"), [("4-6", [4, 5, 6]), ("7", [7]), (" 0 - 1 ", [0, 1]), ("3-3", [3])])
def test_layers_are_counted_at_both_ends(text, layers):
    assert list(layer_range(text)) == layers


@pytest.mark.parametrize("text", ["", "-3", "4-", "a-b", "1,2", "5-2", "1.5", "4--6"])
def test_layers_that_make_no_sense(text):
    with pytest.raises(ValueError, match="layers"):
        layer_range(text)
