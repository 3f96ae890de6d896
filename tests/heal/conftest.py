"""Fixtures of the tests of healing."""

from __future__ import annotations

import pytest

from abliterate.heal.training import Job
from preference_pairs import Heard, colours, small_job, write_pairs


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", colours())


@pytest.fixture
def job(tiny_folder, pairs_file, tmp_path):
    """A function that makes a small dpo job in a folder of its own."""

    def make(name: str = "work", *, resume: bool = False, **heal) -> Job:
        return small_job(tiny_folder, pairs_file, tmp_path / name, resume=resume, **heal)

    return make
