"""Time and memory of `abliterate apply --as checkpoint` against `cp -r` of the same checkpoint.

    python benchmarks/apply_checkpoint.py       # writes benchmarks/results/apply_checkpoint.json; 9 GB of disk

A synthetic Llama of 4 GiB in 8 shards (the shapes of an 8B's blocks) is copied and edited in turn, each as often as
`--rounds` says, and each is first in every other round. Before every run, of the one as of the other: what the run
before wrote is removed and the disk synced; the source is read, so that it lies in memory (with `--cold` it is dropped
from there instead); and as much memory as will be written is touched and let go again. The last is for virtual
machines whose host takes free pages back: whoever writes first then waits for the host, four times as long as the
copying takes, and which of the two that is would be chance. With pages at hand `cp` is at its fastest, so this is the
strict way to compare. Both write to the page cache and sync nothing. The time of apply is that of its whole process,
interpreter and imports included; its memory is the process's peak, as the kernel counts it. The ratio is that of the
median times; the ratio of each round's two neighbours is in the result too, and the median of these has to meet the
bar as well.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results" / "apply_checkpoint.json"
TIME_BAR = 1.8
MEMORY_BAR_TENSORS, MEMORY_BAR_MB = 3, 400
LAYERS, SHARDS = 8, 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": LAYERS,
    "vocab_size": 49152, "tie_word_embeddings": False, "max_position_embeddings": 8192, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


class Run(NamedTuple):
    """One process: wall-clock and CPU seconds, and its peak resident memory in bytes."""

    seconds: float
    cpu: float
    peak: int


def tensors() -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order in which they are saved."""
    d, ff, kv, vocabulary = 4096, 14336, 1024, CONFIG["vocab_size"]
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocabulary, d))]  # type: ignore[list-item]
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        found += [
            (f"{block}.input_layernorm.weight", (d,)), (f"{block}.mlp.down_proj.weight", (d, ff)),
            (f"{block}.mlp.gate_proj.weight", (ff, d)), (f"{block}.mlp.up_proj.weight", (ff, d)),
            (f"{block}.post_attention_layernorm.weight", (d,)), (f"{block}.self_attn.k_proj.weight", (kv, d)),
            (f"{block}.self_attn.o_proj.weight", (d, d)), (f"{block}.self_attn.q_proj.weight", (d, d)),
            (f"{block}.self_attn.v_proj.weight", (kv, d)),
        ]  # fmt: skip
    return [*found, ("model.norm.weight", (d,)), ("lm_head.weight", (vocabulary, d))]  # type: ignore[list-item]


