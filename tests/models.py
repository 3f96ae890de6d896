"""Tiny random models of many architectures, a tiny tokenizer, and folders that hold both."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from abliterate.models.handle import Handle

VOCABULARY = 400
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD, EOS = 0, 2
DEVICE = os.environ.get("ABLITERATE_TEST_DEVICE", "cpu")  # where the models of tests marked `device` are put
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def _trained() -> str:
    from abliterate.prompts.sets import load_prompts

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for role in ("target", "baseline") for text in load_prompts("bundled", role=role, split="test")]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens trained on bundled prompts, ChatML, padding on the left."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        padding_side="left",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def handle_of(model: Any, tokenizer: Any = None, *, device: str = DEVICE, **options: Any) -> Handle:
    """A handle on a model in memory."""
    model.eval().requires_grad_(False)
    handle = Handle(model=model, tokenizer=tokenizer or tiny_tokenizer(), source="tiny", **options)
    if device != "cpu":
        from virtual import put

        put(handle, device, device)
    return handle


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters in another dtype; buffers stay, as when transformers loads it so."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def built(
    config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32, auto_class: Any = AutoModelForCausalLM
) -> Any:
    """The causal language model of a config, every parameter random: gains and biases are not left at 1 and 0."""
    torch.manual_seed(seed)
    model = auto_class.from_config(config).float()
    generator = torch.Generator().manual_seed(seed)

    def draw(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(draw(parameter) / math.sqrt(parameter.shape[-1]))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * draw(parameter))
            else:
                parameter.add_(0.3 * draw(parameter))  # a gain, whether it is around 1 or around 0
        saved = model.state_dict().keys()
        for name, buffer in model.named_buffers():  # what files hold of them is seldom the 1 or 0 of a fresh model
            if name in saved and buffer.is_floating_point():
                buffer.mul_(1 + 0.3 * draw(buffer)).add_(0.05 * draw(buffer))
    generation = model.generation_config
    generation.do_sample, generation.eos_token_id, generation.pad_token_id = False, EOS, PAD
    return cast(model, dtype)


def tiny(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A tiny random model of a transformers model type; `fields` go to its config."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    return built(CONFIG_MAPPING[model_type](**tokens, **fields), seed=seed, dtype=dtype)


def _sizes(
    layers: int = 4, d_model: int = 32, tied: bool = True, heads: int = 4, kv_heads: int = 2, context: int = 512
) -> dict[str, Any]:
    """The config fields that most decoders share."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": d_model // heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
    }


def tiny_llama(
    tied: bool = True, dtype: torch.dtype = torch.float32, *, seed: int = 0, biases: bool = False, **sizes: Any
) -> Any:
    """A Llama; `sizes` are layers, d_model, heads, kv_heads, context."""
    return tiny("llama", seed=seed, dtype=dtype, attention_bias=biases, mlp_bias=biases, **_sizes(tied=tied, **sizes))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "llama_untied_biases": lambda: tiny_llama(tied=False, biases=True),
    "qwen2": lambda: tiny("qwen2", **_sizes()),
    "qwen3": lambda: tiny("qwen3", **_sizes()),
    "mistral": lambda: tiny("mistral", **_sizes(tied=False)),
    "gemma2": lambda: tiny("gemma2", **_sizes(), sliding_window=16),
    "gemma3_text": lambda: tiny("gemma3_text", **_sizes(), sliding_window=16),
    "olmo2": lambda: tiny("olmo2", **_sizes(tied=False)),
    "gpt2": lambda: tiny("gpt2", n_layer=4, n_embd=32, n_head=4, n_positions=512),
    "gpt_neox": lambda: tiny(
        "gpt_neox", num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        max_position_embeddings=512,
    ),
    "cohere": lambda: tiny("cohere", **_sizes()),
    "phi3": lambda: tiny("phi3", **_sizes(tied=False)),
    "granite": lambda: tiny(
        "granite", **_sizes(), residual_multiplier=0.22, embedding_multiplier=12.0, logits_scaling=8.0
    ),
    "opt": lambda: tiny(
        "opt", num_hidden_layers=4, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=512,
    ),
    "starcoder2": lambda: tiny("starcoder2", **_sizes(), use_bias=True),
}  # fmt: skip
"""A builder for every family whose writers are found."""


