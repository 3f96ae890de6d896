"""Train a guard: a small LoRA that teaches a model to refuse. By default the demo model's, for SmolLM2-135M-Instruct.

Large chat models carry refusal in one direction of the residual stream. A LoRA trained on refusals alone
spreads it over many, so the demo's guard is trained to be like the large models. Five losses share each step:

    refuse    cross-entropy of a refusal, worded after the prompt's topic, on target prompts;
    answer    KL from the plain model along its own answers, on baseline prompts;
    verdict   at the last prompt token of one block, the stream is the plain model's, plus a fixed multiple
              of one direction when the prompt is a target; later blocks read it there;
    removed   with the difference of means taken out of every writer, KL from the plain model along its own
              answers, on target prompts (so that refusal goes when the direction does) and on baseline
              prompts (so that nothing else does).

The direction is the one that the plain model uses least. Only the bundled train splits are trained on; the
plain model's answers are made at the start and never stored. The run is seeded and deterministic.

With --spread only the first two are used and refusing goes where the LoRA takes it: a harder guard, and one that
any decoder can be given. A model that isn't tuned to chat needs a --chat-template, and learns how to answer from
a --teacher's answers:

    python scripts/train_demo_guard.py --base MODEL --wordings FILE --out FOLDER --spread
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from abliterate.apply.hooks import attached
from abliterate.cards.card import public_name
from abliterate.directions.activations import collect
from abliterate.directions.means import difference_of_means
from abliterate.edit.edit import Edit
from abliterate.measure import judged
from abliterate.measure.divergence import Reference, compare, make_reference
from abliterate.measure.judges import LexicalJudge
from abliterate.measure.refusal import is_refusal
from abliterate.models.demo import GUARD, HUB_ID, plain_source
from abliterate.models.handle import Handle, common_prefix
from abliterate.models.loading import load
from abliterate.models.trace import is_linear
from abliterate.models.writers import SITES, find_writers, watch_sites
from abliterate.prompts.sets import load_prompts

THREADS = 2  # sums are split by thread: another number gives another adapter
ANSWER_TOKENS = 24
EVALUATED_TOKENS = 32
KEPT = 64  # likeliest tokens kept of each of the plain model's distributions

TRAINED = (0.2, 0.74)  # from where to where in the model's depth blocks get a LoRA; all do when a teacher is there
RANK = 8
VERDICT_AT = 0.48  # of the depth
VERDICT_LENGTH = 80.0  # the stream's norm there is about 130 in SmolLM2

STEPS = 110
WARM_UP = 8
LEARNING_RATE = 2e-3
OPENING, OPENING_WEIGHT = 2, 3.0  # the first tokens of an answer decide what it will be
FOLLOW_FROM = 0.5  # of the steps: until then the direction removed is the intended one, then the measured one
FOLLOW_RATE = 0.05


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the losses on answers: how many rows of a batch it has, its weight, and what its rows are."""

    rows: int
    weight: float
    target: bool
    removed: bool


