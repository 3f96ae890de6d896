"""`heal` on tiny models: what it reads, what it writes, that it is whole, and that it is true."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from abliterate.common.errors import AbliterateError, ModelError, OutputError, PromptError
from abliterate.common.reporting import Silent
from abliterate.heal import lesson
from abliterate.heal import run as heal_run
from abliterate.heal.run import heal, work_folder
from abliterate.heal.sources import find_sources, with_settings_of_run
from abliterate.measure.document import load_document
from abliterate.models.loading import load
from abliterate.report.document import load_run
from abliterate.report.markdown import markdown
from abliterate.run.measuring import measure_models
from abliterate.run.pipeline import run
from abliterate.settings.heal import HealRunSettings
from abliterate.settings.run import RunSettings, resolve
from documents import check_document
from models import save_tiny, tiny_llama, tiny_tokenizer

PROMPTS = {"target": "bundled", "baseline": "bundled", "validation_prompts": 8, "test_prompts": 8}
TEACHING = {"teaching_prompts": 12, "answer_tokens": 6, "evaluate_every": 4}
HEAL = {"preset": "self", "max_steps": 8, "micro_batch": 8, "rank": 4, "save_steps": 2, "self_teaching": TEACHING}
FILES = [
    "adapter", "curves.json", "curves.png", "heal.json", "model", "report-data.json", "report.html", "results.json",
    "tensorboard",
]  # fmt: skip


def settings(**stages) -> HealRunSettings:
    given = {"prompts": PROMPTS, "measure": {"max_new_tokens": 8}, "load": {"dtype": "float32"}, **stages}
    return HealRunSettings.model_validate({**given, "heal": {**HEAL, **stages.get("heal", {})}})


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The output folder of a run on a tiny model that has a card; read only."""
    folder = tmp_path_factory.mktemp("heal")
    save_tiny(folder / "fox")
    (folder / "fox" / "README.md").write_text("---\nlicense: mit\n---\n# Fox\n")
    stages = {
        "prompts": {**PROMPTS, "train_prompts": 8}, "measure": {"max_new_tokens": 8}, "collect": {"filter": False},
        "search": {"method": "article", "candidates": 1}, "load": {"dtype": "float32"}, "seed": 4,
    }  # fmt: skip
    run(str(folder / "fox"), folder / "run", RunSettings.model_validate(stages))
    return folder / "run"


@pytest.fixture(scope="module")
def healed(ran):
    """The run, healed: (result, folder); read only."""
    out = ran.parent / "healed"
    return heal(str(ran), out, HealRunSettings.model_validate({"load": {"dtype": "float32"}, "heal": HEAL})), out


# --- Where things come from -------------------------------------------------------------------------------


def test_a_run_knows_its_model_and_its_original(ran):
    for given in (ran, ran / "model"):
        sources = find_sources(str(given), None)
        assert (sources.model, sources.original) == (str(ran / "model"), str(ran.parent / "fox"))
        assert sources.run.recipe.method == "article"
    assert find_sources(str(ran), "another").original == "another"


def test_a_plain_folder_knows_nothing(tiny_folder):
    sources = find_sources(str(tiny_folder), None)
    assert (sources.model, sources.original, sources.run) == (str(tiny_folder), None, None)


def test_an_original_that_is_gone_isnt_named(ran, tmp_path):
    shutil.copytree(ran, tmp_path / "run")
    document = json.loads((ran / "results.json").read_text())
    document["model"]["source"] = str(tmp_path / "no-such-folder")
    (tmp_path / "run" / "results.json").write_text(json.dumps(document))
    assert find_sources(str(tmp_path / "run"), None).original is None


