"""Names of a checkpoint's tensors in a GGUF."""

from __future__ import annotations

from abliterate.apply.gguf.names import Names


def test_writers_are_not_among_what_llama_cpp_permutes() -> None:
    names_ = Names("llama", 4)
    place = names_.place("model.layers.3.self_attn.o_proj.weight")
    assert place is not None and place.name == "blk.3.attn_output.weight"
    place = names_.place("model.language_model.layers.2.mlp.experts.5.down_proj.weight")
    assert place is not None and place == ("blk.2.ffn_down_exps.weight", 5)
