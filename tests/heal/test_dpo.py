"""Preference tuning: it learns, says what it does and nothing else, resumes to the same bytes, explains failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from abliterate.common.errors import AbliterateError, NonFiniteError, OutputError
from abliterate.heal.dpo import answer_log_probs, held_out_document
from abliterate.heal.launch import train
from abliterate.heal.surroundings import memory_advised
from abliterate.heal.trainer import FORCE_VALUES, WHOLE, last_checkpoint, run_trainer
from abliterate.settings.heal import HealSettings
from models import save_tiny, tiny_tokenizer
from preference_pairs import colours

KILLED_AT_STEP_5 = """
import os, signal, sys
from abliterate.heal import trainer, worker

class Killed(trainer._Progress):
    def on_step_end(self, args, state, control, **others):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

trainer._Progress = Killed
worker.main(sys.argv[1:])
"""


def adapter_bytes(training):
    return (training.adapter / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(tiny_folder, pairs_file, tmp_path_factory):
    """One training that several tests look at: the job, what came back, what was heard."""
    from preference_pairs import Heard, small_job

    heard = Heard()
    job = small_job(tiny_folder, pairs_file, tmp_path_factory.mktemp("trained") / "work", max_steps=10)
    return job, train(job, reporter=heard), heard


def test_it_learns_to_prefer_the_chosen_answers(trained):
    _, training, _ = trained
    held_out = training.results["held_out"]
    assert held_out["pairs"] == 10
    assert held_out["reward_accuracy"]["count"] == 10
    accuracy = held_out["likelihood_accuracy"]
    assert accuracy["before"]["count"] <= 8 < accuracy["after"]["count"]
    assert held_out["loss"]["after"] < 0.1 < held_out["loss"]["before"]
    losses = [point["loss"] for point in training.history]
    assert len(losses) == 10
    assert losses[-1] < 0.1 < 0.69 < losses[0] < 0.7


def test_the_adapter_on_disk_is_what_was_measured(trained):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job, training, _ = trained
    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = PeftModel.from_pretrained(base, str(training.adapter)).eval()

    def log_prob(messages, answer):
        start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
        first = len(tokenizer(start)["input_ids"])
        ids = torch.tensor([tokenizer(whole)["input_ids"]])
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        return chances.gather(-1, ids[0, 1:, None])[first - 1 :].sum().item()

    from abliterate.heal.preferences import load_preferences
    from abliterate.models.handle import Handle

    data = load_preferences(job.settings.heal, Handle(base, tokenizer, "tiny"), seed=job.settings.seed)
    margins = []
    for pair in data.held_out:
        on = [log_prob(pair.messages, answer) for answer in (pair.chosen, pair.rejected)]
        with model.disable_adapter():
            off = [log_prob(pair.messages, answer) for answer in (pair.chosen, pair.rejected)]
        margins.append(job.settings.heal.beta * ((on[0] - off[0]) - (on[1] - off[1])))
    assert training.results["held_out"]["reward_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert sorted(file.name for file in training.adapter.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_the_resolved_configuration_is_written(trained):
    job, training, _ = trained
    document = json.loads((job.folder / "heal.json").read_text())
    settings = document["settings"]
    assert settings == training.resolved | {"data": settings["data"]}
    assert (settings["optimizer"], settings["quantise"], settings["bf16"]) == ("adamw_torch", "none", "no")
    assert (settings["global_batch"], settings["processes"], settings["dtype"]) == (4, 1, "float32")
    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert settings["lora_modules"] == every
    assert document["data"]["read"] == 40
    assert str(job.folder.parent) not in json.dumps(document)  # no path of this machine


def test_it_is_followed_by_the_reporter_and_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job, training, heard = trained
    assert heard.stages["training"] == [10, 10]
    assert any("step 10 of 10: loss" in line and "reward margin" in line for line in heard.lines)
    events = EventAccumulator(str(job.curves)).Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx([point["loss"] for point in training.history], rel=1e-6)


def test_nothing_is_printed(job, capfd):
    train(job(max_steps=2))
    assert capfd.readouterr() == ("", "")


def test_dropout_is_of_the_lora_only(tmp_path, job, monkeypatch):
    """With dropout in the model the reference would be random."""
    from abliterate.heal import trainer
    from models import tiny

    model = tiny("gpt2", n_layer=1, n_embd=32, n_head=4, n_positions=128, resid_pdrop=0.5, embd_pdrop=0.5)
    small = job(target_modules="c_fc", max_steps=1).model_copy(
        update={"model": str(save_tiny(tmp_path / "gpt2", model))}
    )
    seen = []
    run = trainer.run_trainer

    def look(made, of):
        dropouts = {n: m.p for n, m in made.model.named_modules() if isinstance(m, torch.nn.Dropout)}
        seen.append(
            ({p for n, p in dropouts.items() if "lora" in n}, {p for n, p in dropouts.items() if "lora" not in n})
        )
        return run(made, of)

    monkeypatch.setattr(trainer, "run_trainer", look)
    train(small)
    assert seen == [({0.05}, {0.0})]


def test_chatml_where_the_model_has_no_template(tmp_path, job, heard):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    folder = save_tiny(tmp_path / "plain", tokenizer=tokenizer)
    training = train(job(max_steps=1).model_copy(update={"model": str(folder)}), reporter=heard)
    assert training.resolved["chat_template"] == "chatml"
    assert any("chatml is used" in line for line in heard.lines)


@pytest.mark.slow
def test_it_learns_in_four_bits(job):
    pytest.importorskip("bitsandbytes")
    training = train(job(quantise="4bit", max_steps=8))
    assert training.resolved["quantise"] == "4bit"
    assert training.results["held_out"]["reward_accuracy"]["count"] >= 9
    assert training.history[-1]["loss"] < 0.2 < 0.69 < training.history[0]["loss"]


# --- Going on after a kill ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bytes(job, heard):
    whole = train(job("whole", max_steps=8))
    killed = job("killed", max_steps=8)
    killed.folder.mkdir()
    file = killed.folder.parent / "job.json"
    file.write_text(killed.model_dump_json())
    # what `train` does first, so that the worker can be killed on its own
    from abliterate.heal.trainer import prepare_folder

    prepare_folder(killed)
    words = [sys.executable, "-c", KILLED_AT_STEP_5, str(file)]
    ended = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not killed.adapter.exists()
    assert last_checkpoint(killed).name == "checkpoint-4"
    half = killed.checkpoints / "checkpoint-6"  # as if it had been killed while writing this one
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    resumed = train(killed.model_copy(update={"resume": True}), reporter=heard)
    assert "going on from step 4 of 8" in heard.lines
    assert heard.stages["training"] == [4, 4]
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    assert [p["loss"] for p in resumed.history] == [p["loss"] for p in whole.history]
    assert resumed.results["held_out"] == whole.results["held_out"]


@pytest.mark.slow
def test_the_seed_matters(job):
    first = train(job("a", max_steps=1, warmup=0))
    second = job("b", max_steps=1, warmup=0)
    other = second.model_copy(update={"settings": second.settings.model_copy(update={"seed": 1})})
    assert adapter_bytes(first) != adapter_bytes(train(other))


@pytest.mark.slow
def test_only_the_same_training_is_resumed(job):
    train(job(max_steps=2))
    with pytest.raises(OutputError, match=r"heal\.beta = 0\.1, not 0\.5.*without --resume"):
        train(job(max_steps=2, beta=0.5, resume=True))
    anew = train(job(max_steps=2, beta=0.5))  # without --resume the old one is gone
    assert anew.resolved["beta"] == 0.5


class Harmful:
    """Runs code where its pickle is read: it makes a file."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return (open, (str(self.made), "w"))


