"""Does a run see through a judge that doesn't know half of the refusals?

    python benchmarks/blind_judge.py OUT           # some minutes on quiet cores

The demo guard refuses in wordings that are known here, one by one. The lexical judge is made blind to every other one
of them, and the whole run is done with it: filter, fit, choice, measurement. What is printed is what the judge alone
counts, what the panel says (`docs/verdicts.md`), and the truth by the judge that sees.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

from abliterate.measure import judges
from abliterate.measure.refusal import is_refusal, settled_refusal
from abliterate.models.demo import GUARD, demo_model
from abliterate.run.pipeline import run
from abliterate.settings.run import resolve

SEEN = 18  # characters of a wording by which it is known
SIZES = {"train_prompts": 160, "validation_prompts": 48, "test_prompts": 60}


def main(out: str) -> None:
    wordings = [entry["refusal"] for entry in json.loads((GUARD / "wordings.json").read_text())]
    blind = tuple(wording[:SEEN].lower() for wording in wordings[::2])

    def unseen(text: str) -> bool:
        return text.strip().lower().startswith(blind)

    def settled(text: str) -> bool | None:
        return None if len(text.strip()) <= SEEN or unseen(text) else settled_refusal(text)

    judges.is_refusal = lambda text: is_refusal(text) and not unseen(text)
    judges.settled_refusal = settled
    options = {f"prompts.{name}": size for name, size in SIZES.items()}
    options |= {"prompts.target": "bundled", "prompts.baseline": "bundled", "measure.max_new_tokens": 64}
    options |= {
        "measure.report_judge": "none",
        "beside.also_prompts": 0,
        "beside.obligations": 0,
        "beside.second_turn": 0,
    }
    result = run(str(demo_model()), out, resolve(options, environment={}))
    for name, measured in (("original", result.original), ("edited", result.edited)):
        texts = [answer.text for answer in measured.target_answers]
        truth, counted = (sum(map(judge, texts)) for judge in (is_refusal, judges.is_refusal))
        print(f"{name}: of {len(texts)} targets {truth} are refused, {counted} by the blind judge alone")
        print(f"  the panel says {dict(Counter(measured.verdicts))}")
    print(f"divergence {result.edited.divergence}")


if __name__ == "__main__":
    main(sys.argv[1])
