"""The neutral evaluator of `frontier.py`: the same prompts, judge, decoding, text and questions for every model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abliterate.measure import Measurement
    from abliterate.measure.divergence import Divergence, Reference
    from abliterate.models.handle import Handle

HERE = Path(__file__).parent
TEXT = HERE / "held_out.txt"
QUESTIONS = HERE / "questions.json"
WINDOW = 512  # tokens of text that are read together
BATCH = 32


@dataclass
class Evaluator:
    """Judges models against one original.

    Answers are decoded in bfloat16, as the weights are. What is read off distributions (divergence, text,
    questions) is computed in float32 from the same bfloat16 weights: in bfloat16 any change at all, however small,
    rounds activations otherwise, which alone is a divergence of 0.002 nats at the first token of the demo model.

    Attributes:
        model: the original's folder or Hub id.
        target, baseline: held-out prompts.
        system_prompt: sent with every prompt; None leaves it to the chat template.
        max_new_tokens: longest answer.
    """

    model: str
    target: Sequence[str]
    baseline: Sequence[str]
    system_prompt: str | None
    max_new_tokens: int
    _reference: Reference | None = field(default=None, repr=False)
    _own: Measurement | None = field(default=None, repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What an evaluation depends on besides the model."""
        prompts = hashlib.sha256(json.dumps([list(self.target), list(self.baseline)]).encode()).hexdigest()
        return {
            "original": fingerprint(self.model),
            "target_prompts": len(self.target),
            "baseline_prompts": len(self.baseline),
            "prompts_sha256": prompts,
            "system_prompt": self.system_prompt,
            "max_new_tokens": self.max_new_tokens,
            "distributions": "float32",
            "text_sha256": fingerprint(TEXT),
            "questions_sha256": fingerprint(QUESTIONS),
        }

    def original(self) -> dict[str, Any]:
        """The original's own evaluation."""
        from abliterate.measure import reference_of

        handle = self._load(self.model)
        own = self._measured(handle)
        handle.model.float()
        self._reference = reference_of(handle, self.baseline, own.baseline_answers, own.refused_baseline)
        assert self._reference is not None
        self._own = replace(own, reference=None)  # nothing to compare with in bfloat16
        return _document(handle, own, None, self._reference.loss)

    def folder(self, folder: Path) -> dict[str, Any]:
        """The evaluation of a model on disk."""
        return self._edited(self._load(str(folder)))

    def recipe(self, file: Path) -> dict[str, Any]:
        """The evaluation of the original with a recipe baked into its weights, in their own dtype."""
        from abliterate.edit.recipe import load_recipe

        handle = self._load(self.model)
        load_recipe(file).edit.bake(handle)
        return self._edited(handle)

    def _edited(self, handle: Handle) -> dict[str, Any]:
        from abliterate.measure.divergence import compare

        if self._reference is None:
            self.original()
        assert self._reference is not None
        own = self._measured(handle)
        handle.model.float()
        divergence = compare(handle, self._reference)
        return _document(handle, own, divergence, divergence.loss)

    def _load(self, source: str) -> Handle:
        from abliterate.models.loading import load

        return load(source, dtype="bfloat16", system_prompt=self.system_prompt)

    def _measured(self, handle: Handle) -> Measurement:
        from abliterate.measure import measure

        return measure(handle, self.target, self.baseline, original=self._own, max_new_tokens=self.max_new_tokens)


def fingerprint(path: str | Path) -> str:
    """Sha256 of a file, of the weights in a folder, or of a Hub id's name."""
    path, digest = Path(path), hashlib.sha256()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            digest.update(str(path).encode())
            continue
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def cached(file: Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, from `file` when it was made with the same settings before."""
    from abliterate.common.files import whole_file

    if file.is_file():
        known: dict[str, Any] = json.loads(file.read_text())
        if known.get("settings") == settings:
            return known
    document = {"settings": settings, **make()}
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
    return document


def _document(handle: Handle, measurement: Measurement, divergence: Divergence | None, loss: float) -> dict[str, Any]:
    """What is written of a model: `handle`'s weights are in float32 by now."""
    from abliterate.measure.coherence import is_degenerate

    degenerate = [is_degenerate(a.text, finished=a.finished) for a in measurement.baseline_answers]
    return {
        **measurement.to_json(),
        "divergence": divergence and divergence._asdict(),
        "loss": {"baseline_answers": loss},
        "text_loss": text_loss(handle, TEXT.read_text(encoding="utf-8")),
        "questions": answer_questions(handle, json.loads(QUESTIONS.read_text(encoding="utf-8"))),
        # one digit a prompt, for paired tests; no answer is kept
        "verdicts": {
            "refusal": _digits(measurement.refused_target),
            "over_refusal": _digits(measurement.refused_baseline),
            "degenerate": _digits(degenerate),
        },
    }


def _digits(verdicts: Sequence[bool]) -> str:
    return "".join(str(int(verdict)) for verdict in verdicts)


def text_loss(handle: Handle, text: str) -> float:
    """Cross-entropy of plain text in nats per token, read in windows of `WINDOW` tokens."""
    ids = handle.tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    rows = [row for row in rows if len(row) > 1]
    sums = [_logprob(handle, [row], [len(row) - 1])[0] for row in rows]
    return -sum(sums) / sum(len(row) - 1 for row in rows)


def answer_questions(handle: Handle, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Four-choice questions: the choice taken is the one of highest log-likelihood per character.

    Returns:
        correct and total, and `log_score`: the mean log-probability of the right choice among the four, by
        the same likelihoods; less grainy than a count of 80.
    """
    import torch

    rows, lengths = [], []
    for item in questions:
        for choice in item["choices"]:
            stem = handle.tokenizer(f"Question: {item['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
            answer = handle.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            rows.append([*stem, *answer])
            lengths.append(len(answer))
    sums = [
        value
        for start in range(0, len(rows), BATCH)
        for value in _logprob(handle, rows[start : start + BATCH], lengths[start : start + BATCH])
    ]
    characters = [len(choice) for item in questions for choice in item["choices"]]
    scores = torch.tensor(sums, dtype=torch.float64) / torch.tensor(characters, dtype=torch.float64)
    scores = scores.reshape(len(questions), -1)
    right = torch.tensor([item["answer"] for item in questions])
    log_score = scores.log_softmax(-1).gather(1, right[:, None]).mean()
    correct = int((scores.argmax(-1) == right).sum())
    return {"correct": correct, "total": len(questions), "log_score": float(log_score)}


def _logprob(handle: Handle, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[float]:
    """Summed log-probability of the last `lengths` tokens of each row."""
    import torch

    from abliterate.models.batches import Prefix, inputs

    with torch.inference_mode():
        keep = max(lengths)
        logits, _ = handle.last_logits(keep + 1, **inputs(handle, rows, Prefix(0)))
        found = []
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            own = logits[place, -length - 1 : -1].float().log_softmax(-1)
            wanted = torch.tensor(list(row[-length:]), device=own.device)
            found.append(float(own.gather(-1, wanted[:, None]).double().sum()))
    return found
