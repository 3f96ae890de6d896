"""Train the bundled judge (`measure/trained_judge.py`): softmax regression on hashed n-grams of labelled answers.

    python scripts/train_judge.py            # minutes; writes src/abliterate/data/trained_judge.npz and a report
    python scripts/train_judge.py --dry-run  # only the report

The answers are in `scripts/judge/`: refusals of many wording families crossed with harmless and harmful prompts,
answers that look like refusals, and answers decoded from two small Apache-2.0 models (`scripts/judge/decode.py`).
No answer to a harmful prompt is among them, only scaffolds of answers with nothing in them. What the judge is worth on
wordings it never saw is printed by family: each is left out of training once, together with every answer that has a
sentence of it. Figures on other people's answers: `benchmarks/judges.py`. Needs scikit-learn (the `dev` extra).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from abliterate.common.files import whole_file
from abliterate.measure.trained_judge import BUCKETS, MEASURES, SURE, WEIGHTS, features

sys.path.insert(0, str(Path(__file__).parent / "judge"))
from samples import COMPLIES, REFUSES, Sample, labelled, samples

FOLDS = 8
ROUNDS = 3  # wordings are crossed with other prompts in each
REGULARISATION = 3.0  # scikit-learn's C; 1 to 10 give the same within a point
# The decoded free answers are most of what complies; without them nothing is learnt of the rest.
ALWAYS_IN = ("decoded:Smol", "decoded:Qwen", "partial")


def matrix(rows: Sequence[Sample]) -> csr_matrix:
    """Features of each row, (row, feature)."""
    ends, indices, values = [0], [], []
    for row in rows:
        found = features(row.prompt, row.answer)
        indices += found.keys()
        values += found.values()
        ends.append(len(indices))
    return csr_matrix((values, indices, ends), shape=(len(rows), BUCKETS + MEASURES))


def fit(inputs: csr_matrix, labels: np.ndarray) -> LogisticRegression:
    return LogisticRegression(C=REGULARISATION, max_iter=300, class_weight="balanced").fit(inputs, labels)


def refuses(model: LogisticRegression, inputs: csr_matrix) -> np.ndarray:
    odds = model.predict_proba(inputs)
    return odds[:, COMPLIES] < SURE  # as TrainedJudge.judge


def families_of(row: Sample) -> list[str]:
    return [name.removeprefix("remarks:").removeprefix("cut:") for name in row.family.split("+")]


def left_out(rows: Sequence[Sample], inputs: csr_matrix, labels: np.ndarray) -> dict[tuple[int, str], list[bool]]:
    """Verdicts on each family by a judge that was trained without it, by (label, family)."""
    families = [families_of(row) for row in rows]
    names = sorted({names[0] for names in families if not names[0].startswith(ALWAYS_IN)})
    random.Random(0).shuffle(names)
    verdicts = defaultdict(list)
    for fold in range(FOLDS):
        out = set(names[fold::FOLDS])
        inside = np.array([out.isdisjoint(names) for names in families])
        asked = np.array([names[0] in out for names in families])
        model = fit(inputs[inside], labels[inside])
        for index, verdict in zip(np.flatnonzero(asked), refuses(model, inputs[asked]), strict=True):
            verdicts[int(labels[index]), families[index][0]].append(bool(verdict))
    return verdicts


def report(rows: Sequence[Sample], inputs: csr_matrix, labels: np.ndarray) -> None:
    verdicts = left_out(rows, inputs, labels)
    for label, title in ((REFUSES, "refusals found"), (COMPLIES, "answers taken for refusals")):
        chosen = {name: found for (kind, name), found in verdicts.items() if kind == label}
        total = [verdict for found in chosen.values() for verdict in found]
        print(f"\n{title}, each family left out: {np.mean(total):.1%} of {len(total)}; by family:")
        for name, found in sorted(chosen.items(), key=lambda item: np.mean(item[1])):
            print(f"  {np.mean(found):6.1%} of {len(found):4}  {name}")
    held_out = list(labelled(held_out=True))
    truth = np.array([row.label == REFUSES for row in held_out])
    verdict = refuses(fit(inputs, labels), matrix(held_out))
    right, found = (verdict == truth).mean(), verdict[truth].mean()
    print(f"\nheld-out part of refusal_labelled.jsonl: {right:.1%} of {len(truth)} right, {found:.1%} found")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--no-report", action="store_true", help="leave no families out")
    options = parser.parse_args()
    rows = [row for seed in range(ROUNDS) for row in samples(seed)]
    inputs, labels = matrix(rows), np.array([row.label for row in rows])
    families = {name for row in rows for name in families_of(row)}
    print(
        f"{len(rows)} answers of {len(families)} families; by label: {dict(sorted(Counter(labels.tolist()).items()))}"
    )
    model = fit(inputs, labels)
    if not options.dry_run:
        with whole_file(options.out) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, weights=model.coef_.astype(np.float16), bias=model.intercept_.astype(np.float32))
        print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    if not options.no_report:
        first = len(rows) // ROUNDS  # one round is enough to tell, and takes half the time
        report(rows[:first], inputs[:first], labels[:first])


if __name__ == "__main__":
    main()
