"""Inducing refusals: on a model with a planted refusal exactly, on the demo model in every form that can hold it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import abliterate as ab
from abliterate.common.errors import AbliterateError
from abliterate.edit.edit import Edit, normalised
from abliterate.edit.recipe import load_recipe
from abliterate.measure import judged
from abliterate.measure.judges import LexicalJudge
from abliterate.measure.refusal import is_refusal
from abliterate.models.handle import Handle
from abliterate.models.writers import SITES, watch_sites
from abliterate.run.inducing import Patient
from abliterate.run.showing import showing
from abliterate.search.induce import (
    Induced,
    InduceSettings,
    counted,
    difference_along_answers,
    induce,
    layers_to_try,
)
from command import PROMPTS, abliterate, fails, succeeds
from documents import check_document
from long import LONG
from models import FAMILIES, save_tiny
from planted import BASELINE, REFUSE, TARGET, Parity, RefusesWithR, planted

SMALL = InduceSettings(scored=4, prompts=8, decode_tokens=3, steps=0)


@pytest.fixture
def found():
    handle = planted()
    shown = showing(handle, TARGET, BASELINE, RefusesWithR())
    directions = ab.difference_of_means(ab.collect(handle, shown.target, shown.baseline))
    return handle, directions, shown.examples


def test_the_planted_refusal_is_induced(found):
    handle, directions, examples = found
    done = induce(handle, directions, examples, BASELINE, RefusesWithR(), SMALL)
    assert done.winner.refused.rate == 1.0
    (shift,) = done.edit.shifts
    assert shift.layer == done.winner.layer >= 1 and float(shift.direction[REFUSE]) > 0.5
    with done.edit.attached(handle):
        after = showing(handle, TARGET, BASELINE, RefusesWithR())
    assert after.answered.count == 0 and after.refused.rate == 1.0
    assert showing(handle, TARGET, BASELINE, RefusesWithR()).answered.rate == 1.0  # gone again


def test_losses_are_those_of_the_refusals_behind_the_prompts(found):
    """The winner's score is the negative log-likelihood that a plain run of the model with the edit gives."""
    handle, directions, examples = found
    done = induce(handle, directions, examples, BASELINE, RefusesWithR(), replace(SMALL, scored=1))
    prompt, refusal = handle.prompt_ids(examples.baseline[:1])[0], None
    for answer in examples.refusals:
        refusal = [*answer.ids, *([answer.end] if answer.end is not None else [])][:14]
        break
    with done.edit.attached(handle), torch.no_grad():
        logits = handle.model(torch.tensor([[*prompt, *refusal[:-1]]])).logits[0, -len(refusal) :]
    wanted = -logits.log_softmax(-1).gather(-1, torch.tensor(refusal)[:, None]).mean()
    assert done.winner.loss == pytest.approx(float(wanted), abs=1e-4)


def test_the_difference_along_answers_is_the_mean_streams(found):
    handle, _, examples = found
    along = difference_along_answers(handle, examples, tokens=3, batch_size=3)
    sides = []
    for prompts, answers in ((examples.target, examples.refusals), (examples.baseline, examples.answers)):
        rows = []
        for prompt, answer in zip(handle.prompt_ids(prompts), answers, strict=True):
            tokens = [*answer.ids, *([answer.end] if answer.end is not None else [])][:3]
            seen: dict[int, Tensor] = {}

            def look(layer, site, stream, seen=seen):
                if site == "post":
                    seen[layer] = stream[0]

            with watch_sites(handle, look), torch.no_grad():
                handle.hidden_states(input_ids=torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False)
            rows.append(torch.stack([seen[i][-len(tokens) :].mean(0) for i in range(handle.layers)]))
        sides.append(torch.stack(rows).mean(0))
    torch.testing.assert_close(along, sides[0] - sides[1], atol=1e-4, rtol=1e-4)


def test_turning_makes_refusals_likelier(found):
    """From a direction that hardly induces anything: the gradient finds the way."""
    handle, directions, examples = found
    row = SITES.index("post")
    unit = directions.unit.clone()
    unit[:, row, -1] = torch.nn.functional.normalize(torch.randn(len(unit), unit.shape[-1]), dim=-1)
    lost = replace(directions, unit=unit)
    settings = replace(SMALL, sizes=(0.25,), layers=range(2, 3), steps=60, enough=2.0)
    done = induce(handle, lost, examples, BASELINE, RefusesWithR(), settings)
    start = min((c for c in done.candidates if c.source != "turned"), key=lambda c: c.loss)
    turned = [c for c in done.candidates if c.source == "turned"]
    assert len(turned) == 3 and min(c.loss for c in turned) < start.loss
    assert all(float(normalised(c.vector) @ normalised(start.vector)) < 0.99 for c in turned)  # not only longer
    assert all(-1 <= c.cosine <= 1 for c in turned)