def test_prompts_are_split_as_the_run_split_them(ran):
    old = load_document(ran / "results.json")
    found = with_settings_of_run(resolve({"heal.preset": "self"}, environment={}, kind=HealRunSettings), old)
    assert (found.seed, found.prompts.target, found.prompts.test_prompts) == (4, "bundled", 8)
    assert found.measure.max_new_tokens == 8
    assert found.heal.preset == "self"
    named = resolve(
        {"seed": 1, "prompts.test_prompts": 5, "measure.max_new_tokens": 9}, environment={}, kind=HealRunSettings
    )
    found = with_settings_of_run(named, old)
    assert (found.seed, found.prompts.target, found.prompts.test_prompts) == (1, "bundled", 5)
    assert found.measure.max_new_tokens == 9


# --- What is written --------------------------------------------------------------------------------------


def test_what_is_written(healed):
    result, out = healed
    assert sorted(p.name for p in out.iterdir()) == sorted([*FILES, "recipe.safetensors"])
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(result.document))
    assert not work_folder(out).exists()
    assert sorted(p.name for p in out.parent.iterdir()) == ["fox", "healed", "run"]


def test_results_stand_side_by_side_in_the_shapes_of_a_run(healed, ran):
    check_document(healed[1] / "results.json")
    document, old = healed[0].document, json.loads((ran / "results.json").read_text())
    for state in ("original", "edited", "healed"):
        assert document[state].keys() == old["edited"].keys()
    assert document["original"] == old["original"]  # the same prompts, measured the same way
    assert document["edited"]["refusal"] == old["edited"]["refusal"]
    assert document["edited"]["divergence"] == pytest.approx(old["edited"]["divergence"], rel=1e-4)
    assert document["healed"]["divergence"]["answer"] != document["edited"]["divergence"]["answer"]
    assert document["recipe"] == old["recipe"]
    assert document["prompts"]["baseline"]["test"] == old["prompts"]["baseline"]["test"]
    assert document["prompts"]["baseline"]["train"]["count"] == 12
    assert {"teacher", "heal", "measure healed", "save"} <= document["timings_s"].keys()
    assert document["heal"]["settings"]["rank"] == 4


def test_the_saved_model_is_what_was_measured(healed, ran):
    _, out = healed
    again = measure_models(
        str(out / "model"), str(ran.parent / "fox"), RunSettings.model_validate(
            {"prompts": PROMPTS, "measure": {"max_new_tokens": 8}, "load": {"dtype": "float32"}, "seed": 4}
        )
    )  # fmt: skip
    measured = healed[0].document["healed"]
    assert again["edited"]["divergence"] == pytest.approx(measured["divergence"], rel=1e-4)
    assert again["edited"]["loss"]["baseline_answers"] == pytest.approx(measured["loss"]["baseline_answers"], rel=1e-4)


def test_the_adapter_on_the_edited_model_is_the_healed_one(healed, ran):
    from peft import PeftModel

    _, out = healed
    ids = torch.tensor([[1, 30, 40, 50, 60]])
    edited = AutoModelForCausalLM.from_pretrained(ran / "model", dtype=torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    plain = edited(ids).logits
    live = PeftModel.from_pretrained(edited, str(out / "adapter")).eval()(ids).logits
    assert torch.allclose(saved(ids).logits, live, atol=1e-4)
    assert not torch.allclose(plain, live, atol=1e-3)


@pytest.mark.slow
def test_weights_keep_the_dtype_on_disk(ran, tmp_path):
    """A model stored in bfloat16 and healed in float32 is saved in bfloat16."""
    save_tiny(tmp_path / "fox", tiny_llama(dtype=torch.bfloat16))
    save_tiny(tmp_path / "edited", tiny_llama(dtype=torch.bfloat16, seed=1))
    heal(str(tmp_path / "edited"), tmp_path / "out", settings(), original=str(tmp_path / "fox"))
    stored = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    tokenizer_files = ("tokenizer.json", "tokenizer_config.json")
    for name in tokenizer_files:
        assert (tmp_path / "out" / "model" / name).read_bytes() == (tmp_path / "edited" / name).read_bytes()


def test_the_card_tells_it(healed):
    document, out = healed[0].document, healed[1]
    text = (out / "model" / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["license"] == "mit"
    assert metadata["base_model"] == "fox"
    assert {"abliterated", "healed"} <= set(metadata["tags"])
    rows = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:5]] for row in text.splitlines()
            if row.startswith("| ") and "---" not in row}  # fmt: skip
    assert rows[""] == ["original", "edited", "healed"]
    divergences = [f"{document[state]['divergence']['answer']:.3f}" for state in ("edited", "healed")]
    assert rows["divergence, along answers"] == ["0", *divergences]
    for state, cell in zip(("original", "edited", "healed"), rows["degenerate answers"], strict=True):
        assert cell.startswith(f"{document[state]['degenerate']['count']} of 8 = ")
    assert "own answers to 12 training baseline prompts" in text
    assert "Nothing was trained" not in text
    assert "Guardrails are now yours to provide" in text
    assert str(out.parent) not in text