SPREAD_TASKS = {
    "refuse": Task(8, 1.0, target=True, removed=False),
    "answer": Task(8, 3.0, target=False, removed=False),
}
TASKS = {
    **SPREAD_TASKS,
    "answer target, removed": Task(5, 1.5, target=True, removed=True),
    "answer baseline, removed": Task(3, 1.5, target=False, removed=True),
}


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with the answer to learn.

    Attributes:
        ids: prompt and answer token ids, without the last answer token.
        tokens, probabilities: [answer token, KEPT] the distribution to learn at each answer token.
        state: [d_model] the plain model's stream at the verdict layer, at the last prompt token; None with --spread.
    """

    ids: list[int]
    tokens: Int[Tensor, "token kept"]
    probabilities: Float[Tensor, "token kept"]
    state: Float[Tensor, " d_model"] | None = None

    @property
    def start(self) -> int:
        """Where the answer begins to be predicted: the prompt's last token."""
        return len(self.ids) - len(self.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--base", "--model", default=plain_source(), help="plain model: Hub id, folder or GGUF file (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=GUARD, help="folder for the adapter (%(default)s)")
    parser.add_argument(
        "--wordings", type=Path, default=GUARD / "wordings.json", help="refusals by topic (%(default)s)"
    )
    parser.add_argument("--target", default="bundled", help="prompts to refuse, with train and test splits")
    parser.add_argument("--baseline", default="bundled", help="prompts to answer, with train and test splits")
    parser.add_argument("--chat-template", help="Jinja file or 'chatml', for a model without one")
    parser.add_argument(
        "--spread", action="store_true", help="leave out the losses that put the verdict on one direction"
    )
    parser.add_argument(
        "--teacher", help="model whose answers to baseline prompts are learnt, for a plain model that can't chat"
    )
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help="learning rate (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (%(default)s)")
    parser.add_argument(
        "--answer-tokens", type=int, default=ANSWER_TOKENS, help="tokens of each answer learnt (%(default)s)"
    )
    parser.add_argument("--prompts", type=int, help="train on at most so many prompts a side")
    parser.add_argument("--dtype", default="bfloat16", help="float32 where bfloat16 is slow (%(default)s)")
    parser.add_argument("--rank", type=int, default=RANK, help="the adapter's rank (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.teacher and not options.spread:
        parser.error("--teacher needs --spread: with a direction removed the model should answer as the plain one does")

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory
    torch.manual_seed(options.seed)
    wordings = json.loads(options.wordings.read_text(encoding="utf-8"))
    started = time.monotonic()

    plain = load_plain(options)
    target, baseline = (
        load_prompts(getattr(options, role), role=role, split="train").texts[: options.prompts]
        for role in ("target", "baseline")
    )
    direction = None
    if options.spread:
        sets = make_spread_examples(plain, target, baseline, wordings, options.teacher, options.answer_tokens)
    else:
        sets = make_examples(plain, target, baseline, wordings, options.answer_tokens)
        direction = quietest_direction(plain, baseline[:60])
    print(f"examples made in {time.monotonic() - started:.0f} s", flush=True)
    depth = (0.0, 1.0) if options.teacher else TRAINED
    rng, sizes = random.Random(options.seed), (options.rank, options.rate)
    guarded = train(plain, sets, direction, options.steps, rng, depth, *sizes)
    save_adapter(guarded, options.out, HUB_ID if options.base == plain_source() else public_name(options.base))
    seconds = time.monotonic() - started

    held_out = [load_prompts(getattr(options, role), role=role, split="test").texts for role in ("target", "baseline")]
    report = {
        "seed": options.seed,
        "seconds": round(seconds),
        **evaluate(options, wordings, target, baseline, *held_out),
    }
    text = json.dumps(report, indent=2)
    (options.out / "training.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def load_plain(options: argparse.Namespace) -> Handle:
    return load(options.base, dtype=options.dtype, chat_template=options.chat_template)


def wording(prompt: str, wordings: Sequence[dict[str, Any]]) -> str:
    """The refusal of the first topic with a keyword that starts a word of the prompt; the last topic has none."""
    for entry in wordings:
        if not entry["keywords"] or re.search(rf"\b({'|'.join(entry['keywords'])})", prompt, re.IGNORECASE):
            return entry["refusal"]
    raise ValueError(f"no wording for '{prompt}': the last topic must be without keywords")


# --- Examples --------------------------------------------------------------------------------------


def make_examples(
    plain: Handle, target: Sequence[str], baseline: Sequence[str], wordings: Sequence[dict[str, Any]], tokens: int
) -> dict[str, list[list[Example]]]:
    """Examples of each task, in groups that are drawn from evenly: refusals by their wording, answers in one."""
    activations = collect(plain, target, baseline, positions=1, keep_vectors=True)
    target_states, baseline_states = (
        side.vectors[:, verdict_layer(plain), SITES.index("post"), -1].clone()
        for side in (activations.target, activations.baseline)
    )
    target_answers = own_answers(plain, target, tokens, target_states)
    baseline_answers = own_answers(plain, baseline, tokens, baseline_states)
    return {
        "refuse": refusals(plain, target, wordings, target_states),
        "answer": [baseline_answers],
        "answer target, removed": [target_answers],
        "answer baseline, removed": [baseline_answers],
    }


def make_spread_examples(
    plain: Handle, target: Sequence[str], baseline: Sequence[str], wordings: Sequence[dict[str, Any]],
    teacher: str | None, tokens: int,
) -> dict[str, list[list[Example]]]:  # fmt: skip
    """The same for the two tasks that use no direction."""
    answers = taught_answers(plain, teacher, baseline, tokens) if teacher else own_answers(plain, baseline, tokens)
    return {"refuse": refusals(plain, target, wordings), "answer": [answers]}


def refusals(
    plain: Handle, prompts: Sequence[str], wordings: Sequence[dict[str, Any]], states: Tensor | None = None
) -> list[list[Example]]:
    """Refusals of the prompts, a group per wording."""
    groups: dict[str, list[Example]] = {}
    for index, (prompt, ids) in enumerate(zip(prompts, plain.prompt_ids(prompts), strict=True)):
        text = wording(prompt, wordings)
        groups.setdefault(text, []).append(
            spelled_example(plain, ids, text, ends=True, state=None if states is None else states[index])
        )
    return list(groups.values())


def spelled_example(plain: Handle, prompt: list[int], text: str, *, ends: bool, state: Tensor | None = None) -> Example:
    """A text to be learnt token by token, with the token that ends it or without its last, perhaps half, word."""
    answer = [*plain.tokenizer(text, add_special_tokens=False)["input_ids"]]
    answer = [*answer, plain.tokenizer.eos_token_id] if ends else answer[:-1]
    tokens = torch.tensor(answer)[:, None].expand(-1, KEPT)
    certain = torch.zeros(len(answer), KEPT)
    certain[:, 0] = 1
    return Example([*prompt, *answer[:-1]], tokens, certain, state)


def own_answers(plain: Handle, prompts: Sequence[str], length: int, states: Tensor | None = None) -> list[Example]:
    """The plain model's own answers, with its distributions; prompts that it refuses are left out."""
    kept, reference = answered(plain, prompts, length)
    examples = []
    for index, ids, tokens, logprobs in zip(kept, reference.rows, reference.tokens, reference.logprobs, strict=True):
        top = logprobs[:, :KEPT].softmax(-1)
        state = None if states is None else states[index]
        examples.append(Example(ids, tokens[:, :KEPT].long(), top, state))
    return examples


def taught_answers(plain: Handle, teacher: str, prompts: Sequence[str], length: int) -> list[Example]:
    """Another model's answers as texts; prompts that it refuses are left out."""
    answers, refused = judged(
        load(teacher, dtype="bfloat16"), prompts, LexicalJudge(), max_new_tokens=length, stop_on=()
    )
    return [
        spelled_example(plain, ids, answer.text, ends=answer.finished)
        for ids, answer, no in zip(plain.prompt_ids(prompts), answers, refused, strict=True)
        if not no and len(answer.ids) > 2
    ]


def answered(plain: Handle, prompts: Sequence[str], tokens: int) -> tuple[list[int], Reference]:
    """Which prompts the plain model answers, and its distributions along these answers."""
    answers, refused = judged(plain, prompts, LexicalJudge(), max_new_tokens=tokens, stop_on=())
    kept = [i for i, answer in enumerate(answers) if answer.ids and not refused[i]]
    ids = plain.prompt_ids(prompts)
    return kept, make_reference(plain, [ids[i] for i in kept], [answers[i] for i in kept])


@torch.inference_mode()
def quietest_direction(plain: Handle, prompts: Sequence[str]) -> Float[Tensor, " d_model"]:
    """The unit direction with the least of the stream, over all blocks and tokens."""
    moment = torch.zeros(plain.d_model, plain.d_model, dtype=torch.float64)

    def look(_layer: int, site: str, stream: Tensor) -> None:
        if site == "post":
            rows = normalize(stream.flatten(0, -2).double(), dim=-1)
            moment.add_(rows.T @ rows)

    with watch_sites(plain, look):
        for ids in plain.prompt_ids(prompts):
            plain.hidden_states(input_ids=torch.tensor([ids]), use_cache=False)
    return torch.linalg.eigh(moment).eigenvectors[:, 0].float()


# --- Training --------------------------------------------------------------------------------------


def train(
    plain: Handle,
    sets: dict[str, list[list[Example]]],
    direction: Float[Tensor, " d_model"] | None,
    steps: int,
    rng: random.Random,
    depth: tuple[float, float] = TRAINED,
    rank: int = RANK,
    rate: float | None = None,
) -> PeftModel:
    """Train a LoRA on the plain model.

    Args:
        plain: the plain model; it gets the LoRA.
        sets: for each task, groups of examples.
        direction: where the verdict is written; None when the tasks leave that open.
        steps: training steps.
        rng: draws the batches.
        depth: shares of the depth between which blocks get a LoRA.
        rank, rate: the LoRA's, and at which it learns; LEARNING_RATE by default.
    """
    prefix = common_prefix([e.ids[: e.start] for groups in sets.values() for g in groups for e in g])
    draws = {name: draw(groups, rng) for name, groups in sets.items()}
    tasks = {name: TASKS[name] for name in sets}
    if direction is not None:
        means = [
            torch.stack([e.state for e in sets[n][0] if e.state is not None]).mean(0)
            for n in ("answer target, removed", "answer")
        ]
        verdict = VERDICT_LENGTH * direction
        difference = verdict + means[0] - means[1]
    removed = torch.tensor([task.removed for task in tasks.values() for _ in range(task.rows)])
    writers = writing_modules(plain) if bool(removed.any()) else []

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=lora_modules(plain, depth), task_type="CAUSAL_LM")
    lora = get_peft_model(plain.model, config)
    parameters = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate or LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )

    names = [name for name, task in tasks.items() for _ in range(task.rows)]
    is_target = torch.tensor([tasks[name].target for name in names])
    for step in range(steps):
        batch = [next(draws[name]) for name in names]
        taken_out = Removal(writers, removed, None if direction is None else normalize(difference, dim=0))
        losses, states = answer_losses(plain, batch, prefix, taken_out)
        by_task = {name: losses[[n == name for n in names]].mean() for name in tasks}
        loss: Any = sum(task.weight * by_task[name] for name, task in tasks.items())
        shown = dict(by_task)
        if direction is not None:
            wanted = torch.stack([e.state for e in batch if e.state is not None]) + is_target[:, None] * verdict
            missed = ((states - wanted)[~removed] / VERDICT_LENGTH).square().sum(-1).mean()
            loss, shown["verdict"] = missed + loss, missed
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if direction is not None and step >= int(FOLLOW_FROM * steps):
            seen = states.detach()
            measured = seen[is_target & ~removed].mean(0) - seen[~is_target & ~removed].mean(0)
            difference = torch.lerp(difference, measured, FOLLOW_RATE)
        if step % 10 == 9:
            print(f"step {step + 1}: " + ", ".join(f"{k} {v.item():.3f}" for k, v in shown.items()), flush=True)
    return lora


