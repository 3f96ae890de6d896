"""`self`: what the original teaches, how it is learnt, and that a killed training ends with the same weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from abliterate.common.errors import AbliterateError, ModelError, OutputError
from abliterate.common.reporting import Silent, untold
from abliterate.heal import lesson
from abliterate.heal import self_taught as own
from abliterate.heal import teacher as teaching
from abliterate.heal.training import Job
from abliterate.measure.decode import decode
from abliterate.measure.divergence import compare, make_reference, reference_divergence
from abliterate.measure.judges import LexicalJudge
from abliterate.measure.rates import Rate
from abliterate.models.loading import load
from abliterate.settings.heal import HealRunSettings
from models import handle_of, save_tiny, tiny_llama

STEPS = 12


def settings(**heal) -> HealRunSettings:
    own_fields = heal.pop("own", {})
    few = {"teaching_prompts": 16, "answer_tokens": 8, "evaluate_every": 4, "hold_batch": 4, **own_fields}
    short = {"max_steps": STEPS, "micro_batch": 8, "rank": 4, "save_steps": 2, "learning_rate": 5e-3, **heal}
    return HealRunSettings.model_validate(
        {
            "load": {"dtype": "float32"},
            "prompts": {"target": "bundled", "baseline": "bundled", "validation_prompts": 8, "test_prompts": 8},
            "heal": {"preset": "self", "self_teaching": few, **short},
        }
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model and a damaged copy of it: (original, edited); read only."""
    folder = tmp_path_factory.mktemp("own")
    damaged = tiny_llama()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in damaged.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return save_tiny(folder / "original"), save_tiny(folder / "edited", damaged)


@pytest.fixture
def job(folders, tmp_path):
    def make(name="work", resume=False, **heal):
        original, edited = folders
        return Job(
            model=str(edited), original=str(original), folder=tmp_path / name, settings=settings(**heal), resume=resume
        )

    return make


@pytest.fixture(scope="module")
def taught(folders):
    """The lessons' prompts, and what the original says; two of its answers stand for the refusals it doesn't give."""
    sides = teaching.open_lessons(settings())
    handle = load(folders[0], dtype="float32")
    teacher = teaching.make_teacher(handle, sides, LexicalJudge(), answer_tokens=8)
    ids = handle.prompt_ids(sides.target.train.texts[:2])
    teacher.refused, teacher.refusals = ids, [a.whole[:4] for a in decode(handle, ids, max_new_tokens=4)]
    return sides, teacher


def weights(training) -> dict[str, torch.Tensor]:
    return load_file(training.adapter / "adapter_model.safetensors")


def adapter_bytes(job) -> list[bytes]:
    return [path.read_bytes() for path in sorted(job.adapter.iterdir())]


# --- What is kept of the original -----------------------------------------------------------------------


def random_reference(kept: int | None = None):
    """A tiny model's reference along three answers, and another model's log-probabilities there (float64)."""
    handle = handle_of(tiny_llama())
    ids = handle.prompt_ids(["rivers", "a longer prompt about rivers", "tea"])
    kept = kept or 400
    reference = make_reference(handle, ids, decode(handle, ids, max_new_tokens=6), answer_tokens=6, kept=kept)
    torch.manual_seed(2)
    others = [torch.randn(len(a), 400, dtype=torch.float64).log_softmax(-1) for a in reference.answers]
    return reference, others


@pytest.mark.parametrize("kept", [5, 64, 399])
def test_the_fast_divergence_is_the_reference_divergence(kept):
    reference, others = random_reference(kept)
    picked = [2, 0]
    fast = teaching.Following(reference).loss(picked, [others[i] for i in picked])
    exact = torch.stack([reference_divergence(reference, i, others[i]).mean() for i in picked]).mean()
    assert float(fast) == pytest.approx(float(exact), abs=1e-5)


def test_the_fast_divergence_has_the_same_gradient():
    reference, others = random_reference(16)
    gradients = []
    for way in (
        lambda own_: teaching.Following(reference).loss([1], [own_]),
        lambda own_: reference_divergence(reference, 1, own_).mean(),
    ):
        logits = others[1].clone().requires_grad_(True)
        way(logits.log_softmax(-1)).backward()
        gradients.append(logits.grad)
    assert torch.allclose(*gradients, atol=1e-6)
    assert gradients[0].abs().max() > 1e-3


