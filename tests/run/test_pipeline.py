"""The main job on a tiny random model: what it writes, that it is whole, and that it is true."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from abliterate.common.errors import NothingToDoError
from abliterate.common.reporting import Silent
from abliterate.edit.recipe import Recipe, load_recipe
from abliterate.measure.document import RunDocument
from abliterate.models.loading import load
from abliterate.models.recipes import tensors_for
from abliterate.run import opening, pipeline
from abliterate.run.measuring import measure_models
from abliterate.run.pipeline import run
from abliterate.settings.run import RunSettings
from documents import check_document
from models import CHATML, save_tiny, tiny_llama, tiny_tokenizer
from planted import BASELINE, TARGET, planted

FEW = {"target": "bundled", "baseline": "bundled", "train_prompts": 8, "validation_prompts": 8, "test_prompts": 8}

ARTICLE = {"method": "article", "candidates": 1}  # the shortest search
SWEEP = {"method": "sweep"}


def settings(*, filter: bool = False, measure: dict | None = None, **stages) -> RunSettings:
    stages.setdefault("prompts", FEW)
    stages.setdefault("search", ARTICLE)
    stages.setdefault("collect", {"filter": filter})
    return RunSettings.model_validate({"measure": {"max_new_tokens": 8, **(measure or {})}, **stages})


@pytest.fixture(scope="module")
def done(tiny_folder, tmp_path_factory):
    """One run of the tiny model (float32, tied) and its folder."""
    out = tmp_path_factory.mktemp("run") / "out"
    torch.manual_seed(7)  # a run must not depend on what was drawn before it
    return run(str(tiny_folder), out, settings(search=SWEEP)), out


def numbers(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_what_is_written(done):
    result, out = done
    written = ["model", "recipe.safetensors", "report-data.json", "report.html", "results.json"]
    assert sorted(p.name for p in out.iterdir()) == written
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert numbers(out) == json.loads(json.dumps(result.document))


def test_results(done, tiny_folder):
    check_document(done[1] / "results.json")
    document = numbers(done[1])
    assert document["schema"] == 1
    for name in ("model", "recipe", "settings", "environment"):
        assert document[name]
    assert document["model"]["source"] == str(tiny_folder)
    assert document["settings"]["measure"]["max_new_tokens"] == 8
    for name in ("original", "edited"):
        model = document[name]
        for rate, count in (("refusal", "refused"), ("over_refusal", "refused"), ("degenerate", "count")):
            assert model[rate]["total"] == 8
            assert model[rate]["rate"] == model[rate][count] / 8
            assert model[rate]["ci95"][0] <= model[rate]["rate"] <= model[rate]["ci95"][1]
        assert model["loss"]["baseline_answers"] > 0
    assert document["original"]["divergence"] is None
    divergence = document["edited"]["divergence"]
    assert divergence["prompts"] == 8
    assert divergence["first_token"] > 0
    assert divergence["answer"] > 0
    assert document["edited"]["loss"]["baseline_answers"] > document["original"]["loss"]["baseline_answers"]
    assert document["candidates"]
    assert {"layer", "site", "position"} <= set(document["candidates"][0])
    assert {"load", "collect", "search", "measure original", "measure edited", "save"} <= set(document["timings_s"])
    assert all(seconds >= 0 for seconds in document["timings_s"].values())


def test_results_are_strict_json(done):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((done[1] / "results.json").read_text(), parse_constant=refuse)


def test_no_counts_of_a_filter_that_was_off(done):
    assert numbers(done[1])["prompts"]["filter"] is None


def test_saved_model_is_the_original_with_the_recipe_attached(done, tiny_folder):
    _, out = done
    original = load(tiny_folder, dtype="float32")
    saved = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    ids = torch.tensor([original.prompt_ids(["Tell me about rivers and how they move"])[0]])
    recipe = load_recipe(out / "recipe.safetensors")
    assert recipe.model["config_hash"] == original.config_hash
    assert recipe.tensors == tensors_for(Recipe(recipe.edit), tiny_folder)  # also where baking untied the head
    assert (recipe.model["tied"], recipe.model["head"]) == (original.tied, "lm_head.weight")
    plain = original.model(ids).logits
    with original.attached(recipe.edit):
        live = original.model(ids).logits
    assert not torch.allclose(live, plain, atol=1e-2)
    assert torch.allclose(saved(ids).logits, live, atol=1e-4)


def test_direction_is_taken_out_of_every_writer(done, tiny_folder):
    """As much of it as the recipe says: a share 1 - a of what was along r is left."""
    from abliterate.models.writers import find_writers

    _, out = done
    original, saved = load(tiny_folder, dtype="float32"), load(out / "model", dtype="float32")
    edit = load_recipe(out / "recipe.safetensors").edit
    for writer in find_writers(saved):
        before, after = (h.model.get_parameter(writer.name).movedim(writer.axis, -1) for h in (original, saved))
        if writer.name not in edit.parts:
            assert torch.equal(before, after)
            continue
        part = edit.parts[writer.name]
        for direction, strength in zip(torch.from_numpy(part.directions), part.strengths, strict=True):
            assert torch.allclose(after @ direction, (1 - strength) * (before @ direction), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("said", [True, False], ids=["config says", "config silent"])
def test_dtype_is_kept(tmp_path, dtype, said):
    folder = save_tiny(tmp_path / "model", tiny_llama(dtype=dtype))
    if not said:
        config = json.loads((folder / "config.json").read_text())
        del config["dtype"]
        (folder / "config.json").write_text(json.dumps(config))
    run(str(folder), tmp_path / "out", settings())
    assert {w.dtype for w in load_file(tmp_path / "out" / "model" / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype="auto").dtype == dtype


def test_tied_embedding_is_untied(done, tiny_folder):
    model = done[1] / "model"
    before, after = load_file(tiny_folder / "model.safetensors"), load_file(model / "model.safetensors")
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_keep_tied(tiny_folder, tmp_path):
    run(str(tiny_folder), tmp_path / "out", settings(keep_tied=True))
    model = tmp_path / "out" / "model"
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(model / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "head stay tied" in (model / "README.md").read_text()


def test_tokenizer_and_templates_are_kept(tmp_path):
    """Loading sets a pad token and pads on the left; that is ours and not the model's."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    folder = save_tiny(tmp_path / "model", tokenizer=tokenizer)
    run(str(folder), tmp_path / "out", settings())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / "model" / name).read_bytes() == (folder / name).read_bytes(), name
    saved = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert (saved.pad_token, saved.padding_side) == (None, "right")
    assert saved.chat_template == tokenizer.chat_template