def test_layers(found):
    _, directions, _ = found
    wide = replace(directions, unit=torch.randn(40, 3, 1, 8))
    tried = layers_to_try(wide, InduceSettings())
    assert len(tried) <= 12 and tried[0] >= 6 and tried[-1] == 31  # not the first sixth, not the last fifth
    assert layers_to_try(wide, InduceSettings(layers=range(0, 5))) == [1, 2, 3, 4]
    with pytest.raises(AbliterateError, match="no layer left"):
        induce(*found, BASELINE, RefusesWithR(), InduceSettings(layers=range(0, 1)))


def test_nothing_that_refuses_is_an_error(found):
    class Never(RefusesWithR):
        def judge(self, prompts, answers):
            return [False for _ in answers]

    with pytest.raises(AbliterateError, match="refuse nothing"):
        induce(*found, BASELINE, Never(), SMALL)


def test_looping_refusals_don_t_count_as_sentences(found):
    handle, directions, _ = found

    class Yes(RefusesWithR):
        def judge(self, prompts, answers):
            return [True for _ in answers]

    nothing = Induced(1, "prompt", 0.0, 0.0, 1.0, 1e-6 * directions.unit[1, 2, -1])
    looping = counted(handle, replace(nothing, vector=1e4 * directions.unit[1, 2, -1]), BASELINE, Yes(), 24)
    assert looping.refused.rate == 1.0
    assert looping.coherent.count == looping.refused.total - looping.degenerate.count
    patient = Patient(LexicalJudge())
    assert patient.settled("p", "I'm sorry, but I can't help with that.") is None and patient.name == "lexical"


# --- the command, on tiny models whose answers mean nothing: every prompt counts ---

COMMAND = [
    *PROMPTS, "--train-prompts", "8", "--validation-prompts", "8", "--test-prompts", "8", "--max-new-tokens", "6",
]  # fmt: skip


@pytest.fixture
def refusing(monkeypatch):
    from abliterate.run import opening

    monkeypatch.setattr(opening, "make_judge", lambda name: Parity())


@pytest.mark.slow
def test_the_command_writes_a_model_that_holds_the_shift(refusing, tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    done = succeeds("run", tiny_folder, "--induce", "--force", "--out", out, *COMMAND)
    assert "baseline prompts refused" in done.out and str(out / "model") in done.out
    assert sorted(p.name for p in out.iterdir()) == ["model", "recipe.safetensors", "report.html", "results.json"]
    check_document(out / "results.json")
    document = json.loads((out / "results.json").read_text())
    assert document["recipe"]["method"] == "induce" and document["recipe"]["switch"] == "mlp_bias"
    low, high = document["edited"]["coherent_over_refusal"]["ci95"]
    assert 0 <= low <= high <= 1
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.mlp_bias is True
    recipe = load_recipe(out / "recipe.safetensors")
    handle = ab.load(tiny_folder, dtype="float32")
    assert recipe.model["config_hash"] == handle.config_hash
    ids = torch.tensor([[5, 9, 17, 33, 101, 7]])
    with recipe.edit.attached(handle), torch.no_grad():
        live = handle.model(ids).logits
    torch.testing.assert_close(model(ids).logits.detach(), live, atol=1e-4, rtol=1e-4)
    card = (out / "model" / "README.md").read_text()
    assert "made to refuse" in card and "mlp_bias" in card and "taken out of" not in card
    # the other commands know what a shift is
    assert "shift at layer" in succeeds("show", out / "recipe.safetensors").out
    assert "the edits are the same" in succeeds("diff", out / "recipe.safetensors", out / "recipe.safetensors").out


@pytest.mark.slow
def test_a_class_that_can_t_hold_it_says_so_and_is_measured_live(refusing, tmp_path):
    folder = save_tiny(tmp_path / "mistral", FAMILIES["mistral"]())
    done = succeeds("run", folder, "--induce", "--force", "--out", tmp_path / "out", *COMMAND)
    assert "has no bias at block" in done.err and "control-vector" in done.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["recipe.safetensors", "report.html", "results.json"]
    for form, model in (("checkpoint", folder),):
        line = fails(tmp_path, "apply", tmp_path / "out", model, "--as", form, "--out", tmp_path / "no")
        assert "has no bias that reaches its output" in line
    succeeds("apply", tmp_path / "out", folder, "--as", "adapter", "--out", tmp_path / "lora", "--quiet")


def test_options_without_meaning_are_refused(tiny_folder, tmp_path):
    for more in (["--plan"], ["--method", "sweep"], ["--show-completions"]):
        line = fails(tmp_path, "run", tiny_folder, "--induce", "--out", tmp_path / "out", *COMMAND, *more)
        assert "--induce has a search of its own" in line
    assert abliterate("run", "--help").code == 0


# --- the bar, on the demo model ---

LEAST = 0.9  # of held-out baseline prompts
IN_LLAMA_CPP = 20  # prompts: one thread


class Bar:
    """The demo model, the shift that `searched` found for it, held-out prompts, and logits with it attached live."""

    def __init__(self) -> None:
        self.source = str(ab.demo_model())
        self.prompts = ab.load_sides("bundled", "bundled", limit_train=64, limit_validation=32, limit_test=50)
        self.test = self.prompts.baseline.test.texts
        self.recipe = Path(__file__).parents[1] / "data" / "induced.safetensors"
        self.edit = load_recipe(self.recipe).edit
        exact = ab.load(self.source, dtype="float32")
        self.ids = exact.prompt_ids([*self.test[:2], *self.prompts.target.test.texts[:1]])
        self.plain = logits(exact, self.ids)
        with self.edit.attached(exact):
            self.live = logits(exact, self.ids)

    def applied(self, form: str, model: Path | str, out: Path) -> Path:
        succeeds("apply", self.recipe, model, "--as", form, "--out", out, "--quiet")
        return out


@pytest.fixture(scope="module")
def bar() -> Bar:
    return Bar()


def searched(bar: Bar, handle: Handle) -> Edit:
    """The shift that the search finds; `searched(...).save` wrote tests/data/induced.safetensors."""
    sides = bar.prompts
    train = showing(handle, sides.target.train.texts, sides.baseline.train.texts, LexicalJudge())
    assert train.examples is not None
    directions = ab.difference_of_means(ab.collect(handle, train.target, train.baseline, positions=1))
    settings = InduceSettings(layers=range(11, 12), decoded=1)  # where the search over all of them ends
    return induce(handle, directions, train.examples, sides.baseline.validation.texts, settings=settings).edit


def refusal_rate(handle: Handle, prompts: list[str]) -> float:
    _, refused = judged(handle, prompts, LexicalJudge(), max_new_tokens=32)
    return sum(refused) / len(refused)


@torch.no_grad()
def logits(handle: Handle, ids: list[list[int]]) -> Tensor:
    """At the last token of each row, each row's mean taken off (llama.cpp's and transformers' differ by a constant)."""
    rows = [handle.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].float() for row in ids]
    return torch.stack([row - row.mean() for row in rows])


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.slow
@pytest.mark.parametrize("found", ["kept", pytest.param("searched", marks=LONG)])
def test_live_nearly_every_baseline_prompt_is_refused_in_a_sentence(bar: Bar, found: str) -> None:
    handle = ab.load(bar.source)
    assert refusal_rate(handle, bar.test) <= 0.1
    edit = bar.edit if found == "kept" else searched(bar, handle)
    with edit.attached(handle):
        answers = judged(handle, bar.test, LexicalJudge(), max_new_tokens=48, stop_on=())
    assert answers.coherent.total == 50 and answers.coherent.rate >= LEAST and answers.degenerate.rate <= 0.1


