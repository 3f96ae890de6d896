"""Peaks of memory on the CPU, as torch's profiler sees its allocator."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile


def peak_of(work):
    """The most bytes that were allocated at once while `work` ran, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