def test_odd_generation_config_is_kept(tmp_path, monkeypatch):
    """Published models have such; transformers refuses to save them, which must not cost the whole run."""
    folder = save_tiny(tmp_path / "model")
    odd = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": [2, 0]}
    (folder / "generation_config.json").write_text(json.dumps(odd))

    save = GenerationConfig.save_pretrained

    def strict(self, *args, **options):  # versions of transformers differ in what they let pass
        if self.temperature == 0.6:
            raise ValueError("temperature is set but do_sample is False")
        save(self, *args, **options)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", strict)
    run(str(folder), tmp_path / "out", settings())
    assert json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text()) == odd
    monkeypatch.undo()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert (loaded.generation_config.temperature, loaded.generation_config.top_p) == (0.6, 0.9)


@pytest.mark.slow
def test_same_seed_same_bytes(done, tiny_folder, tmp_path):
    torch.manual_seed(8)
    run(str(tiny_folder), tmp_path / "elsewhere", settings(search=SWEEP))
    files = sorted(p.relative_to(done[1]) for p in done[1].rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "elsewhere") for p in (tmp_path / "elsewhere").rglob("*.*"))
    for name in files:
        if name.name not in ("results.json", "report.html"):  # they have timings
            assert (done[1] / name).read_bytes() == (tmp_path / "elsewhere" / name).read_bytes(), name


def test_another_seed_takes_other_prompts(done, tiny_folder, tmp_path):
    result = run(str(tiny_folder), tmp_path / "out", settings(seed=1))
    before = done[0].document["prompts"]["target"]["train"]["sha256"]
    assert result.document["prompts"]["target"]["train"]["sha256"] != before


@pytest.mark.slow
def test_saved_activations_give_the_same_directions(done, tiny_folder, tmp_path):
    pipeline.collect_to_file(str(tiny_folder), tmp_path / "acts.safetensors", settings())
    result = run(str(tiny_folder), tmp_path / "out", settings(search=SWEEP), activations=tmp_path / "acts.safetensors")
    before = load_recipe(done[1] / "recipe.safetensors").edit
    assert np.array_equal(result.edit.directions, before.directions)
    assert np.array_equal(result.edit.strengths, before.strengths)
    assert result.edit.writers == before.writers