def test_the_report_tells_it(healed):
    document, out = healed[0].document, healed[1]
    loaded = load_run(out)
    assert list(loaded.results.states) == ["original", "edited", "healed"]
    text = markdown(loaded, None)
    assert "# fox, abliterated and healed" in text
    assert "the healed model refuses 0" in text
    assert "Healed by the original model's teaching: its distributions along its own answers to 12 training" in text
    assert "healed against edited" in text
    assert "\n  - healed: " in text
    command = next(line for line in text.splitlines() if line.startswith("abliterate heal "))
    assert "--original fox --preset self" in command
    assert "--max-steps 8" in command and "--teaching-prompts 12" in command and "--seed 4" in command
    page = (out / "report.html").read_text()
    assert f"{document['healed']['degenerate']['count']} of 8" in page
    assert str(out.parent) not in page


def test_answers_to_target_prompts_are_not_written(healed):
    data = json.loads((healed[1] / "report-data.json").read_text())
    assert data["examples"]["target"]
    assert all(
        "answer" not in entry[state] for entry in data["examples"]["target"] for state in entry if state != "prompt"
    )
    assert all("answer" in entry["healed"] for entry in data["examples"]["baseline"])


@pytest.mark.slow
def test_no_original_for_dpo_still_measures_two(ran, tmp_path, pairs_file):
    plain = tmp_path / "edited"
    shutil.copytree(ran / "model", plain)
    result = heal(
        str(plain), tmp_path / "out",
        settings(heal={"preset": "dpo", "data": str(pairs_file), "max_steps": 2, "held_out": 0.2, "quantise": "none",
                       "gradient_checkpointing": False}),
    )  # fmt: skip
    assert result.document["original"] is None
    assert result.document["edited"] and result.document["healed"]
    assert result.document["heal"]["held_out"]["pairs"] > 0
    text = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "|  | edited | healed |" in text
    assert "preference tuning (DPO" in text and "`pairs.jsonl`" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES


# --- What is wrong is said before any work ----------------------------------------------------------------


