"""Decode answers for training the bundled judge from a small open model: freely, and behind openings that refuse.

    python scripts/judge/decode.py MODEL.gguf NAME --out ANSWERS.jsonl

A refusal that speaks of its subject can't be written as a template, so a model writes it: the answer is begun for
it with an opening of `openings.toml`, and what it goes on to say is kept. All prompts are harmless. The committed
files are such answers (SmolLM2-135M-Instruct's free ones; Qwen2.5-Coder-0.5B-Instruct's), less those that turn out
to be neither, with `refuses` where a free answer refuses. Needs the `gguf` extra.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import tomllib
except ImportError:
    import tomli as tomllib
import xllamacpp

HERE = Path(__file__).parent
BASELINE = HERE.parents[1] / "src" / "abliterate" / "data" / "baseline.jsonl"
AT_ONCE = 8
# What turns a refusal into an answer after all; the text is cut before it.
TURNS = re.compile(r"\n\s*(?:\d+[.)]|[-*•])\s|```|\bHowever, here\b|\bHere (?:is|are)\b|\b(?:following|steps?|tips?):")


def prompts_of(share: float, seed: int) -> list[tuple[str, str | None, str]]:
    """(prompt, opening or None, family): each own prompt answered freely and behind openings."""
    rng = random.Random(seed)
    own = [line for line in (HERE / "prompts.txt").read_text("utf-8").splitlines() if line and line[0] != "#"]
    rows = [json.loads(line) for line in BASELINE.read_text("utf-8").splitlines()]
    borderline = [row["text"] for row in rows if row["kind"] == "borderline" and row["split"] == "train"]
    others = [row["text"] for row in rows if row["kind"] != "borderline" and row["split"] == "train"]
    rng.shuffle(others)
    openings = tomllib.loads((HERE / "openings.toml").read_text("utf-8"))
    jobs: list[tuple[str, str | None, str]] = [(p, None, "answer") for p in own + borderline]
    jobs += [(p, None, "answer") for p in others[: int(300 * share)]]
    for family, lines in openings.items():
        for line in lines:
            for prompt in rng.sample(own + borderline + others[:60], max(1, int(6 * share))):
                jobs.append((prompt, line, family))
    return jobs


def in_other_languages() -> list[tuple[str, str | None, str]]:
    jobs: list[tuple[str, str | None, str]] = []
    for language, texts in tomllib.loads((HERE / "languages.toml").read_text("utf-8")).items():
        jobs += [(prompt, None, "answer") for prompt in texts["prompts"]]
        jobs += [
            (prompt, texts["openings"][i % len(texts["openings"])], f"language:{language}")
            for i, prompt in enumerate(texts["prompts"])
            if texts["openings"]
        ]
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--languages", action="store_true", help="the prompts of languages.toml instead")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = str(options.model)
    params.n_ctx, params.n_parallel, params.warmup = 512 * AT_ONCE, AT_ONCE, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def decode(job: tuple[str, str | None, str]) -> dict[str, str]:
        prompt, opening, family = job
        text = f"<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
        text += f"<|im_start|>assistant\n{opening or ''}"
        length = random.Random(prompt + str(opening)).choice([40, 70, 110] if opening else [60, 120, 200])
        answer = server.handle_completions(
            {"prompt": text, "n_predict": length, "temperature": 0.8, "top_p": 0.95, "seed": options.seed,
             "stop": ["<|im_end|>"], "cache_prompt": True}
        )  # fmt: skip
        said = answer["choices"][0]["text"] if "choices" in answer else answer["content"]
        if opening:
            turn = TURNS.search(said)
            said = opening + (said[: turn.start()] if turn else said)
        return {"model": options.name, "family": family, "prompt": prompt, "answer": said.strip()}

    jobs = in_other_languages() if options.languages else prompts_of(options.share, options.seed)
    random.Random(1).shuffle(jobs)
    with ThreadPoolExecutor(AT_ONCE) as pool, options.out.open("w", encoding="utf-8") as file:
        for row in pool.map(decode, jobs):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
