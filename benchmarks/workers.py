"""Two one-thread workers against one: collecting and measuring 512 prompts of the demo model, in one run.

    python benchmarks/workers.py                # writes benchmarks/results/workers.json

Both take turns in one process; the answers must be the same and the means equal. The bar: 1.6 times as fast.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "workers.json"
BAR = 1.6
QUIET = 0.5


def once(handle: Any, target: list[str], baseline: list[str], tokens: int) -> tuple[Any, Any]:
    """The mean stream on targets, and the answers."""
    from abliterate.directions.activations import collect
    from abliterate.measure import measure

    acts = collect(handle, target, baseline)
    found = measure(handle, target, baseline, max_new_tokens=tokens)
    return acts.target.mean, [a.ids for a in (*found.target_answers, *found.baseline_answers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--prompts", type=int, default=512, help="prompts of both sides together (512)")
    parser.add_argument("--tokens", type=int, default=16, help="longest answer (16)")
    parser.add_argument("--repeats", type=int, default=2, help="turns; medians are given (2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    arguments = parser.parse_args()
    import torch

    import abliterate
    from abliterate.prompts.sets import load_sides
    from abliterate.workers.pool import Pool

    torch.set_num_threads(1)
    load_average = os.getloadavg()[0]
    options = {"dtype": "float32", "device": "cpu"}
    handle = abliterate.load(str(abliterate.demo_model()), **options)
    sides = load_sides("bundled", "bundled", limit_train=arguments.prompts // 2)
    target, baseline = list(sides.target.train.texts), list(sides.baseline.train.texts)
    pools = {}
    for count in (1, 2):
        pools[count] = Pool(count, None)
        pools[count].threads = 1
        pools[count].replicate(handle, options)
        once(handle, target[:8], baseline[:8], 2)  # what is done once per process
    runs: dict[int, list[float]] = {1: [], 2: []}
    found = {}
    for _ in range(arguments.repeats):
        for count, pool in pools.items():
            handle.workers = pool
            start = time.perf_counter()
            found[count] = once(handle, target, baseline, arguments.tokens)
            runs[count].append(time.perf_counter() - start)
            print(f"{count} workers: {runs[count][-1]:.1f} s", flush=True)
    ratios = [one / two for one, two in zip(*runs.values(), strict=True)]
    results = {
        "model": Path(handle.source).name,
        "prompts": len(target) + len(baseline),
        "max_new_tokens": arguments.tokens,
        "seconds": {f"{count} workers of one thread": times for count, times in runs.items()},
        "times_as_fast": statistics.median(ratios),
        "times_as_fast_by_turn": ratios,
        "bar": BAR,
        "same_answers": found[1][1] == found[2][1],
        "same_means": torch.equal(found[1][0].nan_to_num(), found[2][0].nan_to_num()),
        "load_average_before": load_average,
        "note": "quiet machine" if load_average < QUIET else "other work ran on the cores meanwhile: a lower bound",
        "machine": {"cores": os.cpu_count(), "system": platform.system()},
        "versions": {name: version(name) for name in ("abliterate", "torch", "ray")},
    }
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{results['times_as_fast']:.2f} times as fast with two workers")
    if not (results["same_answers"] and results["same_means"]):
        raise SystemExit("the results differ")
    if results["times_as_fast"] < BAR:
        raise SystemExit(f"missed the bar: {BAR:g} times as fast")


if __name__ == "__main__":
    main()