def test_thinning_keeps_the_mass():
    reference, _ = random_reference()
    thin, _ = random_reference(16)
    for whole, part in zip(reference.logprobs, thin.logprobs, strict=True):
        assert part.shape[1] == 17
        assert torch.allclose(part.exp().sum(-1), torch.ones(len(part)), atol=1e-5)
        assert torch.equal(part[:, :16], whole[:, :16])


def test_a_teacher_read_again_is_the_same(taught, tmp_path):
    _, teacher = taught
    teacher.save(tmp_path / "teacher.safetensors", "a key")
    read = teaching.Teacher.read(tmp_path / "teacher.safetensors", "a key")
    assert (read.refused, read.refusals, read.asked, read.reads) == (
        teacher.refused, teacher.refusals, teacher.asked, teacher.reads,
    )  # fmt: skip
    for name in ("lessons", "held_out"):
        one, other = getattr(read, name), getattr(teacher, name)
        assert (one.rows, one.answers, one.loss) == (other.rows, other.answers, other.loss)
        assert all(map(torch.equal, one.tokens, other.tokens))
        assert all(map(torch.equal, one.logprobs, other.logprobs))
    with pytest.raises(OutputError, match="another model, prompts or settings"):
        teaching.Teacher.read(tmp_path / "teacher.safetensors", "another key")


def test_lessons_are_of_neither_validation_nor_test(taught):
    sides, _ = taught
    for side in (sides.target, sides.baseline):
        train, validation, test = (set(part.texts) for part in side)
        assert len(train) == 16
        assert not train & validation and not train & test and not validation & test


def test_refusals_are_not_lessons(folders, taught):
    class RefusesRivers(LexicalJudge):
        def judge(self, prompts, answers):
            return [prompt in refused for prompt in prompts]

        def settled(self, prompt, partial_answer):
            return None

    sides, _ = taught
    refused = {*sides.target.train.texts[:3], *sides.baseline.train.texts[:2]}
    handle = load(folders[0], dtype="float32")
    teacher = teaching.make_teacher(handle, sides, RefusesRivers(), answer_tokens=8)
    assert len(teacher.lessons.rows) == 14
    texts = [*sides.target.train.texts[:3], *sides.baseline.train.texts[:2]]
    assert teacher.refused == handle.prompt_ids(texts)  # over-refusals are held away from too
    assert all(teacher.refusals)


def test_an_original_that_answers_nothing(folders, taught):
    class RefusesAll(LexicalJudge):
        def judge(self, prompts, answers):
            return [True for _ in prompts]

    with pytest.raises(AbliterateError, match="answers 0 of 16 baseline prompts"):
        teaching.make_teacher(load(folders[0]), taught[0], RefusesAll(), answer_tokens=8)


# --- Learning -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_wins_divergence_back_and_leaves_the_model_alone(job, taught):
    sides, teacher = taught
    handle = load(job().model, dtype="float32")
    before = {name: p.clone() for name, p in handle.model.named_parameters()}
    training = own.train(job(), handle=handle, teacher=teacher, sides=sides)
    start, end = (training.results["validation"][name]["eval_divergence"] for name in ("before", "after"))
    assert start == pytest.approx(compare(handle, teacher.held_out).answer, rel=1e-5)
    assert end < 0.8 * start
    after = dict(handle.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and not after[name].requires_grad for name in before)
    assert [p["step"] for p in training.history] == list(range(STEPS + 1))
    assert all(p["loss"] > 0 for p in training.history[1:])


@pytest.mark.slow
def test_the_adapter_heals_plain_peft(job, taught):
    from peft import PeftModel

    training = own.train(job(), teacher=taught[1], sides=taught[0])
    handle = load(job().model, dtype="float32")
    handle.model = PeftModel.from_pretrained(handle.model, str(training.adapter)).merge_and_unload()
    healed = compare(handle, taught[1].held_out).answer
    assert healed == pytest.approx(training.results["validation"]["after"]["eval_divergence"], abs=1e-4)
    assert sorted(p.name for p in training.adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.slow
def test_refusals_are_held_away(job, taught):
    """The openings that stand for refusals get less likely with the term than without."""
    sides, teacher = taught
    losses = {}
    for hold in (0.0, 3.0):
        training = own.train(job(f"hold-{hold}", own={"hold": hold}), teacher=teacher, sides=sides)
        losses[hold] = training.history[-1]["refusing"]
    assert losses[3.0] < 0.7 * losses[0.0]


@pytest.mark.slow
def test_accumulated_batches_are_one_batch(job, taught):
    curves = []
    for name, micro, parts in (("one", 8, 1), ("two", 4, 2)):
        training = own.train(
            job(name, micro_batch=micro, accumulation=parts, max_steps=3), teacher=taught[1], sides=taught[0]
        )
        curves.append([p["loss"] for p in training.history[1:]])
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)


