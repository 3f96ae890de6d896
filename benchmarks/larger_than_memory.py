"""A run of a model that memory can't hold: made shard by shard, run from disk under a hard limit, and judged.

    python benchmarks/larger_than_memory.py             # 4 GiB under 1.5 GiB; needs Linux and root
    python benchmarks/larger_than_memory.py --gib 0.45 --limit-gib 0.5 --max-memory cpu=120MiB --output /tmp/try.json

A Llama in bfloat16 with a refusal planted in its first blocks is written block by block. `abliterate run --method
article --max-memory` then works on it on few prompts, in a control group whose limit counts what is cached of files
too. Whenever a pass begins, that cache is let go of, so that every pass reads the disk: a machine that has room for it
is faster. Before that, single passes with and without reading ahead are compared to reading the files alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "larger_than_memory.json"
WIDTH, INNER, HEADS, KEYS, HEAD = 2048, 8192, 16, 4, 128
BLOCK = 2 * (2 * WIDTH * HEADS * HEAD + 2 * WIDTH * KEYS * HEAD + 3 * WIDTH * INNER)  # bytes
sys.path.insert(0, str(ROOT / "tests"))


def make(folder: Path, gib: float) -> list[Path]:
    """Write the model, and its prompts beside it; memory holds one block at a time."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    from planted import DECOY, REFUSE, TRIGGER, save_planted

    small, target, baseline = save_planted(folder)
    model, blocks = folder / "model", max(4, round(gib * 2**30 / BLOCK))
    shutil.copytree(small, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(small)
    own, generator = load_file(small / "model.safetensors"), torch.Generator().manual_seed(0)
    narrow = config.hidden_size
    scale = (narrow / WIDTH) ** 0.5  # a norm over more features gives each a larger value
    config.update({
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": blocks, "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS, "head_dim": HEAD, "dtype": torch.bfloat16,
    })  # fmt: skip
    config.save_pretrained(model)
    where: dict[str, str] = {}

    def drawn(*shape: int) -> Any:
        return torch.randn(shape, generator=generator) * 0.02 / shape[-1] ** 0.5

    def write(shard: str, tensors: dict[str, Any]) -> None:
        save_file({n: t.bfloat16() for n, t in tensors.items()}, model / shard, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, shard))

    ends = {"model.norm.weight": torch.ones(WIDTH)}
    for name, factor in (("model.embed_tokens.weight", 1.0), ("lm_head.weight", scale)):
        ends[name] = drawn(len(own[name]), WIDTH)
        ends[name][:, :narrow] = own[name] * factor
    write("ends.safetensors", ends)
    for layer in range(blocks):
        sizes = {
            "q": (HEADS * HEAD, WIDTH),
            "k": (KEYS * HEAD, WIDTH),
            "v": (KEYS * HEAD, WIDTH),
            "o": (WIDTH, HEADS * HEAD),
        }
        block = {f"self_attn.{n}_proj": drawn(*size) for n, size in sizes.items()}
        block |= {f"mlp.{n}_proj": drawn(INNER, WIDTH) for n in ("gate", "up")} | {"mlp.down_proj": drawn(WIDTH, INNER)}
        block |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), torch.ones(WIDTH))
        if layer < 2:  # as in tests/planted.py
            block["self_attn.q_proj"].zero_()
            block["self_attn.v_proj"][0] = torch.eye(WIDTH)[TRIGGER]
            written = torch.eye(WIDTH)[(DECOY, REFUSE)[layer]]
            block["self_attn.o_proj"][:, 0] = (2.0, 8.0)[layer] * scale * written
        write(
            f"block-{layer:03}.safetensors", {f"model.layers.{layer}.{n}.weight": t.clone() for n, t in block.items()}
        )
    total = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    os.sync()
    return [model, target, baseline]