def test_article_takes_the_first_that_passes(tiny_folder, tmp_path):
    """A random model refuses nothing, so every candidate passes and the order decides."""
    result = run(str(tiny_folder), tmp_path / "out", settings(search={"method": "article", "candidates": 3}))
    assert result.document["recipe"]["method"] == "article"
    first = result.document["candidates"][0]
    assert [result.document["recipe"]["direction"][k] for k in ("layer", "site", "position")] == [
        first[k] for k in ("layer", "site", "position")
    ]


@pytest.mark.slow
def test_layers_limit_what_is_edited(tiny_folder, tmp_path):
    result = run(str(tiny_folder), tmp_path / "out", settings(search={**SWEEP, "layers": "1-2"}))
    assert result.edit.writers
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in result.edit.writers)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder, tmp_path / "out" / "model"))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed == set(result.edit.writers)
    # The embedding is not edited, so it stays tied.
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["tie_word_embeddings"] is True


class PromptJudge:
    """Calls every answer to a bundled target prompt a refusal, but for every fourth."""

    name = "by prompt"

    def __init__(self) -> None:
        from abliterate.prompts.sets import load_prompts

        self.targets = set(load_prompts("bundled", role="target"))
        self.answers: set[str] = set()

    def judge(self, prompts, answers):
        self.answers.update(a for p, a in zip(prompts, answers, strict=True) if p in self.targets)
        return [prompt in self.targets and i % 4 != 3 for i, prompt in enumerate(prompts)]

    def settled(self, prompt, partial_answer):
        return None


