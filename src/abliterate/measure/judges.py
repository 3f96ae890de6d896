"""Judges of whether answers show a behaviour: two of refusals, lexical and trained, the classifier, that of style.

The one that asks a language model behind an endpoint has files of its own: `llm_judge.py` and `endpoint.py`.

A judge of style gives every answer a score too, by a method `scores(answers)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from abliterate.common.errors import AbliterateError, ModelError
from abliterate.measure.numbers import Verdict as Verdict
from abliterate.measure.refusal import is_refusal, settled_refusal
from abliterate.measure.trained_judge import TrainedJudge
from abliterate.prompts.behaviour import load_behaviour
from abliterate.prompts.style import Style

AND = " + "
"""Between the specifications of several judges."""

WORSE: list[Verdict] = ["answered", "evaded", "refused"]


class Judge(Protocol):
    """Decides which answers are refusals.

    Anything with these members is a judge; pass an instance wherever a judge is taken.
    """

    name: str

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return, for each answer, whether it refuses the prompt at the same index."""
        ...

    def settled(self, prompt: str, partial_answer: str) -> bool | None:
        """Return the verdict if no continuation can change it, else None.

        Decoding stops early on a verdict, so this must be sound. None is always right, and the only
        right value for a judge that needs the whole answer.
        """
        ...


class LexicalJudge:
    """`is_refusal` as a judge: needs no model, reads no prompt, settles within a few words."""

    name = "lexical"

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return `is_refusal` of every answer; the prompts are not read."""
        return [is_refusal(answer) for answer in answers]

    def settled(self, prompt: str, partial_answer: str) -> bool | None:
        """Return the verdict as soon as no continuation can change it."""
        return settled_refusal(partial_answer)


class ClassifierJudge:
    """A sequence-classification model as a judge.

    Args:
        model_path: local folder or Hub id of a model for `AutoModelForSequenceClassification`.
        refusal_label: the label in the model's `id2label` that means "refuses" (any case).
        batch_size: answers per forward pass.
        device: torch device the model runs on; by default the accelerator (CUDA, MPS) where there is one, else the CPU.
        with_prompt: whether the model reads (prompt, answer) pairs or the answers only.

    Raises:
        ModelError: if the model can't be loaded or has no such label; the text names those it has.
    """

    def __init__(
        self,
        model_path: str | Path,
        refusal_label: str = "refusal",
        batch_size: int = 16,
        device: str | None = None,
        with_prompt: bool = True,
    ) -> None:
        from abliterate.models.devices import default_kind

        self.name = f"classifier:{model_path}:{refusal_label}"
        self._batch_size = batch_size
        self._device = device or default_kind()
        self._with_prompt = with_prompt
        self._tokenizer, self._model = _load_classifier(model_path, self._device)
        self._refusal_index = _label_index(self._model.config.id2label, refusal_label, model_path)

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return whether the refusal label is the likeliest for each answer."""
        verdicts: list[bool] = []
        for start in range(0, len(answers), self._batch_size):
            batch = slice(start, start + self._batch_size)
            verdicts += self._judge_batch(list(prompts[batch]), list(answers[batch]))
        return verdicts

    def settled(self, prompt: str, partial_answer: str) -> bool | None:
        """Return None: the model needs the whole answer."""
        return None

    def _judge_batch(self, prompts: list[str], answers: list[str]) -> list[bool]:
        import torch

        texts = (prompts, answers) if self._with_prompt else (answers,)
        # A long prompt or answer is cut at its end: a refusal shows at the answer's beginning.
        encoded = self._tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            logits = self._model(**encoded.to(self._device)).logits
        return [index == self._refusal_index for index in logits.argmax(dim=-1).tolist()]


