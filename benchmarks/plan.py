"""How close `abliterate run --plan` comes to the run it predicts.

    python benchmarks/plan.py                 # writes benchmarks/results/plan.json

Plans a run of the demo model, does it, and compares stage by stage. Both in processes of their own, so that
each has its own peak of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan.json"
WITHIN = 0.3
QUIET = 0.5


def settings(arguments: argparse.Namespace) -> Any:
    from abliterate.settings.run import RunSettings

    prompts = {"target": "bundled", "baseline": "bundled", "train_prompts": arguments.train,
               "validation_prompts": 60, "test_prompts": arguments.test}  # fmt: skip
    return RunSettings.model_validate(
        {"prompts": prompts, "measure": {"max_new_tokens": arguments.tokens}, "search": {"method": arguments.method}}
    )


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    from abliterate.run.plan import plan_run

    return plan_run(arguments.model, settings(arguments)).to_json()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    import resource

    from abliterate.run.pipeline import run as run_pipeline

    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        result = run_pipeline(arguments.model, Path(folder, "out"), settings(arguments))
        took = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"stages_s": result.document["timings_s"], "total_s": took, "memory_bytes": peak}


def in_child(what: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", what, "--model", arguments.model, "--method", arguments.method]
    for name in ("train", "test", "tokens", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="folder or Hub id; the demo model")
    parser.add_argument("--method", default="fit", help="of the search (fit)")
    parser.add_argument("--train", type=int, default=256, help="training prompts a side (256)")
    parser.add_argument("--test", type=int, default=100, help="test prompts a side (100)")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer (64)")
    parser.add_argument("--threads", type=int, default=2, help="threads (2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--child", choices=("plan", "run"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        import torch

        torch.set_num_threads(arguments.threads)
        print(json.dumps({"plan": plan, "run": run}[arguments.child](arguments)))
        return
    if arguments.model is None:
        from abliterate.models.demo import demo_model

        arguments.model = str(demo_model())
    load_average = os.getloadavg()[0]
    planned, ran = in_child("plan", arguments), in_child("run", arguments)
    for stage, seconds in planned["stages_s"].items():
        real = ran["stages_s"].get(stage, 0.0)
        print(f"{stage:18}{seconds:9.1f} s planned{real:9.1f} s run")
    ratios = {key: planned[key] / ran[key] for key in ("total_s", "memory_bytes")}
    results = {
        "model": Path(arguments.model).name,
        "settings": {name: getattr(arguments, name) for name in ("method", "train", "test", "tokens", "threads")},
        "load_average_before": load_average,
        "note": "quiet machine" if load_average < QUIET else "busy machine: the neighbours changed between the two",
        "planned": planned,
        "run": ran,
        "planned_over_run": ratios,
        "machine": {"cores": os.cpu_count(), "system": platform.system()},
        "versions": {name: version(name) for name in ("abliterate", "torch", "transformers")},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"planned over run: time {ratios['total_s']:.2f}, memory {ratios['memory_bytes']:.2f}")
    if any(abs(ratio - 1) > WITHIN for ratio in ratios.values()):
        raise SystemExit(f"missed the bar: within {WITHIN:.0%}")


if __name__ == "__main__":
    main()
