"""The table "your model, your card" of docs/scale.md, computed by the code behind `abliterate run --plan`.

    python scripts/plan_table.py      # writes it between its markers

No model is loaded: configs of the published shapes are made here, and their twins run on "meta".
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from abliterate.models.handle import Handle
from abliterate.run.needs import GIB, Lengths, Model, Needs, Room, Sizes, needs

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- made by scripts/plan_table.py -->", "<!-- end of what scripts/plan_table.py makes -->"
CARDS = {"12 GB": (12, 1), "24 GB": (24, 1), "48 GB": (48, 1), "80 GB": (80, 1), "2 x 80 GB": (80, 2)}
USABLE = 0.95  # of a card: its driver takes the rest
SIZES = Sizes(Lengths(prompts=[100] * 256, shared=30, answer=100))
SAID = {"full precision": "bf16", "4bit": "4-bit", "offload": "from CPU or disk"}


def _qwen(hidden: int, inner: int, layers: int, heads: int, tied: bool = False) -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied,
    )  # fmt: skip


def configs() -> dict[str, PretrainedConfig]:
    """Models by name, with the shapes that their publishers give."""
    return {
        "Qwen3-0.6B": _qwen(1024, 3072, 28, 16, tied=True),
        "Qwen3-4B": _qwen(2560, 9728, 36, 32, tied=True),
        "Qwen3-8B": _qwen(4096, 12288, 36, 32),
        "Qwen3-14B": _qwen(5120, 17408, 40, 40),
        "Qwen3-32B": _qwen(5120, 25600, 64, 64),
        "Llama-3.3-70B": LlamaConfig(
            vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, tie_word_embeddings=False,
        ),
        "Qwen3-30B-A3B": Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
            num_experts_per_tok=8, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
            tie_word_embeddings=False,
        ),
    }  # fmt: skip


def model_of(config: PretrainedConfig) -> Model:
    """A config's sizes in bfloat16."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    return Model.of(Handle(model, None, ""))


def best(model: Model, room: Room) -> Needs:
    """The first way in which every stage fits: as it is, in 4 bits, brought from elsewhere."""
    tried = [needs(model, room, SIZES, how) for how in SAID]
    return next((found for found in tried if found.fits), tried[-1])


def cell(found: Needs) -> str:
    if not found.fits:
        return "no"
    rows = found.stages["decode"].chosen.split()[0]
    again = ", checkpointed" if "again" in found.stages["fit"].chosen else ""
    return f"{SAID[found.how]}, {found.peak / GIB:.0f} GiB, {rows} rows{again}"


def table() -> str:
    """The table in Markdown."""
    lines = [f"| computed | weights | {' | '.join(CARDS)} |", "| --- " * (len(CARDS) + 2) + "|"]
    for name, config in configs().items():
        model = model_of(config)
        cells = [cell(best(model, Room("cuda", size * GIB * USABLE, count))) for size, count in CARDS.values()]
        lines.append(f"| {name} | {model.weights('full precision') / GIB:.1f} GiB | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
