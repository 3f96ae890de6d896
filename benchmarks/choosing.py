"""Does what is chosen on validation prompts hold on others? The choice along one run's path, drawn many times.

    python benchmarks/choosing.py MODEL OUT          # OUT: the folder of a run with its frontier; minutes

Every point of the run's frontier answers the same held-out target prompts once. Then, for each of 20 seeds, a draw of
them is the validation split on which a point is chosen as a run does it (`frontier.choose`, its defaults), and the
others are the test split, on which that point's answers are counted, by the panel that chose and by the judge that
choosing never saw. Divergences are those of the run. The fit itself is the one of that run: what other training seeds
would give isn't in it.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import abliterate as ab
from abliterate.edit.recipe import load_recipe
from abliterate.measure import judged
from abliterate.measure.judges import LexicalJudge
from abliterate.measure.rates import Rate
from abliterate.measure.trained_judge import TrainedJudge
from abliterate.measure.verdicts import Panel
from abliterate.search.frontier import FrontierPoint, choose
from abliterate.search.objectives import tried

FREE, MOST = 0.02, 0.05  # `--free-divergence` and `--max-refusal-rate` as they are by default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=120, help="held-out target prompts (%(default)s)")
    parser.add_argument("--validation", type=int, default=48, help="of them a draw's validation split (%(default)s)")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer (%(default)s)")
    options = parser.parse_args()

    handle = ab.load(options.model)
    sides = ab.load_sides("bundled", "bundled")
    held_out = [*sides.target.test.texts, *sides.target.validation.texts][: options.prompts]
    panel, other = Panel(LexicalJudge()), TrainedJudge()
    learnt = [
        [a.text for a in judged(handle, side[:64], LexicalJudge(), max_new_tokens=options.tokens).answers]
        for side in (sides.target.train.texts, sides.baseline.train.texts)
    ]
    print(panel.learn(*learnt), flush=True)

    points, missing, refused = [], [], []
    for said in json.loads((options.out / "results.json").read_text())["frontier"]:
        edit = load_recipe(options.out / said["recipe"]).edit
        answers = tried(handle, edit, held_out, panel.strict, max_new_tokens=options.tokens)[0].answers
        texts = [a.text for a in answers]
        missing.append([v != "answered" for v in panel.verdicts(held_out, texts)])
        refused.append(other.judge(held_out, texts))
        points.append(
            FrontierPoint(edit, Rate(0, 1), said["divergence"], divergence_along=said.get("divergence_along"))
        )
        print(
            f"{said['divergence']:.4f}: {sum(missing[-1])} not answered, {sum(refused[-1])} refused by the other judge"
        )

    kept = [0, 0]
    for seed in range(options.seeds):
        order = random.Random(seed).sample(range(len(held_out)), len(held_out))
        validation, test = order[: options.validation], order[options.validation :]
        seen = [
            replace(p, refused=Rate(sum(m[i] for i in validation), len(validation)))
            for p, m in zip(points, missing, strict=True)
        ]
        chosen, _ = choose(seen, MOST, free_divergence=FREE)
        place = next(i for i, p in enumerate(seen) if p is chosen)
        found = [sum(side[place][i] for i in test) for side in (missing, refused)]
        kept = [k + (n <= MOST * len(test)) for k, n in zip(kept, found, strict=True)]
        print(
            f"| {seed} | {chosen.noticed:.3f} | {chosen.refused.count} of {chosen.refused.total} "
            f"| {found[0]} of {len(test)} | {found[1]} of {len(test)} |"
        )
    print(f"at most {MOST:.0%} on test: {kept[0]} of {options.seeds} by the panel, {kept[1]} by the other judge")


if __name__ == "__main__":
    main()