@pytest.mark.slow
def test_worse_weights_are_not_kept(job, taught):
    """A learning rate that wrecks the model: it stops early and leaves the weights it began with."""
    training = own.train(
        job(learning_rate=0.5, scheduler="constant", warmup=0, max_steps=40, own={"patience": 2}),
        teacher=taught[1], sides=taught[0],
    )  # fmt: skip
    assert training.results["stopped_early"]
    assert (training.results["best_step"], training.results["steps"]) == (0, 8)
    assert all(float(value.abs().max()) == 0 for name, value in weights(training).items() if "lora_B" in name)


def test_weights_that_refuse_again_are_not_kept(job, taught, monkeypatch):
    counts = iter([0, 0, 0, 0, 5, 0, 5, 0])  # validation, then training prompts, at steps 0, 4, 8 and 12

    def refused(self, prompts):
        return Rate(next(counts), len(prompts)), []

    monkeypatch.setattr(lesson.Lesson, "_refused", refused)
    training = own.train(job(), teacher=taught[1], sides=taught[0])
    points = {p["step"]: p for p in training.history if "eval_divergence" in p}
    assert points[12]["eval_divergence"] < points[4]["eval_divergence"]
    assert training.results["best_step"] == 4


def test_refusals_in_other_words_are_taken_in(job, taught, monkeypatch):
    sides, teacher = taught
    handle = load(job().model, dtype="float32")
    prompt = sides.target.train.texts[5]
    answers = decode(handle, handle.prompt_ids([prompt]), max_new_tokens=4)

    def refused(self, prompts):
        return Rate(0, len(prompts)), [(prompt, answers[0])] if prompt in prompts else []

    monkeypatch.setattr(lesson.Lesson, "_refused", refused)
    known = len(teacher.refused)
    training = own.train(job(), handle=handle, teacher=teacher, sides=sides)
    assert training.results["held_away_in_other_words"] == 1  # once, however often it is seen
    assert len(teacher.refused) == known


# --- Going on, and the same again -------------------------------------------------------------------------


class KilledError(Exception):
    pass


