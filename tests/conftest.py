"""Fixtures that all tests share. No test uses the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers or datasets
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed prints a warning among a test's output else

import ipaddress
import socket

import pytest
import torch

LONGEST = (
    "test_second_model", "test_second_guard", "test_heal_demo", "test_demo_model", "test_induce", "test_notebook",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The files that take minutes first, so that two processes (`make test`) come to their end together."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with a tiny tied Llama in float32, its tokenizer and its generation config; read only."""
    from models import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny_handle():
    """A fresh handle on the same model, in memory; a test may change it."""
    from models import handle_of, tiny_llama

    return handle_of(tiny_llama())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Only this machine can be reached: a test that needs the network fails at once and says why."""
    patch = pytest.MonkeyPatch()
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def is_local(host):
        try:
            return host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def guarded_connect(self, address, *rest):
        if self.family != socket.AF_UNIX and not is_local(address[0]):
            raise OSError(f"a test tried to reach {address[0]}: tests don't use the network")
        return connect(self, address, *rest)

    def guarded_look_up(host, *rest, **options):
        if not is_local(host.decode() if isinstance(host, bytes) else host):
            raise socket.gaierror(f"a test tried to reach {host}: tests don't use the network")
        return look_up(host, *rest, **options)

    patch.setattr(socket.socket, "connect", guarded_connect)
    patch.setattr(socket, "getaddrinfo", guarded_look_up)
    yield
    patch.undo()
