"""A small config of every type that transformers maps to a model of text, made from the type's own default.

Whatever a field is called, what it says is guessed from its name: so many layers, heads, experts; so wide. What that
leaves contradictory, OVERRIDES mends by type.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
LAYERS, D_MODEL, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 32, 4, 2, 8, 400
LAYER_FIELD = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_decoder_layers|num_encoder_layers|depth|"
    r"layers|num_transformer_layers|num_blocks|text_layers|num_main_layers|num_layers_per_stack"
)
ENTRY_OF_TEXT = re.compile(r"text|llm|language|decoder|thinker|^backbone_config$")
LEFT_OUT = {
    "transformers_version", "architectures", "dtype", "_name_or_path", "id2label", "label2id", "return_dict",
    "output_hidden_states", "problem_type", "attribute_map", "torch_dtype", "model_type", "is_encoder_decoder",
}  # fmt: skip
# what a field's name says of its size, the first that fits; a callable is given the default
SIZES: tuple[tuple[str, Any], ...] = (
    (r"^(bos|sep|cls|unk|mask|decoder_start)_token_id$", 1), (r"^forced_", None), (r"^eos_token_id$", 2),
    (r"^pad_token_id$", 0), (r"vocab|^n_words$", VOCABULARY),
    (r"^(mamba_d_head|mamba_head_dim|mamba_headdim|qk_head_dim)$", 16), (r"^rotary_dim$", 4),
    (r"head_dim|d_kv$|head_size|headdim|_d_head", HEAD_DIM), (r"lora_rank|lowrank|laurel_rank|_rank$", 8),
    (r"(moe|expert).*(intermediate|ffn|mlp_hidden)", 16),
    (r"intermediate|ffn|ff_dim|n_inner|mlp_dim|d_ff|feed_forward|mlp_hidden", lambda v: 64 if v > 8 else v),
    (r"shared_experts?$|num_shared", lambda v: min(v, 1)),
    (r"^(n_group|topk_group|num_expert_groups?|n_groups|mamba_n_?groups|n_expert_groups?)$", 1),
    (r"per_tok|top_?k|moe_k|experts_per|num_selected", lambda v: min(v, 2)), (r"experts", lambda v: 4 if v > 1 else v),
    (r"image_size|img_size", 16), (r"patch_size", lambda v: min(v, 4)),
    (r"max_position|n_positions|n_ctx|max_seq|max_source|max_target|context_length|seq_length|max_length", 512),
    (r"window|chunk_size|block_size", lambda v: min(v, 16)), (r"state_size|d_state|ssm_state", 8), (r"dt_rank", 4),
    (r"^first_k_dense_replace$", 1),
    (r"hidden_size|d_model|n_embd|^dim$|embed_dim|embedding_size|proj_dim|projection_dim|hidden_dim|_dim$|width|_size$",
     lambda v: D_MODEL if v > 8 else v),
    (r"^num_kv_shared", lambda v: min(v, 2)),
)  # fmt: skip


def small_config(model_type: str) -> Any:
    """A small config of a type.

    Raises:
        Exception: whatever the type's own checks say where guessing went wrong.
    """
    cls = CONFIG_MAPPING[model_type]
    over = OVERRIDES.get(model_type, {})
    try:
        default = cls().to_dict()
    except Exception:
        if not over:
            raise
        default = {}
    return cls(**_merged(_shrunk(default, True, []), over))


def auto_class_of(model_type: str) -> Any:
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type != "mllama"
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def _size(name: str, value: int, text: bool, ids: list[str]) -> int | None:
    special = re.search(r"token_(id|index)$|(image|video|audio|start|end|begin|boi|eoi|boa|eoa)_token$|_id$", name)
    if special and name != "layer_id" and not re.match(r"(bos|eos|pad|sep|cls|unk|mask|decoder_start|forced)", name):
        ids.append(name)
        return 4 + len(ids)
    if LAYER_FIELD.fullmatch(name):
        return LAYERS if text else 2
    if re.search(r"key_value_heads|kv_heads|n_head_kv|num_kv", name) and "share" not in name:
        return KV_HEADS if text else HEADS
    if re.search(r"attention_heads|n_heads?$|num_heads|_heads$|^n_head$|nhead", name):
        return HEADS
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return size(value) if callable(size) else size
    return 32 if value > 512 else value


def _list(name: str, values: list[Any], layers: int, text: bool) -> list[Any]:
    count = LAYERS if text else 2
    if name == "mrope_section":
        return [2, 1, 1]
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if values and len(values) == layers and not isinstance(values[0], dict):
        kept = values[:count]
        for value in values:  # each kind of layer stays, in the place of one that is there twice
            twice = [i for i, k in enumerate(kept) if kept.count(k) > 1]
            if value not in kept and twice:
                kept[twice[-1]] = value
        if whole and min(kept) > 64:
            return [64] * count
        return [HEADS] * count if whole and min(kept) > 8 and "head" in name else kept
    if values and whole and re.search(r"layer|index|idx|ids", name):
        return [v for v in values if v < count]
    return values


def _shrunk(fields: dict[str, Any], text: bool, ids: list[str]) -> dict[str, Any]:
    latent = "kv_lora_rank" in fields or "qk_nope_head_dim" in fields
    layers = next((v for k, v in fields.items() if LAYER_FIELD.fullmatch(k) and isinstance(v, int)), 0)
    small: dict[str, Any] = {}
    for key, value in fields.items():
        if key in LEFT_OUT:
            continue
        if isinstance(value, dict):
            small[key] = _inner(key, value, text, ids)
        elif isinstance(value, list | tuple):
            small[key] = _list(key, list(value), layers, text)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[key] = HEADS if latent and key == "num_key_value_heads" else _size(key.lower(), value, text, ids)
        elif value is not None:
            small[key] = value
        elif key == "head_dim" and text:
            small[key] = HEAD_DIM
    return small


def _inner(key: str, value: dict[str, Any], text: bool, ids: list[str]) -> dict[str, Any]:
    """A config within the config, or a table of numbers."""
    if "model_type" in value:
        of_text = bool(ENTRY_OF_TEXT.search(key)) and "vision" not in key and "audio" not in key
        return {"model_type": value["model_type"], **_shrunk(value, of_text, ids)}
    if key.startswith("rope"):
        if value.get("rope_type") in ("longrope", "su"):
            return ROPE
        return {k: [2, 1, 1] if k == "mrope_section" else v for k, v in value.items()}
    if key == "per_layer_config":
        return {k: _inner("", v, text, ids) for k, v in value.items() if int(k) < LAYERS}
    sizes = {k: v for k, v in value.items() if isinstance(v, int) and not isinstance(v, bool)}
    return {**value, **{k: _size(str(k), v, text, ids) for k, v in sizes.items()}}


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict) and not key.startswith("rope"):
            _merged(below[key], value)
        elif value is DROPPED:
            below.pop(key, None)
        else:
            below[key] = value
    return below


DROPPED = object()
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {**ROPE, "mrope_section": [2, 1, 1]}
TWO_KINDS = ["sliding_attention", "full_attention"] * 2
GEMMA4 = {
    "global_head_dim": 8, "layer_types": TWO_KINDS, "per_layer_config": DROPPED, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 400, "num_kv_shared_layers": 2, "sliding_window": 16,
}  # fmt: skip
GEMMA4_DENSE = {**GEMMA4, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
QWEN4 = {
    "hc_count": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
COMPASS = {"layer_types": TWO_KINDS, "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}
GROUPED = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_routed_experts": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    **{t: {"text_config": {"rope_parameters": MROPE}} for t in (
        "glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker")},
    "glm4v_moe": {"text_config": {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}},
    "gemma4_text": GEMMA4, "gemma4": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4_DENSE, "gemma4_unified": {"text_config": GEMMA4_DENSE},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400, "laurel_rank": 4,
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4, "layer_types": ["full_attention"] * 4,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mistral4": {"head_dim": 16}, "qwen4_exp_text": QWEN4, "qwen4_exp": {"text_config": QWEN4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "ernie4_5_vl_moe": {"text_config": {"head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}},
    "glm5_next": {"text_config": {"index_topk": 16, "qk_rope_head_dim": 0}},
    "deepseek_v2": {**GROUPED, "topk_method": "greedy"}, "step3p7": {"text_config": {"sliding_window": 16}},
    "nemotron": {"num_key_value_heads": 2}, "hrm_text": {"num_layers_per_stack": 4},
    "dots1": {**GROUPED, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8},
    "dots3_note_text": {"num_key_value_heads": 4}, "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "bamba": {"attn_layer_indices": [1]}, "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 1, 1]}}},
    "cohere_compass_text": COMPASS, "cohere_compass": {"text_config": COMPASS},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "num_hidden_layers": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "xlnet": {"d_head": 8}, "reformer": {"is_decoder": True},
}  # fmt: skip
