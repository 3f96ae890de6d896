"""What `abliterate doctor` says."""

from __future__ import annotations

import importlib.util
import shutil
from types import SimpleNamespace

import pytest
import torch

from abliterate.commands import doctor
from abliterate.models import demo
from command import succeeds


def said(check) -> tuple[bool, str]:
    finding = check()
    return finding.ok, finding.text


def test_command_prints_a_line_per_finding():
    lines = succeeds("doctor").out.splitlines()
    assert len(lines) == len(doctor.examine())
    assert all(line.startswith(("ok  ", "no  ")) for line in lines)
    assert any(f"torch {torch.__version__}" in line for line in lines)


def test_command_as_json():
    findings = succeeds("doctor", "--json").json
    assert [set(f) for f in findings] == [{"ok", "text"}] * len(findings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA gets")
def test_no_gpu_is_no_fault():
    ok, text = said(doctor._device)
    assert ok
    assert "CPU" in text or "MPS" in text


def test_offline():
    ok, text = said(doctor._hub)
    assert not ok
    assert "bundled prompts" in text


def test_full_disk(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    ok, text = said(doctor._disk)
    assert not ok
    assert text.startswith("1 GiB of disk free")


def test_memory_says_what_it_holds(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=27 * 2**30))
    ok, text = said(doctor._memory)
    assert ok
    assert text == "27 GiB of memory: holds models of up to about 11 B parameters"


def test_missing_extras(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    ok, text = said(doctor._quantised)
    assert not ok
    assert "abliterate[quantised]" in text
    ok, text = said(doctor._demo)
    assert not ok
    assert "pip install" in text


def test_demo_model_there(monkeypatch):
    monkeypatch.setattr(demo, "plain_source", lambda: "/somewhere/model.gguf")
    assert said(doctor._demo) == (True, "demo model: there; try `abliterate demo`")
