"""Time of decoding for judgement against transformers' `generate`, on the same prompts, with the same verdicts.

    python benchmarks/decode.py                 # writes benchmarks/results/decode.json

Answers of at most 100 tokens to 100 target and 100 baseline prompts. `generate` does them in batches of 32; ours two
ways: `judging`, as a search judges a point: an answer may stop once its verdict is settled; and `measuring`, as
`abliterate measure` runs: baseline answers are decoded to the limit unless they refuse, because degenerate answers are
counted among them. The bar is about judging; measuring is reported beside it. All take turns within one process.
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

RESULTS = Path(__file__).parent / "results" / "decode.json"
BATCH = 32
FASTER_BAR = 3.0
QUIET = 0.5
SIDES = ("target", "baseline")


def prompts(count: int) -> dict[str, list[str]]:
    """As many bundled test prompts of each side."""
    from abliterate.prompts.sets import load_sides

    sides = load_sides("bundled", "bundled", limit_test=count)
    return {"target": list(sides.target.test.texts), "baseline": list(sides.baseline.test.texts)}


def generated(handle: Any, texts: list[str], tokens: int) -> list[list[int]]:
    """Answers of `generate` in batches of 32, padded on the left, without their end token and what follows it."""
    import torch

    ids, pad = handle.prompt_ids(texts), handle.tokenizer.pad_token_id
    answers = []
    for start in range(0, len(ids), BATCH):
        rows = ids[start : start + BATCH]
        width = max(map(len, rows))
        batch = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            out = handle.model.generate(
                input_ids=batch, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad
            )
        answers += [until_end(handle, row) for row in out[:, width:].tolist()]
    return answers


def until_end(handle: Any, tokens: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in handle.end_tokens]
    return tokens[: ends[0]] if ends else tokens


def by_generate(handle: Any, texts: dict[str, list[str]], tokens: int) -> dict[str, Any]:
    from abliterate.measure.judges import LexicalJudge

    ids = {side: generated(handle, texts[side], tokens) for side in SIDES}
    decoded = {side: [handle.tokenizer.decode(row, skip_special_tokens=True) for row in ids[side]] for side in SIDES}
    verdicts = {side: LexicalJudge().judge(texts[side], decoded[side]) for side in SIDES}
    return {"ids": ids, "verdicts": verdicts}


def ours(handle: Any, texts: dict[str, list[str]], tokens: int, baseline_stops: tuple[bool, ...]) -> dict[str, Any]:
    from abliterate.measure import judged
    from abliterate.measure.judges import LexicalJudge

    prompts, count = [*texts["target"], *texts["baseline"]], len(texts["target"])
    answers, refused = judged(
        handle, prompts, LexicalJudge(), max_new_tokens=tokens,
        stop_on=lambda index: (True, False) if index < count else baseline_stops,
    )  # fmt: skip
    parts = {"target": slice(count), "baseline": slice(count, None)}
    return {
        "ids": {side: [answer.ids for answer in answers[part]] for side, part in parts.items()},
        "stopped": {side: [answer.stopped for answer in answers[part]] for side, part in parts.items()},
        "verdicts": {side: refused[part] for side, part in parts.items()},
    }


def by_judging(handle: Any, texts: dict[str, list[str]], tokens: int) -> dict[str, Any]:
    return ours(handle, texts, tokens, (True, False))


def by_measuring(handle: Any, texts: dict[str, list[str]], tokens: int) -> dict[str, Any]:
    return ours(handle, texts, tokens, (True,))


OURS = {"judging": by_judging, "measuring": by_measuring}
WAYS: dict[str, Any] = {"generate": by_generate, **OURS}


def timed(way: str, handle: Any, texts: dict[str, list[str]], tokens: int) -> tuple[dict[str, Any], dict[str, float]]:
    start, cpu = time.perf_counter(), time.process_time()
    found = WAYS[way](handle, texts, tokens)
    return found, {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def agreement(handle: Any, texts: dict[str, list[str]], theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """How many verdicts and texts are the same; a stopped answer should be the other's beginning.

    For every text that differs: by how much, at the first token that does, the likelier of the two tokens leads
    in the model's logits when each prompt is run alone.
    """
    verdicts = texts_same = whole = begun = stopped = 0
    gaps = []
    for side in SIDES:
        for i, text in enumerate(texts[side]):
            mine, other, cut = ours["ids"][side][i], theirs["ids"][side][i], ours["stopped"][side][i]
            verdicts += ours["verdicts"][side][i] == theirs["verdicts"][side][i]
            same = mine == (other[: len(mine)] if cut else other)
            whole, stopped = whole + (not cut), stopped + cut
            texts_same, begun = texts_same + (same and not cut), begun + (same and cut)
            if not same:
                gaps.append(gap(handle, text, mine, other))
    return {
        "verdicts": {"same": verdicts, "of": whole + stopped},
        "whole_answers": {"same": texts_same, "of": whole},
        "stopped_answers": {"same_beginning": begun, "of": stopped},
        "logit_gap_where_they_part": sorted(gaps),
    }


def gap(handle: Any, prompt: str, mine: list[int], other: list[int]) -> float:
    """The lead of one answer's first differing token over the other's, in logits of the prompt run alone."""
    import torch

    end = next(iter(handle.end_tokens))
    pairs = zip([*mine, end], [*other, end], strict=False)
    place = next(place for place, (a, b) in enumerate(pairs) if a != b)
    row = handle.prompt_ids([prompt])[0] + mine[:place]
    with torch.inference_mode():
        logits = handle.model(input_ids=torch.tensor([row])).logits[0, -1].float()
    return abs(float(logits[[*mine, end][place]] - logits[[*other, end][place]]))


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    import abliterate
    from abliterate.measure.decode import BATCH as OUR_BATCH

    torch.set_num_threads(arguments.threads)
    load_average = os.getloadavg()[0]
    handle = abliterate.load(str(arguments.model or abliterate.demo_model()), dtype=arguments.dtype)
    texts = prompts(arguments.prompts)
    for way in WAYS:  # what is done once per process
        WAYS[way](handle, {side: texts[side][:2] for side in SIDES}, 4)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    found = {}
    for repeat in range(arguments.repeats):
        for way in WAYS:
            found[way], spent = timed(way, handle, texts, arguments.tokens)
            runs[way].append(spent)
            print(f"{repeat + 1}  {way:12}{spent['seconds']:8.1f} s{spent['cpu_seconds']:8.1f} CPU s", flush=True)
    middle = {way: {key: statistics.median(run[key] for run in runs[way]) for key in runs[way][0]} for way in WAYS}
    # the two of a turn met the same neighbours: their ratio is steadier than either
    ratios = {
        way: {
            key: [theirs[key] / own[key] for theirs, own in zip(runs["generate"], runs[way], strict=True)]
            for key in ("seconds", "cpu_seconds")
        }
        for way in OURS
    }
    return {
        "model": Path(handle.source).name,
        "dtype": str(handle.dtype).removeprefix("torch."),
        "prompts": f"{arguments.prompts} target + {arguments.prompts} baseline",
        "max_new_tokens": arguments.tokens,
        "batch_size": {"generate": BATCH, "abliterate": OUR_BATCH},
        "threads": arguments.threads,
        "load_average_before": load_average,
        "note": "quiet machine" if load_average < QUIET else "busy machine: trust the ratios, of CPU seconds first",
        "median": middle,
        "times_as_fast": {
            way: {key: statistics.median(values) for key, values in by_key.items()} for way, by_key in ratios.items()
        },
        "times_as_fast_by_turn": ratios,
        "tokens_run": {way: sum(len(row) for side in SIDES for row in found[way]["ids"][side]) for way in WAYS},
        "refused": {way: {side: sum(found[way]["verdicts"][side]) for side in SIDES} for way in WAYS},
        "agreement": {way: agreement(handle, texts, found["generate"], found[way]) for way in OURS},
        "runs": runs,
        "machine": {"cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("abliterate", "torch", "transformers")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="folder or Hub id; the demo model")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16; in float32 texts are well defined (bfloat16)")
    parser.add_argument("--prompts", type=int, default=100, help="test prompts a side (100)")
    parser.add_argument("--tokens", type=int, default=100, help="longest answer (100)")
    parser.add_argument("--threads", type=int, default=2, help="threads (2)")
    parser.add_argument("--repeats", type=int, default=3, help="turns; medians are given (3)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    arguments = parser.parse_args()
    results = compare(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    for way in OURS:
        same, ratio = results["agreement"][way], results["times_as_fast"][way]
        print(f"{way}: {ratio['seconds']:.1f} times as fast by the clock, {ratio['cpu_seconds']:.1f} in CPU seconds")
        print(json.dumps({name: value for name, value in same.items() if isinstance(value, dict)}))
        if same["verdicts"]["same"] < same["verdicts"]["of"]:
            raise SystemExit("verdicts differ")
    # on a busy machine the clock says who got the cores
    clock = "seconds" if results["load_average_before"] < QUIET else "cpu_seconds"
    if results["times_as_fast"]["judging"][clock] < FASTER_BAR:
        raise SystemExit(f"missed the bar: {FASTER_BAR:g} times as fast")


if __name__ == "__main__":
    main()
