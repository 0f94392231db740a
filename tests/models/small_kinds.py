"""A small config of every causal decoder that transformers has: what the sweep over them builds.

Most configs call the same things by a few names, so a table of names and small values makes most
of them small; the rest need a word of their own.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 4096  # tiny-llama's tokenizer
_VALUES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (VOCAB, ("vocab_size",)),
    (64, ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size")),
    (64, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")),
    (2, ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")),
    (2, ("num_decoder_layers", "num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k")),
    (2, ("experts_per_token", "num_key_value_heads", "num_kv_heads", "top_k_experts")),
    (1, ("encoder_layers", "num_encoder_layers", "n_shared_experts", "moe_num_shared_experts")),
    (
        1,
        (
            "type_vocab_size",
            "n_group",
            "topk_group",
            "first_k_dense_replace",
            "moe_layer_start_index",
        ),
    ),
    (4, ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")),
    (4, ("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads")),
    (4, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")),
    (16, ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "dim_head")),
    (32, ("qk_head_dim", "q_lora_rank", "kv_lora_rank", "moe_intermediate_size")),
    (32, ("shared_expert_intermediate_size", "expert_ffn_size", "expert_ffn_hidden_size")),
    (96, ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "dim_ff")),
    (96, ("decoder_ffn_dim", "encoder_ffn_dim", "inner_dim", "intermediate_size_mlp")),
    (8, ("rotary_dim",)),
    (0, ("pad_token_id",)),
    (1, ("bos_token_id",)),
    (2, ("eos_token_id",)),
)
SMALL: dict[str, Any] = {name: value for value, names in _VALUES for name in names}
SPREAD = ("initializer_range", "init_std", "initializer_factor")
_DEEPSEEK = {"num_key_value_heads": 4}
_STATES = {
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 32},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "axk1", "axk2", "minicpm3", "youtu"),
        _DEEPSEEK,
    ),
    "deepseek_v2": {**_DEEPSEEK, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "glm4_moe_lite": _DEEPSEEK,
    "longcat_flash": _DEEPSEEK,
    "nemotron": {"num_key_value_heads": 2},
    # Of each kind of layer one: with states, and with keys and values.
    **{kind: {"layer_types": ["full_attention", "conv"]} for kind in ("lfm2", "lfm3")},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    **{
        kind: {"layer_types": ["linear_attention", "full_attention"], **_STATES}
        for kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")
    },
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
    },
    "glm_moe_dsa": _DEEPSEEK,
    "ernie4_5_moe": {"moe_layer_end_index": 1},
    "bert": {"is_decoder": True},
    "bert-generation": {"is_decoder": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "ministral": {"head_dim": 16, "rope_parameters": _ROPE, "layer_types": ["full_attention"] * 2},
    "hunyuan_v1_dense": {"rope_parameters": _ROPE, "head_dim": 16},
    "hunyuan_v1_moe": {"rope_parameters": _ROPE, "head_dim": 16},
    "bailing_hybrid": {"num_expert_group": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCAB,
        "altup_correct_scale": False,  # its scale is zero in a new model
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0},
    # A choice of experts that rounding changes is no small error; here both are chosen always.
    "minimax_m2": {"num_local_experts": 2},
    "phimoe": {"router_jitter_noise": 0.0, "num_local_experts": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron_h": {
        **{"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16},
        "moe_shared_expert_intermediate_size": 32,
    },
    "reformer": {"is_decoder": True},
    "kimi_linear": {
        **{"num_experts_per_token": 2, "num_key_value_heads": 4},
        "layer_types": ["linear_attention", "full_attention"],
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2},
}


def small(kind: str, **changes: Any) -> PreTrainedConfig:
    """A small config of the kind, of spread weights and a head of its own."""
    cls = CONFIG_MAPPING[kind]
    known = cls().to_dict()
    values = {
        name: value
        for name, value in SMALL.items()
        if name in known and (known[name] is not None or name.endswith("token_id"))
    }
    spread = {name: 1.0 if name.endswith("factor") else 0.06 for name in SPREAD if name in known}
    tied = {"tie_word_embeddings": False}
    return cls(**{**values, **spread, **tied, **CHANGES.get(kind, {}), **changes})
