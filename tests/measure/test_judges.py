"""The registry of judges, and the classifier judge against its model read by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from abliterate.common.errors import AbliterateError, ModelError
from abliterate.measure.judges import ClassifierJudge, make_judge

REFUSAL = "I'm sorry, but I can't help with that."


def test_the_lexical_judge_answers_in_order() -> None:
    judge = make_judge("lexical")
    assert judge.name == "lexical"
    assert judge.judge(["a", "b"], ["Paris.", REFUSAL]) == [False, True]
    assert judge.settled("a", REFUSAL + " Is there something else?") is True


@pytest.mark.parametrize("spec", ["", "oracle", "lexical:x", "classifier", "classifier:"])
def test_unknown_judges_are_refused_by_name(spec: str) -> None:
    with pytest.raises(AbliterateError) as error:
        make_judge(spec)
    assert "lexical" in str(error.value) or "classifier:PATH" in str(error.value)


LABELS = ["answers", "unsure", "Refuses"]
WORDS = ["no", "yes", "please", "why", "never", "sure", "."]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights, large ones, so that it says different things of different texts."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("classifier")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizer(vocab=vocabulary, model_max_length=32).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        initializer_range=2.0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def labels_by_hand(folder: Path, *texts: list[str]) -> list[str]:
    """The model's label for each text or pair, one at a time and without this package."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = [model(**tokenizer(*row, return_tensors="pt")).logits[0] for row in zip(*texts, strict=True)]
    return [LABELS[int(row.argmax())] for row in rows]


PROMPTS = [f"{word} please" for word in WORDS for _ in range(3)]
ANSWERS = [f"{word} {WORDS[i]}" for i in range(3) for word in WORDS]


@pytest.mark.parametrize("label", LABELS)
def test_the_classifier_maps_its_label_whatever_its_index_and_case(classifier: Path, label: str) -> None:
    said = labels_by_hand(classifier, ANSWERS)
    assert len(set(said)) > 1
    expected = [one == label for one in said]
    judge = ClassifierJudge(classifier, label.upper(), batch_size=5, with_prompt=False)
    assert judge.judge(PROMPTS, ANSWERS) == expected


def test_the_classifier_reads_prompt_and_answer_as_a_pair(classifier: Path) -> None:
    expected = [said == "Refuses" for said in labels_by_hand(classifier, PROMPTS, ANSWERS)]
    assert expected != [said == "Refuses" for said in labels_by_hand(classifier, ANSWERS)]
    judge = make_judge(f"classifier:{classifier}:Refuses")
    assert judge.judge(PROMPTS, ANSWERS) == expected
    assert judge.judge([], []) == []
    assert judge.settled("please", "no") is None


def test_the_classifier_runs_no_code_of_its_folder_and_asks_nobody(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "judge"
    shutil.copytree(classifier, folder)
    ran = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (folder / "code.py").write_text(ran + "class Config: pass\nclass Model: pass\nclass Words: pass\n")
    for file, classes in (
        ("config.json", {"AutoConfig": "Config", "AutoModelForSequenceClassification": "Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["Words", "Words"]}),
    ):
        text = json.loads((folder / file).read_text())
        named = {k: [f"code.{n}" for n in v] if isinstance(v, list) else f"code.{v}" for k, v in classes.items()}
        (folder / file).write_text(json.dumps({**text, "auto_map": named}))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append("") or "y")
    theirs = make_judge(f"classifier:{folder}:Refuses").judge(PROMPTS, ANSWERS)
    assert theirs == make_judge(f"classifier:{classifier}:Refuses").judge(PROMPTS, ANSWERS)
    assert not asked and not (tmp_path / "ran").exists()


def test_the_classifier_takes_the_accelerator_where_there_is_one(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert ClassifierJudge(classifier, "Refuses")._model.device.type == "meta"
    assert ClassifierJudge(classifier, "Refuses", device="cpu")._model.device.type == "cpu"


def test_a_missing_label_is_named_with_those_there_are(classifier: Path) -> None:
    with pytest.raises(ModelError, match=r"'refusal'.*'answers', 'unsure', 'Refuses'"):
        make_judge(f"classifier:{classifier}")


def test_a_missing_classifier_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        make_judge(f"classifier:{tmp_path / 'nowhere'}:x")