@pytest.fixture
def refuses(monkeypatch):
    """Fails with an error before any model is loaded; gives its text."""

    def loads(*_args, **_kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(heal_run, "open_model", loads)

    def refuse(model, out, kind=AbliterateError, **options):
        given = options.pop("settings", settings())
        with pytest.raises(kind) as error:
            heal(str(model), out, given, **options)
        assert not out.exists() or any(out.iterdir())
        assert not work_folder(out).exists()
        return str(error.value)

    return refuse


def test_self_without_an_original(refuses, tiny_folder, tmp_path):
    assert "name it with --original" in refuses(tiny_folder, tmp_path / "out")


def test_an_output_that_is_not_free(refuses, ran, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not empty" in refuses(ran, tmp_path / "out", OutputError)


def test_an_output_that_holds_a_model_read(refuses, ran):
    assert "which is read" in refuses(ran, ran, OutputError, overwrite=True)


def test_models_of_other_shapes(refuses, ran, tmp_path):
    save_tiny(tmp_path / "wide", tiny_llama(d_model=64))
    assert "configurations of other shapes" in refuses(
        ran, tmp_path / "out", ModelError, original=str(tmp_path / "wide")
    )


def test_models_with_other_templates(refuses, ran, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("user", "human").replace("m['role']", "'x' + m['role']")
    save_tiny(tmp_path / "fox", tokenizer=tokenizer)
    assert "reads prompts as other tokens" in refuses(ran, tmp_path / "out", ModelError, original=str(tmp_path / "fox"))


def test_a_run_whose_model_is_gone(refuses, ran, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copyfile(ran / "results.json", tmp_path / "run" / "results.json")
    assert "holds results.json but no model/" in refuses(tmp_path / "run", tmp_path / "out", ModelError)


@pytest.mark.parametrize("about", [{"behaviour": {"name": "persona"}}, {"recipe": {"method": "induce"}}])
def test_an_edit_that_teaching_would_undo(refuses, ran, tmp_path, about):
    run_folder = tmp_path / "run"
    shutil.copytree(ran, run_folder)
    document = json.loads((ran / "results.json").read_text())
    (run_folder / "results.json").write_text(json.dumps({**document, **about}))
    assert "would teach that away; use --preset dpo" in refuses(run_folder, tmp_path / "out")


def test_preferences_that_are_not_there(refuses, ran, tmp_path):
    given = settings(heal={"preset": "dpo", "data": str(tmp_path / "no.jsonl")})
    assert "no.jsonl not found" in refuses(ran, tmp_path / "out", PromptError, settings=given)


def test_preferences_that_cant_be_read(refuses, ran, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    given = settings(heal={"preset": "dpo", "data": str(tmp_path / "bad.jsonl")})
    assert "rejected" in refuses(ran, tmp_path / "out", PromptError, settings=given)


def test_dpo_without_trl(refuses, ran, tmp_path, pairs_file, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else found(name, *rest))
    given = settings(heal={"preset": "dpo", "data": str(pairs_file)})
    assert "pip install 'abliterate[heal]'" in refuses(ran, tmp_path / "out", settings=given)


def test_self_in_several_processes(refuses, ran, tmp_path):
    given = settings(heal={"launch": "ddp", "processes": 2})
    assert "trains in one process" in refuses(ran, tmp_path / "out", settings=given)


# --- Interrupted ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed_it_ends_the_same(ran, healed, tmp_path):
    """kill -9 in the middle of the training; --resume ends with the bytes of a run that wasn't killed."""
    out = tmp_path / "out"
    words = [
        sys.executable, "-m", "abliterate.cli", "heal", str(ran), "--out", str(out), "--preset", "self", "--dtype",
        "float32", "--max-steps", "8", "--micro-batch", "8", "--rank", "4", "--save-steps", "2", "--teaching-prompts",
        "12", "--answer-tokens", "6", "--evaluate-every", "4", "--quiet",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    state = work_folder(out) / "checkpoints" / lesson.STATE
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not state.is_file():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    assert not out.exists()
    assert state.is_file()
    done = subprocess.run([*words, "--resume", "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not work_folder(out).exists()
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (out / name).read_bytes() == (healed[1] / name).read_bytes()
    document = json.loads(done.stdout)
    assert document["healed"] == json.loads(json.dumps(healed[0].document["healed"]))


@pytest.mark.slow
def test_resuming_nothing_starts_anew(ran, tmp_path):
    said = []

    class Says(Silent):
        def say(self, text):
            said.append(text)

    heal(str(ran), tmp_path / "out", settings(resume=True, heal={"max_steps": 2}), reporter=Says())
    assert "there is nothing to go on from; starting anew" in said
    assert load(str(tmp_path / "out" / "model")).layers == 4
    assert Path(tmp_path / "out" / "results.json").is_file()