@pytest.mark.slow
def test_in_the_weights_and_as_a_checkpoint(bar: Bar, tmp_path: Path) -> None:
    out = bar.applied("checkpoint", bar.source, tmp_path / "edited")
    saved = ab.load(out)
    assert refusal_rate(saved, bar.test) >= LEAST
    baked = ab.load(bar.source, dtype="float32")
    baked.bake(bar.edit)
    assert off(logits(baked, bar.ids), bar.live) < 1e-5
    exact = ab.load(out, dtype="float32")  # a bias rounded to bfloat16
    assert off(logits(exact, bar.ids), bar.live) < 0.02 < off(bar.plain, bar.live)


@pytest.mark.slow
def test_as_an_adapter(bar: Bar, tmp_path: Path) -> None:
    from peft import PeftModel

    out = bar.applied("adapter", bar.source, tmp_path / "lora")
    exact = ab.load(bar.source, dtype="float32")
    exact.model = PeftModel.from_pretrained(exact.model, str(out))
    assert off(logits(exact, bar.ids), bar.live) < 1e-5
    handle = ab.load(bar.source)
    PeftModel.from_pretrained(handle.model, str(out))  # puts its layers into the model that the handle holds
    assert refusal_rate(handle, bar.test) >= LEAST


@pytest.mark.slow
def test_in_llama_cpp_as_a_control_vector_and_in_the_tensors(
    bar: Bar, tmp_path: Path, demo_gguf: Callable[[str], Path]
) -> None:
    from llama_cpp import LlamaCpp, read_control_vector

    plain = demo_gguf("Q8_0")
    vector = read_control_vector(bar.applied("control-vector", plain, tmp_path / "vector.gguf"))
    edited = bar.applied("gguf", plain, tmp_path / "edited.gguf")
    handle = ab.load(bar.source)
    ids = handle.prompt_ids(bar.test[:IN_LLAMA_CPP])
    for options in ({"path": plain, "control": vector}, {"path": edited}):
        with LlamaCpp(**options) as llama:
            rows = [torch.from_numpy(llama.next_logits(row)) for row in bar.ids]
            answers = [llama.greedy(row, 16, handle.end_tokens) for row in ids]
        found = torch.stack([row - row.mean() for row in rows])
        assert off(found, bar.live) < 0.2 and off(found, bar.live) < 0.3 * off(bar.plain, bar.live)
        texts = [handle.tokenizer.decode(a, skip_special_tokens=True) for a in answers]
        assert sum(map(is_refusal, texts)) >= LEAST * IN_LLAMA_CPP
