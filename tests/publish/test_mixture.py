"""Types in a mixture are those that llama-quantize gives."""

from __future__ import annotations

from pathlib import Path

from abliterate.models.gguf.file import GgufFile, GgufTensor
from abliterate.publish.mixture import kinds

# Of Google's and Ollama's gemma-3-270m as Q4_K_M: these layers get more bits.
MORE = {0, 1, 4, 7, 10, 13, 15, 16, 17}


def halves(shapes: dict[str, tuple[int, ...]], **metadata: object) -> GgufFile:
    tensors = {
        name: GgufTensor(name, shape, "F16" if len(shape) > 1 else "F32", 0, 0) for name, shape in shapes.items()
    }
    described = {"general.architecture": "gemma3", **{f"gemma3.{key}": value for key, value in metadata.items()}}
    return GgufFile(Path("half.gguf"), 32, described, {}, tensors, 0, 0, 0)


def blocks(layers: int, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (1000, width), "output_norm.weight": (width,)}
    for n in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            shapes[f"blk.{n}.{name}.weight"] = (width, width)
        shapes[f"blk.{n}.ffn_down.weight"] = (width, inner)
    return shapes


def test_q4_k_m_is_that_of_a_published_file() -> None:
    found = kinds(halves(blocks(18, 640, 2048), block_count=18), "Q4_K_M")
    assert found["token_embd.weight"] == "Q8_0"  # the head, its rows don't divide by 256
    assert found["output_norm.weight"] == "F32"
    for n in range(18):
        assert found[f"blk.{n}.ffn_down.weight"] == ("Q6_K" if n in MORE else "Q4_K"), n
        assert found[f"blk.{n}.attn_v.weight"] == ("Q8_0" if n in MORE else "Q5_0"), n
        assert found[f"blk.{n}.attn_q.weight"] == "Q5_0"


def test_other_mixtures() -> None:
    wide = halves(
        blocks(16, 1024, 2048), **{"block_count": 16, "attention.head_count": 8, "attention.head_count_kv": 2}
    )

    def of(name: str) -> tuple[list[str], list[str], str, str]:
        found = kinds(wide, name)
        rows = [[found[f"blk.{n}.{part}.weight"] for n in (0, 3, 8)] for part in ("attn_v", "ffn_down")]
        return rows[0], rows[1], found["blk.9.attn_output.weight"], found["blk.9.attn_q.weight"]

    assert of("Q3_K_M") == (["Q5_K", "Q4_K", "Q4_K"], ["Q5_K", "Q4_K", "Q4_K"], "Q4_K", "Q3_K")
    assert of("Q3_K_L") == (["Q5_K"] * 3, ["Q5_K"] * 3, "Q5_K", "Q3_K")
    assert of("Q4_K_S") == (["Q5_K", "Q5_K", "Q4_K"], ["Q5_K", "Q4_K", "Q4_K"], "Q4_K", "Q4_K")
    assert of("Q5_K_M") == (["Q6_K", "Q5_K", "Q5_K"], ["Q6_K", "Q5_K", "Q5_K"], "Q5_K", "Q5_K")
    assert of("Q2_K") == (["Q4_K"] * 3, ["Q3_K"] * 3, "Q3_K", "Q2_K")
    assert of("Q6_K") == (["Q6_K"] * 3, ["Q6_K"] * 3, "Q6_K", "Q6_K")
    assert kinds(wide, "Q4_K_M")["token_embd.weight"] == "Q6_K"
    assert kinds(wide, "Q4_0")["blk.3.ffn_down.weight"] == "Q4_0"
