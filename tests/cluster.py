"""A Ray cluster of two nodes on this machine: a run on it, a node that dies, then the head. Started by a test."""

from __future__ import annotations

import os
import sys
import threading

import torch
from ray.cluster_utils import Cluster

import abliterate.api  # noqa: F401
from abliterate.common.errors import AbliterateError
from abliterate.measure import measure
from abliterate.models.loading import load
from abliterate.workers.pool import Pool
from in_workers import slow
from planted import BASELINE, TARGET, RefusesWithR


def main(folder):
    torch.set_num_threads(1)
    handle = load(folder, dtype="float32")
    cluster = Cluster(initialize_head=True)
    node = cluster.add_node()
    cluster.wait_for_nodes()
    workers = Pool(None, cluster.address)
    assert workers.count == 2
    workers.replicate(handle, {"dtype": "float32", "device": None})
    before = found(handle)
    cluster.remove_node(node, allow_graceful=False)
    assert found(handle) == before
    threading.Timer(2.0, cluster.head_node.kill_gcs_server).start()
    try:
        workers.map(handle, slow, None, [60, 60], lambda _: None)
    except AbliterateError as error:
        print(error, flush=True)
        os._exit(0)  # Ray's own processes are in disorder
    raise AssertionError("the head died and nobody noticed")


def found(handle):
    measured = measure(handle, TARGET, BASELINE, judge=RefusesWithR(), max_new_tokens=4)
    return [a.ids for a in (*measured.target_answers, *measured.baseline_answers)], measured.loss


if __name__ == "__main__":
    main(sys.argv[1])