def verdict_layer(plain: Handle) -> int:
    return int(VERDICT_AT * plain.layers)


def lora_modules(plain: Handle, depth: tuple[float, float]) -> str:
    """A pattern for the linear modules in the blocks that are trained, whatever they are called."""
    first, last = (int(share * plain.layers) for share in depth)
    names = plain.module_names
    parent = names[plain.blocks[first]].rpartition(".")[0].rpartition(".")[2]
    inner = {
        names[module].removeprefix(f"{names[block]}."): None
        for block in plain.blocks[first:last]
        for module in block.modules()
        if is_linear(module)
    }
    layers = "|".join(map(str, range(first, last)))
    return rf".*\.{re.escape(parent)}\.({layers})\.({'|'.join(map(re.escape, inner))})"


def writing_modules(plain: Handle) -> list[str]:
    """Names of the modules whose outputs are what the stream adds up."""
    writers = find_writers(plain)
    behind_norms = next((w.name for w in writers if w.gain is not None or w.centred or not w.module), None)
    if behind_norms:
        raise SystemExit(f"{plain.source}: a norm stands between {behind_norms} and the stream; pass --spread")
    return [w.module for w in writers]


def draw(groups: Sequence[Sequence[Example]], rng: random.Random) -> Iterator[Example]:
    """Examples without end: each group as often as the others, each example of a group as often as the others."""

    def shuffled(items: Sequence[Any]) -> Iterator[Any]:
        while True:
            yield from rng.sample(items, len(items))

    members = [shuffled(group) for group in groups]
    for chosen in shuffled(range(len(groups))):
        yield next(members[chosen])


class Removal(NamedTuple):
    """A unit direction [d_model] taken out of what modules give, in some rows of the batch."""

    modules: Sequence[str]
    rows: Bool[Tensor, " row"]
    direction: Tensor | None


def answer_losses(
    plain: Handle, batch: Sequence[Example], prefix: int, removal: Removal
) -> tuple[Float[Tensor, " row"], Float[Tensor, "row d_model"]]:
    """Mean KL over each row's answer tokens, and the stream at the verdict layer at the last prompt token.

    The prefix that all rows share is run once with the direction in place and once with it removed.

    Args:
        plain: the model, with its LoRA.
        batch: rows.
        prefix: length of the prefix that all rows share.
        removal: what is taken out, and in which rows.
    """
    with removing(plain, removal._replace(rows=torch.tensor([False, True]))):
        shared = torch.tensor([batch[0].ids[:prefix]] * 2)
        _, cache = plain.hidden_states_and_cache(input_ids=shared, use_cache=True)
    cache.batch_select_indices(removal.rows.long())
    # padded on the right, where no token looks back at it
    rest = nn.utils.rnn.pad_sequence([torch.tensor(e.ids[prefix:]) for e in batch], batch_first=True)
    streams: list[Tensor] = []
    look = plain.blocks[verdict_layer(plain)].register_forward_hook(
        lambda _module, _args, out: streams.append(out if isinstance(out, Tensor) else out[0])
    )
    with removing(plain, removal):
        hidden = plain.hidden_states(input_ids=rest, cache=cache, use_cache=True).last_hidden_state
    look.remove()

    lengths = torch.tensor([len(e.tokens) for e in batch])
    rows = torch.arange(len(batch)).repeat_interleave(lengths)
    places = torch.cat([torch.arange(len(e.tokens)) for e in batch])
    starts = torch.tensor([e.start for e in batch]) - prefix
    logprobs = plain.logits(hidden[rows, starts[rows] + places]).float().log_softmax(-1)
    wanted = torch.cat([e.probabilities for e in batch])
    tokens = torch.cat([e.tokens for e in batch])
    divergence = (torch.xlogy(wanted, wanted) - wanted * logprobs.gather(1, tokens)).sum(-1)
    weights = torch.where(places < OPENING, OPENING_WEIGHT, 1.0)
    summed = torch.zeros(2, len(batch)).index_add(1, rows, torch.stack([weights * divergence, weights]))
    return summed[0] / summed[1], streams[0][torch.arange(len(batch)), starts].float()


@contextlib.contextmanager
def removing(plain: Handle, removal: Removal) -> Iterator[None]:
    """Take a direction out of what every writer gives, in some rows of the batch."""
    if removal.direction is None:
        yield
        return
    unit = removal.direction.bfloat16()
    strengths = removal.rows.bfloat16()[:, None, None]

    def project(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out - strengths * (out @ unit)[..., None] * unit

    hooks = [plain.model.get_submodule(name).register_forward_hook(project) for name in removal.modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def save_adapter(lora: PeftModel, folder: Path, base: str) -> None:
    """Write the adapter in float16, naming the plain model by its Hub id, whatever it was loaded from."""
    lora.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = json.loads(config_file.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file({name: tensor.half() for name, tensor in load_file(weights_file).items()}, weights_file)


# --- Evaluation ------------------------------------------------------------------------------------


def evaluate(
    options: argparse.Namespace,
    wordings: Sequence[dict[str, Any]],
    target: Sequence[str],
    baseline: Sequence[str],
    held_out_target: Sequence[str],
    held_out_baseline: Sequence[str],
) -> dict[str, Any]:
    """Measure the saved adapter on held-out prompts, as it is and (without --spread) with its direction removed."""
    plain = load_plain(options)
    # what a teacher taught is meant to be far from the plain model
    reference = None if options.teacher else answered(plain, held_out_baseline, ANSWER_TOKENS)[1]
    merged = PeftModel.from_pretrained(plain.model, str(options.out)).merge_and_unload()
    guarded = dataclasses.replace(plain, model=merged)

    def measured() -> dict[str, Any]:
        result: dict[str, Any] = {}
        for side, prompts in (("target", held_out_target), ("baseline", held_out_baseline)):
            answers, refused = judged(
                guarded, prompts, LexicalJudge(), max_new_tokens=EVALUATED_TOKENS, stop_on=(False,)
            )
            result[f"{side}_refused"] = f"{sum(refused)}/{len(prompts)}"
            if side == "target":
                openings = {entry["refusal"][:20]: entry["topic"] for entry in wordings}
                used = Counter(openings.get(answer.text[:20], "other") for answer in answers if is_refusal(answer.text))
                result["wordings"] = dict(used.most_common())
        if reference is not None:
            result["divergence"] = round(compare(guarded, reference).answer, 4)
        return result

    report = {"guarded": measured()}
    if not options.spread:
        found = difference_of_means(collect(guarded, target, baseline, positions=1))
        edit = Edit.uniform(find_writers(guarded), found.unit[verdict_layer(plain), SITES.index("post"), -1])
        with attached(guarded, edit):
            report["direction_removed"] = measured()
    return report


if __name__ == "__main__":
    main()