class Killed(Silent):
    """A reporter that ends everything at a step."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def progress(self, stage, total):
        def tick(done: int) -> None:
            if stage == "healing":
                self.seen += done
                if self.seen == self.step:
                    raise KilledError

        return tick


@pytest.mark.slow
@pytest.mark.parametrize("heal", [{}, {"dropout": 0.1, "accumulation": 2, "micro_batch": 4}])
def test_a_killed_training_goes_on_to_the_same_weights(job, heal):
    whole, broken = job("whole", **heal), job("broken", **heal)
    own.train(whole)
    with pytest.raises(KilledError):
        own.train(broken, reporter=Killed(7))
    assert not broken.adapter.exists()
    training = own.train(job("broken", resume=True, **heal))
    assert adapter_bytes(broken) == adapter_bytes(whole)
    assert [p["step"] for p in training.history] == list(range(STEPS + 1))


@pytest.mark.slow
def test_refusals_in_other_words_are_remembered(job, monkeypatch):
    """Found before the kill, they count after it."""
    handle = load(job().model, dtype="float32")
    first = teaching.open_lessons(settings()).target.train.texts[0]
    (answer,) = decode(handle, handle.prompt_ids([first]), max_new_tokens=4)

    def refused(self, prompts):
        early = self.progress.step < 4
        return Rate(0, len(prompts)), [(first, answer)] if early and first in prompts else []

    monkeypatch.setattr(lesson.Lesson, "_refused", refused)
    whole, broken = job("whole", own={"hold": 2.0}), job("broken", own={"hold": 2.0})
    assert own.train(whole).results["held_away_in_other_words"] == 1
    with pytest.raises(KilledError):
        own.train(broken, reporter=Killed(7))
    own.train(job("broken", resume=True, own={"hold": 2.0}))
    assert adapter_bytes(broken) == adapter_bytes(whole)


@pytest.mark.slow
def test_resuming_doesnt_ask_the_original_again(job, monkeypatch):
    with pytest.raises(KilledError):
        own.train(job(), reporter=Killed(5))
    monkeypatch.setattr(teaching, "make_teacher", None)
    done = []

    class Counts(Silent):
        def progress(self, stage, total):
            return done.append if stage == "healing" else untold

    own.train(job(resume=True), reporter=Counts())
    assert done == [4, *[1] * (STEPS - 4)]


@pytest.mark.slow
def test_another_seed_gives_other_weights(job, taught):
    first = weights(own.train(job("first", max_steps=2), teacher=taught[1], sides=taught[0]))
    other = job("other", max_steps=2)
    other = other.model_copy(update={"settings": other.settings.model_copy(update={"seed": 1})})
    second = weights(own.train(other, teacher=taught[1], sides=taught[0]))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_resuming_with_other_settings(job):
    with pytest.raises(KilledError):
        own.train(job(), reporter=Killed(5))
    with pytest.raises(OutputError, match="another model, prompts or settings"):
        own.train(job(resume=True, learning_rate=1e-4))


@pytest.mark.slow
def test_resuming_with_another_way_of_reporting(job):
    with pytest.raises(KilledError):
        own.train(job(), reporter=Killed(5))
    own.train(job(resume=True, log_steps=2))


def test_a_damaged_state_is_an_error(job):
    with pytest.raises(KilledError):
        own.train(job(), reporter=Killed(5))
    state = job().checkpoints / lesson.STATE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(OutputError, match="can't be read, to go on from"):
        own.train(job(resume=True))


def test_drawn_goes_through_everything():
    first = [i for step in range(5) for i in lesson.drawn(10, 2, step, seed=3)]
    second = [i for step in range(5, 10) for i in lesson.drawn(10, 2, step, seed=3)]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert lesson.drawn(10, 25, 0, seed=3)[:2] == first[:2]


# --- What else is written, and what can be wrong ----------------------------------------------------------


@pytest.mark.slow
def test_configuration_and_curves_are_written(job, taught):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    work = job()
    training = own.train(work, teacher=taught[1], sides=taught[0])
    written = json.loads((work.folder / "heal.json").read_text())
    assert written["preset"] == "self"
    assert (written["model"], written["original"]) == ("edited", "original")  # no path of this machine
    assert written["settings"]["max_steps"] == STEPS
    assert "data" not in written["settings"]  # nor anything else that only pairs have
    assert written["settings"]["self_teaching"]["answer_tokens"] == 8
    assert written["data"]["baseline"]["train"] == {"count": 16, "sha256": taught[0].baseline.train.sha256}
    events = EventAccumulator(str(work.curves)).Reload()
    drawn = {event.step: event.value for event in events.Scalars("train/loss")}
    assert drawn == pytest.approx({p["step"]: p["loss"] for p in training.history[1:]}, rel=1e-5)
    assert [event.step for event in events.Scalars("eval/divergence")] == [0, 4, 8, 12]
    config = json.loads((work.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "edited"


def test_named_modules_alone_get_a_lora(job, taught):
    training = own.train(job(target_modules="q_proj, up_proj", max_steps=1), teacher=taught[1], sides=taught[0])
    assert {name.split(".")[-3] for name in weights(training)} == {"q_proj", "up_proj"}


def test_unknown_modules(job, taught):
    with pytest.raises(AbliterateError, match="--target-modules nothing_proj"):
        own.train(job(target_modules="nothing_proj"), teacher=taught[1], sides=taught[0])


def test_no_original(job):
    nameless = job().model_copy(update={"original": None})
    with pytest.raises(AbliterateError, match="name it with --original"):
        own.train(nameless)


def test_a_model_that_reads_other_tokens(job, taught, folders):
    handle = load(folders[1], dtype="float32", system_prompt="Answer in verse.")
    with pytest.raises(ModelError, match="reads prompts as other tokens"):
        own.train(job(), handle=handle, teacher=taught[1], sides=taught[0])


def test_defaults_of_the_preset():
    heal = HealRunSettings.model_validate({"heal": {"preset": "self"}}).heal
    assert (heal.rank, heal.dropout, heal.gradient_checkpointing) == (16, 0.0, False)
    assert HealRunSettings.model_validate({"heal": {"preset": "self", "rank": 8}}).heal.rank == 8
