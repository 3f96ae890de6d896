"""The table of architectures: what `test_every_type.py` measured, as docs/architectures.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architectures.md"
PROVED, LIVE, STOPS, NOT_TRIED = "proved", "live only", "stops", "not tried"


class Row(NamedTuple):
    """One type: its transformers class, what came out, and how many writers, or why not."""

    name: str
    model_class: str
    verdict: str
    said: str


# What people call the models of a type, where its name doesn't say.
KNOWN_AS = {
    "afmoe": "Trinity", "apertus": "Apertus", "bailing_hybrid": "Ling, Ring 2.5", "cohere": "Command R, Aya",
    "cohere2": "Command R7B, Command A", "deepseek_v2": "DeepSeek V2, Coder V2, Lite",
    "deepseek_v3": "DeepSeek V3, V3.1, R1; Kimi K2; Moonlight", "deepseek_v32": "DeepSeek V3.2",
    "deepseek_v4": "DeepSeek V4", "dots1": "dots.llm1", "ernie4_5_moe": "ERNIE 4.5 MoE", "exaone_moe": "K-EXAONE",
    "gemma3": "Gemma 3 4B, 12B, 27B; MedGemma", "gemma3_text": "Gemma 3 270M, 1B", "gemma3n": "Gemma 3n E2B, E4B",
    "gemma3n_text": "Gemma 3n", "gemma4": "Gemma 4 E2B, E4B, 26B-A4B, 31B", "gemma4_text": "Gemma 4 (text)",
    "glm4": "GLM-4-0414", "glm4_moe": "GLM-4.5, 4.6, 4.7", "glm4_moe_lite": "GLM-4.7-Flash", "glm4v_moe": "GLM-4.5V",
    "glm46v": "GLM-4.6V", "glm_moe_dsa": "GLM-5", "glm5_next": "GLM-5-Next", "gpt_oss": "gpt-oss 20b, 120b",
    "granite": "Granite 3", "granitemoehybrid": "Granite 4", "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "hunyuan_v1_moe": "Hunyuan-A13B", "hy_v3": "Hunyuan 3", "hy_v4": "Hunyuan 4", "internvl": "InternVL 3",
    "kimi_k25": "Kimi K2.5, K2.6", "kimi_linear": "Kimi Linear", "lfm2": "LFM2", "lfm2_moe": "LFM2-8B-A1B",
    "llama": "Llama 1 to 3.3; Vicuna, TinyLlama, SmolLM2, DeepSeek R1 Distill 8B, 70B",
    "llama4": "Llama 4 Scout, Maverick",
    "longcat_flash": "LongCat-Flash", "mimo_v2_flash": "MiMo-V2-Flash", "minimax": "MiniMax-Text-01, M1",
    "minimax_m2": "MiniMax M2, M2.1, M2.5", "minimax_m3_vl": "MiniMax M3", "ministral3": "Ministral 3",
    "mistral": "Mistral 7B, Nemo, Small 2409; Zephyr", "mistral3": "Mistral Small 3.1, 3.2; Magistral",
    "mllama": "Llama 3.2 Vision",
    "mixtral": "Mixtral 8x7B, 8x22B", "nemotron_h": "Nemotron-H, Nemotron 3 Nano", "olmo2": "OLMo 2", "olmo3": "Olmo 3",
    "phi": "Phi-1.5, Phi-2", "phi3": "Phi-3, Phi-3.5, Phi-4", "phimoe": "Phi-3.5-MoE",
    "qwen2": "Qwen2, Qwen2.5, QwQ; DeepSeek R1 Distill 1.5B to 32B", "qwen2_5_vl": "Qwen2.5-VL", "qwen3": "Qwen3",
    "qwen3_5": "Qwen3.5, Qwen3.6", "qwen3_5_moe": "Qwen3.5 35B-A3B, 122B-A10B, 397B-A17B",
    "qwen3_5_text": "Qwen3.5 (text)",
    "qwen3_moe": "Qwen3 30B-A3B, 235B-A22B, Coder", "qwen3_next": "Qwen3-Next, Qwen3-Coder-Next",
    "qwen3_vl": "Qwen3-VL",
    "qwen4_exp": "Qwen4-Exp", "seed_oss": "Seed-OSS", "smollm3": "SmolLM3", "solar_open": "Solar Open",
    "starcoder2": "StarCoder 2", "step3p7": "Step 3.7", "stablelm": "StableLM",
}  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| type | known as | class | | |", "| --- | --- | --- | --- | --- |"]
    for row in sorted(rows):
        lines.append("| " + " | ".join((row.name, KNOWN_AS.get(row.name, ""), *row[1:])) + " |")
    return "\n".join(lines) + "\n"


def page(rows: Iterable[Row]) -> str:
    """docs/architectures.md."""
    rows = list(rows)
    count = Counter(row.verdict for row in rows)
    counts = ", ".join(f"{count[verdict]} {verdict}" for verdict in (PROVED, LIVE, STOPS, NOT_TRIED))
    return HEAD + f"Of {len(rows)} types: {counts}.\n\n" + table(rows)


HEAD = """# Architectures

Every type that transformers maps to a model of text, as a random model of some blocks (gains, biases and saved buffers
random too). Written by `ABLITERATE_LONG_TESTS=1 pytest tests/models/test_every_type.py`. There is no table of names in
the program: writers are found by looking at a run, and a type that isn't here goes through the same search.

- **proved**: a direction taken out of every writer at full strength in float32 leaves less than 1e-5 of |h| at every
  site of the stream: attached live, baked into the weights, and in the saved files loaded again by plain transformers.
- **live only**: no edit of weights holds the direction out, for the reason named. The stream itself is edited while the
  model runs, at every block: `run --at-stream` gives a recipe for `chat`, `measure --recipe` and `studio`; no model/.
- **stops**: with the reason named, in one line. **not tried**: no small config could be made.

Of a multimodal model the language model is edited; what projects image tokens into it is reported
(`find_writers(handle, projector=True)`) and left alone.

"""


def write(rows: list[Row], page_file: Path = PAGE) -> None:
    """Bring docs/architectures.md up to date; untouched where it already is."""
    old = page_file.read_text(encoding="utf-8") if page_file.exists() else ""
    if page(rows) != old:
        page_file.write_text(page(rows), encoding="utf-8")