def build(folder: Path) -> None:
    """Write the checkpoint, random and finite, and a recipe for it (in a child: the parent must stay small)."""
    import torch

    from abliterate.edit.edit import Edit
    from abliterate.edit.recipe import save_recipe
    from abliterate.models.recipes import recipe_for

    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(CONFIG, indent=2))
    values = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    noise = memoryview(values.view(torch.uint8).numpy())
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in tensors()}
    total, shards, at = sum(sizes.values()), [[] for _ in range(SHARDS)], 0
    for name, shape in tensors():
        shards[min(SHARDS - 1, at * SHARDS // total)].append((name, shape))
        at += sizes[name]
    weight_map = {}
    for number, held in enumerate(shards, 1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in held:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (model / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, _ in held:
                for low in range(0, sizes[name], len(noise)):
                    out.write(noise[: min(len(noise), sizes[name] - low)])
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    writers = ["model.embed_tokens.weight"] + [
        f"model.layers.{layer}.{module}.weight"
        for layer in range(LAYERS)
        for module in ("self_attn.o_proj", "mlp.down_proj")
    ]
    direction = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    save_recipe(recipe_for(Edit.uniform(writers, direction), model), folder / "recipe.safetensors")


def check(folder: Path) -> None:
    """Fail unless the output holds the edit and, elsewhere, the model's very bytes."""
    import torch
    from safetensors import safe_open

    from abliterate.edit.recipe import load_recipe

    recipe = load_recipe(folder / "recipe.safetensors")
    r = recipe.edit.directions[0]
    for file in sorted((folder / "model").glob("*.safetensors")):
        with safe_open(file, "pt") as before, safe_open(folder / "edited" / file.name, "pt") as after:
            for name in before.keys():  # noqa: SIM118 (not a dict)
                old, new = before.get_tensor(name), after.get_tensor(name)
                if name not in recipe.edit.writers:
                    assert torch.equal(old, new), name
                    continue
                part = new[:2048].float() @ r if "embed" in name else r @ new[:, :2048].float()
                was = old[:2048].float() @ r if "embed" in name else r @ old[:, :2048].float()
                assert part.norm() < 0.01 * was.norm(), name


def settle(folder: Path, outputs: Iterable[Path], size: int, cold: bool) -> None:
    """Bring the machine into the state in which every run starts, whichever it is (see above)."""
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
    os.sync()
    buffer = bytearray(2**24)
    for file in sorted((folder / "model").iterdir()):
        with file.open("rb", buffering=0) as source:
            if cold:
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while source.readinto(buffer):
                    pass
    child("touch", size)


def touch(size: int) -> None:
    """Write to every page of this much memory; it is let go when the process ends."""
    with mmap.mmap(-1, size) as pages:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        pages[:: mmap.PAGESIZE] = b"x" * len(range(0, size, mmap.PAGESIZE))


def timed(command: list[str]) -> Run:
    """Run a process; its peak memory is the kernel's count, which starts at this process's own size."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def compare(folder: Path, size: int, rounds: int, cold: bool) -> dict[str, Any]:
    """Copy and edit in turn; the numbers of each. What was edited last is left."""
    copy, edited = folder / "copy", folder / "edited"
    commands = {
        "cp": ["cp", "-r", str(folder / "model"), str(copy)],
        "apply": [
            sys.executable, "-m", "abliterate.cli", "apply", str(folder / "recipe.safetensors"), str(folder / "model"),
            "--out", str(edited), "--quiet", "--json",
        ],
    }  # fmt: skip
    runs: dict[str, list[Run]] = {"cp": [], "apply": []}
    loads = []
    for index in range(rounds):
        for way in ("cp", "apply") if index % 2 == 0 else ("apply", "cp"):
            settle(folder, (copy, edited), size, cold)
            loads.append(os.getloadavg()[0])
            runs[way].append(timed(commands[way]))
            print(f"{way:6} {runs[way][-1].seconds:6.2f} s, CPU {runs[way][-1].cpu:5.2f} s", file=sys.stderr)
    if not edited.exists():
        timed(commands["apply"])  # for `check`
    medians = {way: statistics.median(run.seconds for run in found) for way, found in runs.items()}
    ratios = [ours.seconds / theirs.seconds for ours, theirs in zip(runs["apply"], runs["cp"], strict=True)]
    return {
        "source": "cold" if cold else "in memory",
        "ratio": round(medians["apply"] / medians["cp"], 3),
        "median_ratio_of_rounds": round(statistics.median(ratios), 3),
        "ratio_of_rounds": [round(ratio, 3) for ratio in ratios],
        "seconds": {way: [round(run.seconds, 2) for run in found] for way, found in runs.items()},
        "cpu_seconds": {way: [round(run.cpu, 2) for run in found] for way, found in runs.items()},
        "median_seconds": {way: round(value, 2) for way, value in medians.items()},
        "peak_mb": round(max(run.peak for run in runs["apply"]) / 2**20, 1),
        "load_average_before_each": [round(load, 2) for load in loads],
    }


def child(step: str, what: Path | int) -> None:
    """Do a step in a process of its own: this one must stay small, and quiet."""
    subprocess.run([sys.executable, __file__, "--step", step, str(what)], check=True)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Build, compare, check, write the result, and fail when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="also with the source dropped from memory")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, what = arguments.step
        touch(int(what)) if step == "touch" else {"build": build, "check": check}[step](Path(what))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        child("build", folder)
        size = sum(file.stat().st_size for file in (folder / "model").iterdir())
        states = [False, True] if arguments.cold else [False]
        results = [compare(folder, size, arguments.rounds, cold) for cold in states]
        child("check", folder)
    largest = max(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for _, shape in tensors()) / 2**20
    bar = MEMORY_BAR_TENSORS * largest + MEMORY_BAR_MB
    document = {
        "protocol": "before each run, of either: outputs removed, disk synced, source read (or, cold, dropped from "
        "memory), as much memory touched as will be written; order alternates; times are of whole processes",
        "checkpoint": {"gib": round(size / 2**30, 2), "shards": SHARDS, "largest_tensor_mb": round(largest, 1)},
        "results": results,
        "bars": {"ratio": TIME_BAR, "peak_mb": round(bar, 1)},
        "passed": all(
            max(r["ratio"], r["median_ratio_of_rounds"]) <= TIME_BAR and r["peak_mb"] <= bar for r in results
        ),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(),
                    "numpy": version("numpy")},
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))
    if not document["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