class ReadsAnything:
    """A trainer that reads its checkpoint as DeepSpeed does."""

    def remove_callback(self, _kind):
        pass

    def train(self, resume_from_checkpoint):
        torch.load(f"{resume_from_checkpoint}/optimizer.pt", weights_only=False)


@pytest.mark.parametrize("its_own", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused(job, tmp_path, its_own):
    work = job(max_steps=2, save_steps=1)
    if its_own:
        train(work)
        shutil.rmtree(work.checkpoints / "checkpoint-2")
    checkpoint = work.checkpoints / "checkpoint-1"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / WHOLE).touch()
    torch.save({"state": Harmful(tmp_path / "made")}, checkpoint / "optimizer.pt")
    resumed = work.model_copy(update={"resume": True})
    with pytest.raises(OutputError, match=r"checkpoint-1 can't be read.*holds what could run code.*without --resume"):
        train(resumed) if its_own else run_trainer(ReadsAnything(), resumed)
    assert not (tmp_path / "made").exists()
    assert FORCE_VALUES not in os.environ


# --- Failures --------------------------------------------------------------------------------------


def cpu_out_of_memory():
    torch.empty(2**50)


def cuda_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def python_out_of_memory():
    raise MemoryError


@pytest.mark.parametrize("run_out", [cpu_out_of_memory, cuda_out_of_memory, python_out_of_memory])
def test_out_of_memory_is_one_line_of_advice(run_out):
    heal = HealSettings(max_length=1024, micro_batch=4, accumulation=2, gradient_checkpointing=False, rank=16)
    with pytest.raises(AbliterateError) as error, memory_advised(heal):
        run_out()
    text = str(error.value)
    for advice in (
        "1024 tokens, 4 at once", "--max-length 512", "--micro-batch 2 --accumulation 4", "--gradient-checkpointing",
        "--rank 4",
    ):  # fmt: skip
        assert advice in text
    assert "\n" not in text


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes"), memory_advised(HealSettings()):
        raise RuntimeError("shapes cannot be multiplied")


