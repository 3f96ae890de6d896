"""What a card makes of the stages: tests, the demo, and an 8B's and a mixture's figures beside the card's own limits.

    python benchmarks/gpu.py            # on the card, at most 12 minutes; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --tiny --output /tmp/gpu.json         # the same code without one

Needs no network. Models are random, made on the device, in bfloat16: a Llama of 8B, and a mixture of 30B with 3B at
work where the card holds it. Each part runs in a process of its own and writes its figures down as they come, so one
that fails or takes too long loses nothing of the others. Shares are of what a matrix product and a copy reach on the
same card in the same run. Peers: a plain forward pass with all logits, and `generate` in batches of 32.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
PARTS = {"tests": 150, "demo": 120, "llama": 300, "mixture": 300}  # seconds at most; less as the whole time goes
LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip
MIXTURE = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
GENERATED = 32  # rows of `generate` at a time


def wait(device: str) -> None:
    """Until the device has done all that it was told."""
    import torch

    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def seconds(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """What some work takes, and what it gives."""
    wait(device)
    start = time.perf_counter()
    found = work()
    wait(device)
    return time.perf_counter() - start, found


def limits(device: str, tiny: bool) -> dict[str, float]:
    """What the card reaches: operations a second of a bfloat16 matrix product, bytes a second read and written."""
    import torch

    side, size = (512, 2**22) if tiny else (8192, 2**31)
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source = torch.zeros(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = {"matmul": 1e9, "copy": 1e9}
    for _ in range(10):
        best["matmul"] = min(best["matmul"], seconds(lambda: left @ left, device)[0])
        best["copy"] = min(best["copy"], seconds(lambda: target.copy_(source), device)[0])
    return {"flops_per_s": 2 * side**3 / best["matmul"], "bytes_per_s": 2 * size / best["copy"]}


def made(part: str, tiny: bool, device: str) -> Any:
    """A random model in bfloat16, made on the device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    kind, sizes = (LlamaConfig, LLAMA) if part == "llama" else (Qwen3MoeConfig, MIXTURE)
    config = kind(**(TINY if tiny else sizes), bos_token_id=None, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def active(model: Any) -> tuple[int, int]:
    """Weights that one token is multiplied by: in a block on average, and in the head."""
    config, total = model.config, 0
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    for name, parameter in model.model.layers.named_parameters():
        total += int(parameter.numel() * (share if ".experts." in name else 1)) if parameter.ndim > 1 else 0
    return total // config.num_hidden_layers, model.lm_head.weight.numel()


class Measured:
    """The figures of one model, each written down as soon as it is there."""

    def __init__(self, part: str, device: str, tiny: bool, room: Path) -> None:
        import torch

        self.part, self.device, self.tiny, self.room = part, device, tiny, room
        self.found: dict[str, Any] = {"stages": {}}
        self.limits = limits(device, tiny)
        self.found |= {"limits": self.limits, "card": _card(device), "torch": torch.__version__}

    def stage(self, name: str, work: Callable[[], Any], **amounts: Callable[[Any], float]) -> Any:
        """Time some work and write it down; `tokens`, `flops` and `bytes` say how much of each it was."""
        import torch

        cuda = torch.device(self.device).type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            took, found = seconds(work, self.device)
        except Exception as error:
            self.put(name, {"failed": f"{type(error).__name__}: {str(error)[:300]}"})
            return None
        row: dict[str, Any] = {"seconds": took}
        row["peak_gib"] = (torch.cuda.max_memory_allocated() if cuda else _peak()) / 2**30
        done = {key: amount(found) for key, amount in amounts.items()}
        if "tokens" in done:
            row["tokens_per_s"] = done["tokens"] / took
        if "flops" in done:
            row["share_of_matmul"] = done["flops"] / took / self.limits["flops_per_s"]
        if "bytes" in done:
            row["share_of_memory"] = done["bytes"] / took / self.limits["bytes_per_s"]
        self.put(name, row)
        return found

    def put(self, name: str, row: dict[str, Any]) -> None:
        self.found["stages"][name] = row
        (self.room / "found.json").write_text(json.dumps(self.found))
        print(f"{self.part}: {name}: {row}", flush=True)


def measure_model(part: str, device: str, tiny: bool, room: Path) -> None:
    """Every stage of a run on one random model, and its peers."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    import abliterate as ab
    from abliterate.models.handle import Handle
    from models import tiny_tokenizer

    out = Measured(part, device, tiny, room)
    count, answer, prompts = (8, 12, 8) if tiny else (256, 100, 128)
    model = out.stage("make", lambda: made(part, tiny, device))
    if model is None:
        raise SystemExit("the model can't be made")
    folder, size = room / "model", sum(p.numel() * p.element_size() for p in model.parameters())
    out.found |= {"parameters": size // 2, "active_per_token": active(model)[0] * model.config.num_hidden_layers}
    if shutil.disk_usage(room).free > 2.2 * size:
        out.stage(
            "write (not of a run)", lambda: (model.save_pretrained(folder), tiny_tokenizer().save_pretrained(folder))
        )
        del model
        if device != "cpu":
            torch.accelerator.memory.empty_cache()
        handle = out.stage("load", lambda: ab.load(str(folder), dtype="bfloat16", device=device))
    else:
        out.put("load", {"failed": "no room on the disk for the files"})
        handle = Handle(model=model, tokenizer=tiny_tokenizer(), source=part)
    if handle is None:
        raise SystemExit("the model can't be loaded")
    handle.__dict__["end_tokens"] = frozenset()  # every answer has all its tokens
    handle.model.generation_config.eos_token_id = None
    work = _Work(out, handle, count, answer, prompts)
    for stage in (work.collect, work.forward, work.fit, work.decode, work.generate, work.divergence, work.save):
        try:
            stage()
        except Exception as error:
            out.put(stage.__name__, {"failed": f"{type(error).__name__}: {str(error)[:300]}"})


class _Work:
    def __init__(self, out: Measured, handle: Any, count: int, answer: int, prompts: int) -> None:
        from abliterate.prompts.sets import load_sides

        self.out, self.handle, self.count, self.answer = out, handle, count, answer
        sides = load_sides("bundled", "bundled", limit_train=prompts, limit_test=count // 2)
        self.target, self.baseline = list(sides.target.train.texts), list(sides.baseline.train.texts)
        self.asked = handle.prompt_ids([*sides.target.test.texts, *sides.baseline.test.texts])
        self.read = handle.prompt_ids([*self.target, *self.baseline])
        self.block, self.head = active(handle.model)
        self.layers = handle.layers

    def collect(self) -> None:
        from abliterate.directions.activations import collect
        from abliterate.directions.means import difference_of_means
        from abliterate.models.writers import find_writers

        self.out.stage("find writers", lambda: find_writers(self.handle))
        tokens = sum(map(len, self.read))
        work = partial(collect, self.handle, self.target, self.baseline, positions=5)
        found = self.out.stage(
            "collect", work, tokens=lambda _: tokens, flops=lambda _: 2 * self.block * self.layers * tokens
        )
        self.directions = difference_of_means(found)

    def forward(self) -> None:
        """The peer of collecting: the same prompts through the whole model, padded, in batches of 32."""
        tokens = sum(map(len, self.read))

        def work() -> None:
            for batch in self._padded(self.read):
                self.handle.model(**batch, use_cache=False)

        weights = self.block * self.layers + self.head
        self.out.stage("plain forward", work, tokens=lambda _: tokens, flops=lambda _: 2 * weights * tokens)

    def fit(self) -> None:
        """Ten steps with gradients over the last three quarters of the blocks; what is counted is forward and back."""
        from abliterate.common.reporting import Silent
        from abliterate.measure.decode import decode
        from abliterate.search.examples import Examples
        from abliterate.search.fit import _Job
        from abliterate.search.fit_settings import FitSettings
        from abliterate.search.fit_state import FitState
        from planted import RefusesWithR

        few, first = min(64, len(self.target)), self.layers // 4
        answers = decode(self.handle, self.read[:few], max_new_tokens=8)
        side = Examples(self.target[:few], answers, self.baseline[:few], answers)
        settings = FitSettings(layers=range(first, self.layers))
        job = _Job(self.handle, self.directions, side, side, RefusesWithR(), settings, (), FitState())
        job._open(settings.layers)
        job.variables.put(self.directions.unit[first:, 0, -1], 0.6)
        tokens: list[int] = []
        hook = self.handle.blocks[-1].register_forward_pre_hook(
            lambda _m, args: tokens.append(args[0].shape[:-1].numel())
        )
        job.descend(1.0, 2, Silent())
        hook.remove()
        each = tokens[0]
        weights = 4 * self.block * (self.layers - first)  # 2 forward, 2 back: no weight wants a gradient
        self.out.stage(
            "fit, 10 steps", lambda: job.descend(1.0, 12, Silent()),
            tokens=lambda _: 10 * each, flops=lambda _: 10 * weights * each,
        )  # fmt: skip

    def decode(self) -> None:
        from abliterate.measure.decode import decode

        decode(self.handle, self.asked[:4], max_new_tokens=4)
        work = partial(decode, self.handle, self.asked, max_new_tokens=self.answer)
        self.out.stage(f"decode {len(self.asked)} x {self.answer}", work, **self._steps(1))

    def generate(self) -> None:
        def work() -> None:
            for batch in self._padded(self.asked):
                self.handle.model.generate(
                    **batch, max_new_tokens=self.answer, min_new_tokens=self.answer, do_sample=False, pad_token_id=0
                )

        batches = -(-len(self.asked) // GENERATED)
        self.out.stage(f"generate {len(self.asked)} x {self.answer}", work, **self._steps(batches))

    def _steps(self, batches: int) -> dict[str, Any]:
        """Tokens, and the bytes of weights that so many batches' steps read; a mixture's batch reads all experts."""
        weights = sum(p.numel() * p.element_size() for p in self.handle.model.parameters())
        weights -= self.handle.embedding.weight.numel() * 2
        return {
            "tokens": lambda _: len(self.asked) * self.answer,
            "bytes": lambda _: weights * batches * self.answer,
        }

    def divergence(self) -> None:
        from abliterate.measure.decode import decode
        from abliterate.measure.divergence import compare, make_reference

        ids = self.asked[: max(4, self.count // 4)]
        answers = decode(self.handle, ids, max_new_tokens=24)
        tokens = sum(len(row) + 23 for row in ids)
        amounts: Any = {"tokens": lambda _: tokens, "flops": lambda _: 2 * self.block * self.layers * tokens}
        reference = self.out.stage(
            f"reference of {len(ids)}", lambda: make_reference(self.handle, ids, answers), **amounts
        )
        self.out.stage(f"divergence on {len(ids)}", lambda: compare(self.handle, reference), **amounts)

    def save(self) -> None:
        import torch

        from abliterate.common.reporting import Silent
        from abliterate.edit.edit import Edit
        from abliterate.models.writers import find_writers
        from abliterate.run.facts import recipe_of
        from abliterate.run.saving import save_edited

        edit = Edit.uniform(find_writers(self.handle), torch.randn(self.handle.d_model), 1.0)
        recipe = recipe_of(self.handle, edit)
        self.out.stage("save", lambda: save_edited(self.handle, recipe, self.out.room / "saved", "-", Silent()))

    def _padded(self, rows: list[list[int]]) -> list[dict[str, Any]]:
        import torch

        found = []
        for start in range(0, len(rows), GENERATED):
            batch = rows[start : start + GENERATED]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=self.handle.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=ids.device)
            found.append({"input_ids": ids, "attention_mask": mask})
        return found


def _card(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def command(part: str, arguments: argparse.Namespace, room: Path) -> list[str]:
    """What runs one part."""
    if part == "tests":
        return [sys.executable, "-m", "pytest", "-q", "-m", "device", "-p", "no:cacheprovider", *arguments.tests]
    if part == "demo":
        model, target, baseline, few = "demo", "bundled", "bundled", []
        if arguments.tiny:
            sys.path.insert(0, str(ROOT / "tests"))
            from planted import save_planted

            model, target, baseline = map(str, save_planted(room))
            few = ["--train-prompts", "12", "--validation-prompts", "6", "--test-prompts", "6", "--max-new-tokens", "6"]
        prompts = ["--target", target, "--baseline", baseline, *few, "--device", arguments.device]
        return [sys.executable, "-m", "abliterate", "run", model, "--out", str(room / "demo"), *prompts]
    return [
        sys.executable, __file__, "--device", arguments.device, "--inner", part, "--room", str(room),
        *(["--tiny"] if arguments.tiny else []),
    ]  # fmt: skip


def run_part(part: str, arguments: argparse.Namespace, left: float) -> dict[str, Any]:
    """One part in a process of its own: what it found, and how it ended."""
    with tempfile.TemporaryDirectory(dir=arguments.room, prefix=f"{part}-") as folder:
        room, start = Path(folder), time.perf_counter()
        environment = os.environ | {
            "ABLITERATE_TEST_DEVICE": arguments.device, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        with (room / "log").open("w+") as log:
            running = subprocess.Popen(
                command(part, arguments, room), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                most = left if arguments.tiny else min(left, PARTS[part] * arguments.minutes / 12)
                code: int | str = running.wait(most)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
                code = "took too long"
            log.seek(0)
            lines = log.read().splitlines()
        found = json.loads((room / "found.json").read_text()) if (room / "found.json").exists() else {}
        ended = {"seconds": time.perf_counter() - start, "exit": code, "last": lines[-1] if lines else ""}
        if code != 0:
            ended["log"] = lines[-40:]
        if (room / "demo" / "results.json").exists():
            document = json.loads((room / "demo" / "results.json").read_text())
            found["timings_s"] = document["timings_s"]
        return {**ended, **found}


def table(found: dict[str, Any]) -> str:
    """All figures as one Markdown table."""
    lines = [
        "| part | stage | seconds | peak GiB | tokens/s | of matmul | of memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for part, row in found["parts"].items():
        state = "" if row["exit"] == 0 else f" ({row['exit']})"
        lines.append(f"| {part} | all{state} | {row['seconds']:.1f} | | | | |")
        for stage, one in row.get("stages", {}).items():
            if "failed" in one:
                lines.append(f"| {part} | {stage} | {one['failed'].splitlines()[0][:80]} | | | | |")
                continue
            shares = [f"{100 * one[key]:.1f}%" if key in one else "" for key in ("share_of_matmul", "share_of_memory")]
            rate = f"{one['tokens_per_s']:,.0f}" if "tokens_per_s" in one else ""
            lines.append(
                f"| {part} | {stage} | {one['seconds']:.2f} | {one['peak_gib']:.1f} | {rate} | {' | '.join(shares)} |"
            )
    return "\n".join(lines)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    parser.add_argument("--device", default=kind.type if kind else "cpu", help="cuda, xpu, mps or cpu (what is there)")
    parser.add_argument("--tiny", action="store_true", help="tiny models, the demo's too, and few prompts: tries this")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (all)")
    parser.add_argument("--minutes", type=float, default=12, help="at most (12)")
    parser.add_argument("--room", type=Path, help="folder for models, twice the size of the largest (temporary files')")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="where the marked tests are looked for (tests)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--inner", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inner:
        return measure_model(arguments.inner, arguments.device, arguments.tiny, arguments.room)
    start, found = time.perf_counter(), {"device": arguments.device, "tiny": arguments.tiny, "parts": {}}
    found["versions"] = {name: version(name) for name in ("abliterate", "torch", "transformers")}
    for part in arguments.only:
        left = 60 * arguments.minutes - (time.perf_counter() - start)
        found["parts"][part] = run_part(part, arguments, max(1.0, left))
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
