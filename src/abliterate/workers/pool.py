"""Workers: actors of Ray, each with a replica of the model, on which `models.replicas` runs what stages give it.

Ray starts them, places them on a cluster's machines and cards, starts one again that died and gives it its shard again.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from abliterate.common.errors import AbliterateError, shorten
from abliterate.common.version import __version__
from abliterate.edit.edit import Edit
from abliterate.models.handle import Handle
from abliterate.models.loading import DTYPES, load

RESTARTS = 4  # of a worker; one that dies more often dies of what it is given
UNREACHED = 20  # times that a worker may be out of reach in one stage
LOOK_EVERY = 5.0  # seconds of waiting after which the cluster is asked whether it is still there
# What stages change of a handle.
SENT = ("system_prompt", "chat_template", "prefill", "thinks", "marks", "switches", "before")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class Pool:
    """The workers of one model; those of `models.replicas.Workers`.

    Args:
        count: how many; on a cluster, by default one for each card, or for each machine where there are none.
        address: HOST:PORT of a Ray cluster that this machine belongs to; None for processes of this machine alone.

    Raises:
        AbliterateError: when Ray isn't installed, or no cluster answers there.
    """

    def __init__(self, count: int | None, address: str | None) -> None:
        self.ray, self.address = _started(count, address), address
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        cards = [int(node.get("GPU", 0)) for node in nodes]
        self.count = count or sum(cards) or len(nodes)
        self.cards = cards_each(cards, self.count)
        cores = sum(node.get("CPU", 1) for node in nodes) if address else torch.get_num_threads()
        self.threads = max(1, int(cores) // self.count)
        self.common: tuple[Any, Any] = (None, None)

    def replicate(self, handle: Handle, options: dict[str, Any]) -> None:
        """Load the handle's model on every worker, as it was loaded here, and have them run the handle's stages.

        Raises:
            AbliterateError: when a worker can't load it, or has other versions of what matters.
        """
        device = options["device"]
        options = {**options, "device": device and device.partition(":")[0]}  # Ray gives each worker its own cards
        name = str(handle.dtype).removeprefix("torch.")
        if name in DTYPES and not handle.quantised:
            options["dtype"] = name
        # no cores of its own: one that is lost with its machine must find a place on those that are left
        actor = self.ray.remote(Replica).options(
            num_cpus=0,
            num_gpus=self.cards,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            scheduling_strategy="SPREAD",
        )
        self.actors = [actor.remote(handle.source, options, self.threads) for _ in range(self.count)]
        check_versions(self._results([one.versions.remote() for one in self.actors]))
        self._results([one.load.remote() for one in self.actors])
        handle.workers = self

    def map(
        self, handle: Handle, function: Callable[..., Any], common: Any, calls: Sequence[Any],
        tick: Callable[[int], None],
    ) -> list[Any]:  # fmt: skip
        """As `models.replicas.Workers` says; an error in a worker is raised here as itself."""
        if self.common[1] is None or self.common[0] is not common:
            self.common = common, self.ray.put(common)
        state = {name: getattr(handle, name) for name in SENT}
        sent = function, [self.common[1]], state, list(handle.edits)
        waiting, idle = deque(enumerate(calls)), list(self.actors)
        running: dict[Any, tuple[int, Any, Any]] = {}
        found: dict[int, Any] = {}
        unreached = 0
        while waiting or running:
            while waiting and idle:
                place, call = waiting.popleft()
                actor = idle.pop(0)
                running[actor.run.remote(*sent, call)] = place, call, actor
            ref = self._first(list(running))
            place, call, actor = running.pop(ref)
            idle.append(actor)
            try:
                found[place] = self._result(ref)
            except self.ray.exceptions.ActorUnavailableError as error:  # its machine is gone, which Ray sees only later
                unreached += 1
                if unreached > UNREACHED:
                    raise self._lost(error) from error
                waiting.append((place, call))
                time.sleep(LOOK_EVERY)
                continue
            tick(place)
        return [found[place] for place in range(len(calls))]

    def _results(self, refs: Sequence[Any]) -> list[Any]:
        for count in range(len(refs)):
            self._first(refs[count:])
        return [self._result(ref) for ref in refs]

    def _first(self, refs: Sequence[Any]) -> Any:
        """The first of some results that is there."""
        while True:
            done, _ = self.ray.wait(list(refs), timeout=LOOK_EVERY)
            if done:
                return done[0]
            if self.address and not _answers(self.address):
                raise AbliterateError(
                    f"the Ray cluster at {self.address} doesn't answer any more; once it is up again, --resume goes on "
                    "with an interrupted run"
                )

    def _result(self, ref: Any) -> Any:
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.ActorUnavailableError:
            raise
        except self.ray.exceptions.RayError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> AbliterateError:
        return AbliterateError(
            f"a worker was lost {RESTARTS + 1} times, or Ray itself: {shorten(str(error), 200)}; --resume goes on "
            "with an interrupted run"
        )


class Replica:
    """What an actor is made of: the model, loaded when it is first asked for, so also after it was started again.

    Args:
        source, options: as for `models.loading.load`.
        threads: that it computes with.
    """

    def __init__(self, source: str, options: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self.source, self.options = source, options
        self.key, self.common = "", None

    @cached_property
    def handle(self) -> Handle:
        return load(self.source, **self.options)

    def versions(self) -> dict[str, str]:
        return versions()

    def load(self) -> int:
        return self.handle.layers

    def run(
        self,
        function: Callable[..., Any],
        common: Sequence[Any],
        state: dict[str, Any],
        edits: Sequence[Edit],
        call: Any,
    ) -> Any:
        """See `models.replicas.Workers.map`; `common` holds the reference to what calls have in common."""
        import ray

        from abliterate.apply.hooks import attached

        if self.key != common[0].hex():
            self.key, self.common = common[0].hex(), ray.get(common[0])
        for name, value in state.items():
            setattr(self.handle, name, value)
        with ExitStack() as live:
            for edit in edits:
                live.enter_context(attached(self.handle, edit))
            return function(self.handle, self.common, call)


def versions() -> dict[str, str]:
    """What workers must have the same version of."""
    from importlib.metadata import version

    return {"abliterate": __version__} | {name: version(name) for name in ("torch", "transformers")}


def check_versions(workers: Sequence[dict[str, str]]) -> None:
    """Raise AbliterateError when a worker has another version of something than this process."""
    for found in workers:
        for name, own in versions().items():
            if found[name] != own:
                raise AbliterateError(
                    f"a worker has {name} {found[name]} and this process {own}; install the same on every machine of "
                    "the cluster"
                )


def cards_each(nodes: Sequence[int], workers: int) -> float:
    """Cards for each worker, given how many each machine has: as many whole ones as all workers can have, else a share.

    Example:
        >>> cards_each([8, 8], 4), cards_each([2], 4), cards_each([0], 2)
        (4, 0.5, 0)
    """
    for each in range(max(nodes, default=0), 0, -1):
        if sum(cards // each for cards in nodes) >= workers:
            return each
    return 1 / -(-workers // sum(nodes)) if sum(nodes) else 0


def _started(count: int | None, address: str | None) -> Any:
    """Ray, connected to a cluster or started here, silent."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if address and not _answers(address):
        raise AbliterateError(
            f"no Ray cluster answers at {address}; --ray is HOST:PORT of one that this machine belongs to: "
            "ray start --head there, ray start --address HOST:PORT here"
        )
    if address and (any(map(os.environ.get, TOKENS)) or (Path.home() / ".ray" / "auth_token").is_file()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # `ray start` asks for a token where there is one
    try:
        import ray
    except ImportError as error:
        raise AbliterateError("--workers and --ray need Ray: pip install 'abliterate[ray]'") from error
    # "local": not the cluster that the environment or an earlier session names
    here: dict[str, Any] = {"address": "local", "num_cpus": count, "include_dashboard": False}
    try:
        if not ray.is_initialized():
            ray.init(**({"address": address} if address else here), log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # of many kinds, none of them Ray's own
        raise AbliterateError(f"Ray can't be started: {shorten(str(error), 300)}") from error
    # that a worker died and is started again: Ray prints it among our results, whatever it is told of logs
    ray._private.worker.print_to_stdstream = lambda *_args, **_named: None
    return ray


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=LOOK_EVERY).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True