def _load_classifier(model_path: str | Path, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from abliterate.models.pretrained import from_pretrained, wants_own_code

    try:
        tokenizer = from_pretrained(AutoTokenizer, model_path)
        model = from_pretrained(AutoModelForSequenceClassification, model_path, use_safetensors=True)
    except (OSError, ValueError) as error:
        if wants_own_code(error):
            raise ModelError(
                f"the refusal classifier {str(model_path)!r} comes with code of its own, which isn't run; name a "
                "classifier that transformers has a class for"
            ) from error
        raise ModelError(f"the refusal classifier {str(model_path)!r} can't be loaded: {error}") from error
    return tokenizer, model.to(device).eval()


def _label_index(id2label: dict[int, str], label: str, model_path: str | Path) -> int:
    for index, name in id2label.items():
        if name.casefold() == label.casefold():
            return int(index)
    known = ", ".join(repr(name) for name in id2label.values())
    raise ModelError(
        f"the refusal classifier {str(model_path)!r} has no label {label!r} (it has: {known}); "
        f"name the one that means a refusal: classifier:{model_path}:LABEL"
    )


class StyleJudge:
    """A `Style` as a judge: it reads the whole answer and gives each a score besides the verdict.

    Args:
        style: what counts.
        name: as results.json names the judge.
    """

    def __init__(self, style: Style, name: str = "style") -> None:
        self.style, self.name = style, name

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return whether each answer shows the style; the prompts are not read."""
        return [self.style.shows(answer) for answer in answers]

    def settled(self, prompt: str, partial_answer: str) -> bool | None:
        """Return None: what comes later can always thin the marks out, or add to them."""
        return None

    def scores(self, answers: Iterable[str]) -> list[float]:
        """Marks per hundred words of each answer."""
        return [self.style.score(answer) for answer in answers]


class Several:
    """Judges together: an answer refuses when one of them says so."""

    def __init__(self, judges: Sequence[Judge]) -> None:
        self.judges, self.name = list(judges), AND.join(judge.name for judge in judges)

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return whether any of them takes each answer for a refusal."""
        return [verdict == "refused" for verdict in self.verdicts(prompts, answers)]

    def verdicts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Return the worst that any of them says of each answer."""
        said = [verdicts_of(judge, prompts, answers) for judge in self.judges]
        return [max(all_said, key=WORSE.index) for all_said in zip(*said, strict=True)]

    def settled(self, prompt: str, partial_answer: str) -> bool | None:
        """Return True once one of them is sure of a refusal, False once all are sure of none."""
        said = [judge.settled(prompt, partial_answer) for judge in self.judges]
        return True if True in said else None if None in said else False


def verdicts_of(judge: Judge, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    """A judge's verdicts by its method `verdicts`, where it has one; else answered, or refused as it judges."""
    said: Callable[..., list[Verdict]] | None = getattr(judge, "verdicts", None)
    if said is not None:
        return said(prompts, answers)
    return ["refused" if refused else "answered" for refused in judge.judge(prompts, answers)]


def _plainly(kind: type[LexicalJudge | TrainedJudge]) -> Callable[[str], Judge]:
    def make(argument: str) -> Judge:
        if argument:
            raise AbliterateError(f"the {kind.name} judge takes no argument, but {argument!r} was given")
        return kind()

    return make


def _make_classifier(argument: str) -> Judge:
    path, label = _split_label(argument)
    if not path:
        raise AbliterateError("the classifier judge needs a model: classifier:PATH[:LABEL]")
    return ClassifierJudge(path, label) if label else ClassifierJudge(path)


def _split_label(argument: str) -> tuple[str, str]:
    # An existing folder may have a colon in its name (C:\models\judge).
    if Path(argument).exists() or ":" not in argument:
        return argument, ""
    path, _, label = argument.rpartition(":")
    return path, label


def _make_style(argument: str) -> Judge:
    if not argument:
        raise AbliterateError("the style judge needs a behaviour: style:NAME or style:FILE.toml")
    behaviour = load_behaviour(argument)
    return StyleJudge(behaviour.style, f"style:{behaviour.name}")


def _make_llm(argument: str) -> Judge:
    from abliterate.measure.endpoint import split_address
    from abliterate.measure.llm_judge import LlmJudge

    return LlmJudge(*split_address(argument))


JUDGES: dict[str, Callable[[str], Judge]] = {
    "lexical": _plainly(LexicalJudge), "trained": _plainly(TrainedJudge), "classifier": _make_classifier,
    "style": _make_style, "llm": _make_llm,
}  # fmt: skip
"""What makes each kind of judge from the text after the first colon of its specification."""


def make_judge(spec: str) -> Judge:
    """Return the judge that `spec` names: "lexical", "trained", "classifier:PATH[:LABEL]", "style:BEHAVIOUR" or
    "llm:URL[:MODEL]".

    Several, with " + " between them, are one judge (`Several`).

    Raises:
        AbliterateError: if there is no judge of that kind, or no such behaviour, or it has no style, or nobody
            answers at the URL.
        ModelError: if the classifier can't be loaded or lacks the label.
    """
    if AND in spec:
        return Several([make_judge(one) for one in spec.split(AND)])
    kind, _, argument = spec.partition(":")
    if kind not in JUDGES:
        raise AbliterateError(
            f"unknown judge {kind!r}; the known ones are: lexical, trained, classifier:PATH[:LABEL], style:BEHAVIOUR, "
            "llm:URL[:MODEL]"
        )
    return JUDGES[kind](argument)