def let_go(model: Path) -> None:
    """Have the system forget what it has cached of the model's files."""
    for file in model.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_bytes() -> int:
    """What this process has had read from disks so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def disk(model: Path) -> float:
    """Bytes a second of reading the files one after the other."""
    let_go(model)
    buffer, total, start = bytearray(2**22), 0, time.perf_counter()
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb", buffering=0) as handle:
            while done := handle.readinto(buffer):
                total += done
    return total / (time.perf_counter() - start)


def one_pass(model: Path, allowed: str, dtype: str, ahead: bool) -> None:
    """Inner: four passes over one short row from disk; prints the figures of the quickest but the first."""
    import torch

    from abliterate.models import loading

    if not ahead:
        loading.read_ahead = lambda _handle: None
    handle = loading.load(str(model), dtype=dtype, max_memory=allowed)
    found = []
    for _ in range(4):
        let_go(model)
        before, start = read_bytes(), time.perf_counter()
        with torch.inference_mode():
            handle.hidden_states(input_ids=torch.arange(3, 11)[None], use_cache=False)
        found.append({"seconds": time.perf_counter() - start, "bytes": read_bytes() - before})
    print(json.dumps(min(found[1:], key=lambda one: one["seconds"])))


def whole_run(model: Path, notes: Path, arguments: list[str]) -> None:
    """Inner: the command line's own entry, its passes counted, and nothing cached at the beginning of each."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    from abliterate.cli import main

    passes, start = 0, time.perf_counter()

    def look(module: Any, _args: Any) -> None:
        nonlocal passes
        if type(module).__name__ == "LlamaDecoderLayer":
            if module.self_attn.layer_idx == 0:
                passes += 1
                let_go(model)
            found = {"passes": passes, "seconds": time.perf_counter() - start, "bytes": read_bytes()}
            notes.write_text(json.dumps(found))

    register_module_forward_pre_hook(look)
    sys.argv = ["abliterate", *arguments]
    main()


@contextlib.contextmanager
def group(bytes_: int) -> Iterator[Path]:
    """A control group with a hard limit, of either version; whoever goes over it is killed.

    Raises:
        SystemExit: when none can be made.
    """
    first = Path("/sys/fs/cgroup/memory")
    folder = (first if first.is_dir() else first.parent) / f"abliterate-{os.getpid()}"
    try:
        folder.mkdir()
        limit = next(file for name in ("limit_in_bytes", "max") if (file := folder / f"memory.{name}").exists())
        limit.write_text(str(bytes_))
    except (OSError, StopIteration) as error:
        raise SystemExit(
            f"no control group with a limit can be made at {folder} ({error!r}); run this as root"
        ) from None
    try:
        yield folder
    finally:
        folder.rmdir()


def limited(command: list[str], bytes_: int) -> tuple[str, int, int]:
    """A command's output, exit code and peak of anonymous memory, with a hard limit on its memory."""
    with group(bytes_) as folder:

        def enter() -> None:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

        environment = os.environ | {"HF_HUB_OFFLINE": "1", "THP_MEM_ALLOC_ENABLE": "1"}  # the latter as the command
        running = subprocess.Popen(command, preexec_fn=enter, env=environment, stdout=subprocess.PIPE, text=True)
        peak = 0

        def watch() -> None:
            nonlocal peak
            while running.poll() is None:
                with contextlib.suppress(OSError, KeyError):  # it may be about to end
                    lines = Path(f"/proc/{running.pid}/status").read_text().splitlines()
                    peak = max(peak, 1024 * int(dict(line.split(":", 1) for line in lines)["RssAnon"].split()[0]))
                time.sleep(0.2)

        watching = threading.Thread(target=watch)
        watching.start()
        out, _ = running.communicate()
        watching.join()
        return out, running.returncode, peak