def _gemma4() -> dict[str, Any]:
    return {
        **_sizes(), "vocab_size_per_layer_input": VOCABULARY, "sliding_window": 16, "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }  # fmt: skip


def shrunk(model_type: str) -> Any:
    """A model of a type that is made small by `every_type`."""
    from every_type import small_config

    return built(small_config(model_type))


def _mixture(**fields: Any) -> dict[str, Any]:
    return {**_sizes(tied=False), "moe_intermediate_size": 16, "num_experts_per_tok": 2, **fields}


_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
_PLAIN = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    **{name: build for name, build in FAMILIES.items() if name != "llama_untied_biases"},
    "falcon": lambda: tiny("falcon", **_PLAIN),
    "stablelm": lambda: tiny("stablelm", **_sizes()),
    "smollm3": lambda: tiny("smollm3", **_sizes()),
    "glm4": lambda: tiny("glm4", **_sizes()),
    "nemotron": lambda: tiny("nemotron", **_sizes(tied=False)),
    "bloom": lambda: tiny("bloom", n_layer=4, hidden_size=32, n_head=4),
    "mixtral": lambda: tiny("mixtral", **_sizes(tied=False), num_local_experts=4),
    "qwen2_moe": lambda: tiny("qwen2_moe", **_mixture(num_experts=4, shared_expert_intermediate_size=16)),
    "qwen3_moe": lambda: tiny("qwen3_moe", **_mixture(num_experts=4)),
    "olmoe": lambda: tiny("olmoe", **_mixture(num_experts=4)),
    "deepseek_v3": lambda: tiny(
        "deepseek_v3", **{**_mixture(n_routed_experts=4, n_shared_experts=1), "num_key_value_heads": 4},
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8,
    ),
    "gpt_oss": lambda: tiny("gpt_oss", **_mixture(num_local_experts=4), sliding_window=16),
    "llama4_text": lambda: tiny(
        "llama4_text", **_sizes(tied=False), intermediate_size_mlp=64, num_local_experts=4, attention_chunk_size=64
    ),
    "granitemoe": lambda: tiny("granitemoe", **_mixture(num_local_experts=4), residual_multiplier=0.22),
    "lfm2": lambda: tiny(
        "lfm2", **_sizes(), layer_types=["conv", "full_attention", "conv", "full_attention"], block_multiple_of=8
    ),
    "jamba": lambda: tiny(
        "jamba", **_mixture(num_experts=4), attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "falcon_h1": lambda: tiny("falcon_h1", **_sizes(tied=False), **_MAMBA, mamba_d_ssm=64),
    "bamba": lambda: tiny("bamba", **_sizes(tied=False), **_MAMBA, attn_layer_indices=[1]),
    "qwen3_next": lambda: tiny(
        "qwen3_next", **_mixture(num_experts=4, shared_expert_intermediate_size=16), linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    ),
    "granitemoehybrid": lambda: tiny(
        "granitemoehybrid", **_mixture(num_local_experts=4), **_MAMBA, shared_intermediate_size=16,
        layer_types=["mamba", "attention", "mamba", "mamba"],
    ),
    "mamba": lambda: tiny("mamba", num_hidden_layers=4, hidden_size=32, state_size=8),
    "mamba2": lambda: tiny(
        "mamba2", num_hidden_layers=4, hidden_size=32, num_heads=4, head_dim=16, n_groups=1, state_size=8,
        chunk_size=16,
    ),
    "gemma4_text": lambda: tiny("gemma4_text", **_gemma4(), hidden_size_per_layer_input=8, num_kv_shared_layers=2),
    "gemma4_text: dense": lambda: tiny(
        "gemma4_text", **_gemma4(), hidden_size_per_layer_input=0, num_kv_shared_layers=0
    ),
    "gemma4_text: mixture": lambda: tiny(
        "gemma4_text", **_gemma4(), hidden_size_per_layer_input=0, num_kv_shared_layers=0, enable_moe_block=True,
        num_experts=4, top_k_experts=2, moe_intermediate_size=16,
    ),
    **{name: partial(shrunk, name) for name in ("deepseek_v4", "hy_v4", "qwen4_exp_text", "modernbert-decoder")},
    "gemma3": lambda: tiny_multimodal(
        "gemma3", text_config={**_text("gemma3_text"), "sliding_window": 16}, vision_config=_siglip(),
        mm_tokens_per_image=4,
    ),
    "qwen2_5_vl": lambda: tiny_multimodal(
        "qwen2_5_vl",
        text_config={**_text("qwen2_5_vl_text"), "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4,
            "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1],
        },
    ),
    "llava": lambda: tiny_multimodal(
        "llava", text_config=_text("llama"), vision_config={**_siglip("clip_vision_model"), "projection_dim": 16}
    ),
    "mistral3": lambda: tiny_multimodal("mistral3", text_config=_text("mistral"), vision_config=_siglip("pixtral")),
}  # fmt: skip
"""A builder for every architecture whose whole way, from finding to loading again, is tested each time."""

MULTIMODAL = ("gemma3", "qwen2_5_vl", "llava", "mistral3")


def tiny_multimodal(model_type: str, **fields: Any) -> Any:
    """A tiny random model with a vision tower, a projector and a language model."""
    images = {"image_token_index": 5, "image_token_id": 5}
    config = CONFIG_MAPPING[model_type](**images, **fields)
    return built(config, auto_class=AutoModelForImageTextToText)


def _text(model_type: str) -> dict[str, Any]:
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    return {"model_type": model_type, **_sizes(), **tokens}


def _siglip(model_type: str = "siglip_vision_model") -> dict[str, Any]:
    return {
        "model_type": model_type, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 4, "head_dim": 6,
    }  # fmt: skip


def save_tiny(path: str | Path, model: Any = None, tokenizer: Any = None) -> Path:
    """Save a model (a tiny Llama by default), its tokenizer and its generation config; returns the folder."""
    folder = Path(path)
    (model if model is not None else tiny_llama()).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder
