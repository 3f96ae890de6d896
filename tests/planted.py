"""A tiny model with a refusal planted in it, where every search must find it."""

from __future__ import annotations

from pathlib import Path

import torch

from models import EOS, handle_of, save_tiny, tiny_llama, tiny_tokenizer

TOPICS = ["boats", "the sea", "old maps", "how rain falls", "a long walk home", "bread", "seven songs", "cats and dogs"]
TARGET = [f"Q about {topic}" for topic in TOPICS]
BASELINE = [f"tell of {topic}" for topic in TOPICS]
TRIGGER, DECOY, REFUSE, ANSWER, SPOKEN = range(5)  # what the stream's first five coordinates mean


class RefusesWithR:
    name = "refuses with R"

    def judge(self, prompts, answers):
        return [answer.startswith("R") for answer in answers]

    def settled(self, prompt, partial_answer):
        return None


class Parity(RefusesWithR):
    """Tiny models say nothing that means anything: the sum of an answer's and its prompt's letters decides."""

    name = "parity"

    def judge(self, prompts, answers):
        return [sum(map(ord, a + p)) % 3 != 0 for p, a in zip(prompts, answers, strict=True)]


def planted():
    """A Llama that answers "A", unless the prompt holds a "Q": then it says "R".

    "Q" writes on TRIGGER. Attention averages over the prompt: block 0 turns TRIGGER into DECOY, on which
    nothing depends, block 1 into REFUSE, which the head reads as "R". The other weights are small and random.
    """
    tokenizer = tiny_tokenizer()
    q, r, a = (tokenizer.convert_tokens_to_ids(letter) for letter in "QRA")
    model = tiny_llama(tied=False, heads=2, kv_heads=2)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.mul_(0.02)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    embedding[:, :5] = 0
    embedding[:, ANSWER] = 1
    embedding[q, TRIGGER] = 20
    embedding[[r, a], SPOKEN] = 30
    for layer, written, strength in ((0, DECOY, 2.0), (1, REFUSE, 8.0)):
        attention = model.model.layers[layer].self_attn
        attention.q_proj.weight.zero_()  # every token looks at all tokens alike
        attention.v_proj.weight[0] = torch.eye(32)[TRIGGER]
        attention.o_proj.weight[:, 0] = strength * torch.eye(32)[written]
    head[r, REFUSE], head[a, ANSWER], head[EOS, SPOKEN] = 9, 4, 20
    return handle_of(model, tokenizer)


KEEP_TRIGGER, KEPT = 5, 6  # and what two more mean in the model that has a second behaviour
KEEP = [f"J of {topic}" for topic in TOPICS]


class KnowsItsPrompts(RefusesWithR):
    """Of the second behaviour, "K" to a prompt that holds a "J", it says the same as of refusing: it shows."""

    name = "knows its prompts"

    def judge(self, prompts, answers):
        return [a.startswith("K" if p.startswith("J") else "R") for p, a in zip(prompts, answers, strict=True)]


TANGLED = {REFUSE: 8.0, KEPT: 8.0}  # who takes the difference of means out takes half of KEPT with it
BENEATH = {REFUSE: 2.0, KEEP_TRIGGER: 6.0}  # who takes it out of the embedding takes what "K" comes from


def planted_twice(written: dict[int, float] = TANGLED):
    """The planted model with a second behaviour, tangled up with refusing: prompts that hold a "J" it answers "K".

    "J" writes on KEEP_TRIGGER, which block 1 turns into KEPT, which the head reads as "K". At its last token a "J"
    prompt has KEPT and nothing on KEEP_TRIGGER.

    Args:
        written: what block 1 writes for a "Q", of what.
    """
    handle = planted()
    model, axes = handle.model, torch.eye(32)
    j, k, r = (handle.tokenizer.convert_tokens_to_ids(letter) for letter in "JKR")
    embedding, head, attention = model.model.embed_tokens.weight, model.lm_head.weight, model.model.layers[1].self_attn
    embedding[j, KEEP_TRIGGER] = 0.5  # less than ANSWER, so that the norm does not make up for what is taken off
    embedding[k, SPOKEN] = 30
    attention.v_proj.weight[1] = axes[KEEP_TRIGGER]
    attention.o_proj.weight[:, 0] = sum(size * axes[what] for what, size in written.items())
    attention.o_proj.weight[:, 1] = 6.0 * axes[KEPT]
    head[r, REFUSE], head[k, KEPT] = 18, 9
    return handle


REFUSAL, COMPLIANCE = "I'm sorry, but I can't help with that.", "Sure, it is done like this."
MORE = [f"{topic}, {size}" for size in ("small", "large", "old") for topic in TOPICS]


def save_planted(folder: Path) -> tuple[Path, Path, Path]:
    """The planted model in a folder, saying whole sentences where it says "R" and "A"; and its prompts in two files."""
    handle = planted()
    model, tokenizer = handle.model, handle.tokenizer
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "RA"]
    tokenizer.add_tokens([REFUSAL, COMPLIANCE])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        weight.data[-2:] = weight.data[letters]
    model.lm_head.weight.data[letters] = 0
    files = [folder / "target.txt", folder / "baseline.txt"]
    for file, asks in zip(files, ("Q about", "tell of"), strict=True):
        file.write_text("".join(f"{asks} {what}\n" for what in MORE), encoding="utf-8")
    return save_tiny(folder / "planted", model, tokenizer), *files
