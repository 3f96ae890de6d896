"""`abliterate audit` on a tiny model: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest

from abliterate.run.opening import judges
from abliterate.settings.audit import QUICK, AuditRunSettings
from abliterate.settings.run import resolve
from command import PROMPTS, abliterate, fails, succeeds

SMALL = [
    *PROMPTS, "--train-prompts", "8", "--validation-prompts", "8", "--test-prompts", "8", "--answer-tokens", "4",
    "--draws", "1", "--max-directions", "2", "--no-fit", "--force",
]  # fmt: skip


class SaysNo:
    """Tiny models say nothing that means anything: prompts that begin as target prompts do are refused."""

    name = "says no"

    def judge(self, prompts, answers):
        return [sum(map(ord, p)) % 5 != 0 for p in prompts]

    def settled(self, prompt, partial_answer):
        return None


@pytest.fixture
def refusing(monkeypatch):
    monkeypatch.setattr(sys.modules[judges.__module__], "make_judge", lambda name: SaysNo())


def test_help_and_what_is_missing(tmp_path):
    assert "--quick" in abliterate("audit", "--help").out
    assert abliterate("audit", "x").code == 2  # --out


@pytest.mark.slow
def test_a_table_and_the_files(refusing, tiny_folder, tmp_path):
    done = succeeds("audit", tiny_folder, "--out", tmp_path / "out", *SMALL, "--log-file", tmp_path / "log")
    assert "how strongly the guard resists" in done.out and "prompts a side" in done.out
    assert str(tmp_path / "out" / "audit.md") in done.out.replace("\n", "")
    assert "stage layers" in done.err and "stage layers" in (tmp_path / "log").read_text()
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert document["schema"] == 1 and document["frontier"] == {"points": []}
    assert len(document["layers"]["each"]) == document["model"]["layers"]
    again = succeeds("audit", tiny_folder, "--out", tmp_path / "out", *SMALL, "--overwrite", "--quiet", "--json")
    assert again.err == "" and again.json["summary"] == document["summary"]


def test_an_output_that_is_there_is_kept(tiny_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    line = fails(tmp_path, "audit", tiny_folder, "--out", tmp_path / "out", *SMALL)
    assert "--overwrite" in line


def test_a_setting_out_of_range_is_named(tiny_folder, tmp_path):
    line = fails(tmp_path, "audit", tiny_folder, "--out", tmp_path / "out", *SMALL, "--draws", "0")
    assert "audit.draws" in line


def test_quick_is_less_and_flags_win():
    plain, quick = (resolve(flags, environment={}, kind=AuditRunSettings) for flags in ({}, QUICK))
    assert plain.prompts.test_prompts == 100 and quick.prompts.test_prompts == 50
    assert quick.audit.steps < plain.audit.steps and len(quick.audit.counts) < len(plain.audit.counts)
    own = resolve({**QUICK, "audit.steps": 30}, environment={}, kind=AuditRunSettings)
    assert own.audit.steps == 30
