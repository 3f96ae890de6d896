"""A tiny model with a refusal planted in it, where every search must find it."""

from __future__ import annotations

import torch

from models import EOS, handle_of, tiny_llama, tiny_tokenizer

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