def test_out_of_memory_in_training(job, monkeypatch):
    from trl import DPOTrainer

    monkeypatch.setattr(DPOTrainer, "training_step", lambda *_a, **_k: cuda_out_of_memory())
    with pytest.raises(AbliterateError, match=r"out of memory.*--max-length 48"):
        train(job())


def test_a_loss_that_is_not_finite_stops_it(job):
    with pytest.raises(NonFiniteError, match="--learning-rate"):
        train(job(learning_rate=1e25, warmup=0, max_grad_norm=1e30))


def test_missing_packages_are_named(job, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    for package, extra in (("trl", "abliterate[heal]"), ("tensorboard", "abliterate[heal]"), ("wandb", "wandb")):
        gone = lambda name, *rest, package=package: None if name == package else find(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", gone)
        with pytest.raises(AbliterateError) as error:
            train(job(report_to="wandb" if package == "wandb" else "none"))
        assert f"pip install '{extra}'" in str(error.value)


def test_four_bits_need_bitsandbytes(job, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(AbliterateError, match=r"4bit needs bitsandbytes: pip install 'abliterate\[quantised\]'"):
        train(job(quantise="4bit"))


# --- The sums --------------------------------------------------------------------------------------


def test_answer_log_probs_are_sums_over_the_answer(tiny_handle):
    torch.manual_seed(1)
    ids = torch.randint(3, 400, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    answer = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 4 + [0] * 3])
    with torch.no_grad():
        got = answer_log_probs(tiny_handle.model, ids, mask, answer)
        for row, (first, last) in enumerate([(4, 9), (2, 6)]):
            chances = tiny_handle.model(input_ids=ids[row : row + 1, :last]).logits[0].log_softmax(-1)
            wanted = sum(chances[at - 1, ids[row, at]].item() for at in range(first, last))
            assert got[row].item() == pytest.approx(wanted, abs=1e-4)


def test_the_held_out_numbers_by_hand():
    import numpy as np

    # log-probabilities of chosen and rejected, of the reference, and lengths
    rows = np.array(
        [[-4.0, -9.0, -6.0, -5.0, 2.0, 2.0], [-8.0, -6.0, -8.0, -6.0, 4.0, 2.0], [-5.0, -3.0, -4.0, -5.0, 1, 1]]
    )
    found = held_out_document(rows, beta=0.5)
    assert found["likelihood_accuracy"]["before"]["count"] == 2  # -3 < -2.5; -2 > -3; -4 > -5
    assert found["likelihood_accuracy"]["after"]["count"] == 2  # -2 > -4.5; -2 > -3; -5 < -3
    assert (found["likelihood_accuracy"]["only_before"], found["likelihood_accuracy"]["only_after"]) == (1, 1)
    assert found["reward_accuracy"]["count"] == 1  # margins 3, 0, -1.5
    assert found["reward_margin"] == pytest.approx(0.5)
    losses = [np.log1p(np.exp(-m)) for m in (3, 0, -1.5)]
    assert found["loss"]["after"] == pytest.approx(np.mean(losses))


def test_the_tests_pairs_are_balanced():
    """Neither side is longer, so that learning lengths would not do."""
    rows = colours(36)
    assert sum(len(r["chosen"]) > len(r["rejected"]) for r in rows) in range(9, 28)