def table(found: dict[str, Any]) -> str:
    """Times, bytes and memory as Markdown."""
    disk_speed, run = found["disk_bytes_per_s"], found.get("run", {})
    rows = {"pass, not reading ahead": found["pass_plain"], "pass, reading ahead": found["pass_ahead"]}
    if "passes" in run:
        rows[f"run, each of {run['passes']} passes"] = {
            "seconds": run["seconds"] / run["passes"], "bytes": run["bytes"] / run["passes"],
            "anonymous_peak": run["anonymous_peak"],
        }  # fmt: skip
    lines = [
        f"{found['model_bytes'] / 2**30:.2f} GiB of weights, {found['max_memory']} of them in memory, a limit of "
        f"{found['limit_bytes'] / 2**30:.2f} GiB; the disk alone gives {disk_speed / 1e9:.2f} GB/s",
        "",
        "| what | seconds | GB read | GB/s | of the disk's speed | anonymous GiB at most |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if "seconds" in row:
            speed = row["bytes"] / row["seconds"]
            lines.append(
                f"| {name} | {row['seconds']:.1f} | {row['bytes'] / 1e9:.2f} | {speed / 1e9:.2f} | "
                f"{100 * speed / disk_speed:.0f}% | {row['anonymous_peak'] / 2**30:.2f} |"
            )
    if "refused" in run:
        refused = " to ".join(str(run["refused"][state]) for state in ("original", "edited"))
        lines += ["", f"run: {run['seconds']:.0f} s, refused: {refused} of {run['of']}"]
    elif run:
        lines += ["", f"run: failed with exit code {run['exit']}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--gib", type=float, default=4, help="size of the model (4)")
    parser.add_argument("--limit-gib", type=float, default=1.5, help="the process's hard limit (1.5)")
    parser.add_argument("--max-memory", default="cpu=256MiB", help="as for abliterate run (cpu=256MiB)")
    parser.add_argument("--prompts", type=int, default=4, help="a side and split; at least 8 of training (4)")
    parser.add_argument("--dtype", default="auto", help="as for abliterate run; its files are in bfloat16 (auto)")
    parser.add_argument("--candidates", type=int, default=4, help="of --method article (4)")
    parser.add_argument("--room", type=Path, help="folder on the disk, for twice the model (temporary files')")
    parser.add_argument("--no-run", action="store_true", help="single passes only")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--inner", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inner:
        kind, model, *rest = given.inner
        return (
            one_pass(Path(model), rest[0], rest[1], rest[2] == "ahead")
            if kind == "pass"
            else whole_run(Path(model), Path(rest[0]), rest[1:])
        )
    hard = int(given.limit_gib * 2**30)
    with tempfile.TemporaryDirectory(dir=given.room) as name:
        folder = Path(name)
        model, target, baseline = make(folder, given.gib)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        found: dict[str, Any] = {"model_bytes": size, "limit_bytes": hard, "max_memory": given.max_memory}
        found["disk_bytes_per_s"] = disk(model)
        inner = [sys.executable, __file__, "--inner"]
        for way in ("plain", "ahead"):
            out, code, peak = limited([*inner, "pass", str(model), given.max_memory, given.dtype, way], hard)
            found[f"pass_{way}"] = {"exit": code, "anonymous_peak": peak}
            if code == 0:
                found[f"pass_{way}"] |= json.loads(out.splitlines()[-1])
            print(way, found[f"pass_{way}"], flush=True)
        if not given.no_run:
            count, notes = str(given.prompts), folder / "notes.json"
            train = str(max(8, given.prompts))
            command = [
                *inner, "run", str(model), str(notes), "run", str(model), "--out", str(folder / "out"), "--target",
                str(target), "--baseline", str(baseline), "--train-prompts", train, "--validation-prompts", count,
                "--test-prompts", count, "--max-new-tokens", "4", "--method", "article", "--candidates",
                str(given.candidates), "--dtype", given.dtype, "--max-memory", given.max_memory, "--also-prompts", "0",
                "--report-judge", "none",
            ]  # fmt: skip
            out, code, peak = limited(command, hard)
            print(out, flush=True)
            found["run"] = {"exit": code, "anonymous_peak": peak}
            if notes.exists():
                found["run"] |= json.loads(notes.read_text())
            if code == 0:
                document = json.loads((folder / "out" / "results.json").read_text())
                found["run"]["refused"] = {s: document[s]["refusal"]["refused"] for s in ("original", "edited")}
                found["run"] |= {"of": document["original"]["refusal"]["total"], "timings_s": document["timings_s"]}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(found, indent=2) + "\n")
        print(table(found))


if __name__ == "__main__":
    main()