class Lines(Silent):
    """A reporter that keeps its lines."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text):
        self.said.append(text)


@pytest.mark.slow
def test_log_says_how_many_prompts_the_filter_kept(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "make_judge", lambda spec: PromptJudge())
    prompts = {**FEW, "train_prompts": 16, "validation_prompts": 12}
    log = Lines()
    result = run(str(tiny_folder), tmp_path / "out", settings(filter=True, prompts=prompts, search=SWEEP), reporter=log)
    assert "train: 12 of 16 target prompts refused and 16 of 16 baseline prompts answered; these count" in log.said
    assert "validation: 9 of 12 target prompts refused and 12 of 12 baseline prompts answered; these count" in log.said
    assert result.document["prompts"]["filter"]["refused"]["refused"] == 12
    assert result.document["prompts"]["filter"]["refused"]["total"] == 16


@pytest.mark.slow
def test_answers_to_target_prompts_are_nowhere(tiny_folder, tmp_path, monkeypatch):
    judge = PromptJudge()
    monkeypatch.setattr(opening, "make_judge", lambda spec: judge)
    log = Lines()
    longer = settings(filter=True, search=SWEEP, measure={"max_new_tokens": 16}, force=True)
    run(str(tiny_folder), tmp_path / "out", longer, reporter=log)
    written = [p.read_bytes().decode(errors="replace") for p in (tmp_path / "out").rglob("*.*")]
    answers = [a.strip() for a in judge.answers if len(a.strip()) > 8]
    assert answers
    for text in ["\n".join(log.said), *written]:
        for answer in answers:
            assert answer not in text
            assert json.dumps(answer)[1:-1] not in text


def test_model_that_does_not_refuse_writes_nothing(tiny_folder, tmp_path):
    with pytest.raises(NothingToDoError, match=r"0 of 8 target prompts \(0%, 95% interval 0% to 32%\)") as stopped:
        run(str(tiny_folder), tmp_path / "out", settings(filter=True))
    assert stopped.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_force_goes_on(tiny_folder, tmp_path):
    result = run(str(tiny_folder), tmp_path / "out", settings(filter=True, force=True))
    assert result.document["prompts"]["filter"]["refused"] == {
        "refused": 0, "total": 8, "rate": 0.0, "ci95": [0.0, pytest.approx(0.3244, abs=1e-3)],
    }  # fmt: skip


def test_missed_removal_writes_nothing(tiny_folder, tmp_path, monkeypatch):
    from abliterate.common.errors import WriterError

    monkeypatch.setattr(pipeline, "in_force", lambda *args, **kwargs: nullcontext())
    with pytest.raises(WriterError, match="nothing was written"):
        run(str(tiny_folder), tmp_path / "out", settings())
    assert list(tmp_path.iterdir()) == []


def test_edited_model_against_its_original(done, tiny_folder):
    document = measure_models(str(done[1] / "model"), str(tiny_folder), settings())
    assert RunDocument.model_validate(document).to_json() == json.loads(json.dumps(document))
    for name in ("original", "edited"):
        for rate in ("refusal", "over_refusal", "degenerate"):
            assert document[name][rate] == done[0].document[name][rate]
    assert document["edited"]["divergence"]["first_token"] == pytest.approx(
        done[0].document["edited"]["divergence"]["first_token"], rel=0.05
    )
    same = measure_models(str(tiny_folder), str(tiny_folder), settings())
    assert same["edited"]["divergence"]["first_token"] == pytest.approx(0, abs=1e-6)


def test_gpt2_whose_layers_are_transposed(tmp_path):
    from models import FAMILIES

    folder = save_tiny(tmp_path / "model", FAMILIES["gpt2"]())
    result = run(str(folder), tmp_path / "out", settings(load={"dtype": "float32"}))
    assert result.document["recipe"]["proof"]["edited"]["component"] < 1e-5
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")


def test_sharded_source(tmp_path):
    folder = tmp_path / "model"
    tiny_llama(tied=False).save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    run(str(folder), tmp_path / "out", settings())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype="auto").dtype == torch.float32


def test_source_is_not_changed(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    run(str(folder), tmp_path / "out", settings())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_damaged_source_is_seen_whatever_token_reads_it(tmp_path):
    """One embedding row that the first forward pass doesn't touch."""
    from abliterate.common.errors import NonFiniteError

    folder = save_tiny(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][399, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.embed_tokens\.weight"):
        load(folder)


# --- Interrupted ----------------------------------------------------------------------------------------------------


TOMORROW = """
import datetime, sys
import transformers.utils.chat_template_utils as rendering

class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=1)

rendering.datetime = Tomorrow
print("tomorrow it is", file=sys.stderr)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_recipe_bit_for_bit(tmp_path):
    """kill -9 in the middle of the fit; --resume, on another day, ends with the bytes of a run that wasn't killed."""
    tokenizer, tomorrow = tiny_tokenizer(), tmp_path / "tomorrow"
    tokenizer.chat_template = "{{ strftime_now('%a %d') }} " + CHATML  # writes today into every prompt
    model = save_tiny(tmp_path / "model", planted().model, tokenizer)
    tomorrow.mkdir()
    (tomorrow / "sitecustomize.py").write_text(TOMORROW)
    for side, texts in (("target", TARGET), ("baseline", BASELINE)):
        (tmp_path / f"{side}.txt").write_text("".join(f"{text} {n}\n" for text in texts for n in range(4)))
    (tmp_path / "says_r.toml").write_text(
        'name = "letters"\nabout = "says R"\nkind = "prompts"\n[words]\nshows = "refused"\nrate = "refusals"\n'
        'over = "over-refusals"\n[prompts]\ntarget = "target.txt"\nbaseline = "baseline.txt"\n'
        "[judge]\npatterns = ['^R']\nthreshold = 0.1\nleast_words = 1\ndistinct = 1\n"
    )
    words = [
        sys.executable, "-m", "abliterate.cli", "run", str(model), "--behaviour", str(tmp_path / "says_r.toml"),
        "--train-prompts", "16", "--validation-prompts", "8", "--test-prompts", "4", "--max-new-tokens", "8",
        "--steps", "8",
    ]  # fmt: skip
    whole, killed, state = tmp_path / "whole", tmp_path / "killed", tmp_path / ".killed.fit.safetensors"
    subprocess.run([*words, "--out", str(whole)], check=True, capture_output=True)
    process = subprocess.Popen([*words, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not state.exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert state.exists() and not killed.exists()
    path = os.pathsep.join([str(tomorrow), *filter(None, [os.environ.get("PYTHONPATH")])])
    later = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": path}}
    done = subprocess.run([*words, "--out", str(killed), "--resume"], check=True, **later)
    assert "tomorrow it is" in done.stderr
    assert "going on from step" in done.stderr
    recipes = [(out / "recipe.safetensors").read_bytes() for out in (whole, killed)]
    assert recipes[0] == recipes[1]
    assert not list(tmp_path.glob(".*"))


def test_a_model_that_hardly_refuses_is_left_alone(tiny_folder, tmp_path):
    with pytest.raises(NothingToDoError, match=r"hardly refuses: \d+ of 8 target prompts .*--force"):
        run(str(tiny_folder), tmp_path / "out", settings(filter=True))
    assert not (tmp_path / "out").exists()
