"""Tiny random decoder models of several architectures, made in a moment and saved as real
checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-llama"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
VOCAB = 64
EXPERTS = 4
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA: dict[str, Any] = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
_QWEN3: dict[str, Any] = {**_LLAMA, "head_dim": 8}

# Windows of half the attention: the first block sees everything, the second only the last four
# positions.
_MIXED: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_LLAMA),
    "mistral": MistralConfig(**_LLAMA, sliding_window=4),
    "qwen2": Qwen2Config(**_LLAMA),
    "qwen3": Qwen3Config(**_QWEN3),
    "qwen2 mixed windows": Qwen2Config(**_LLAMA, **_MIXED),
    "gpt_neox": GPTNeoXConfig(**_SMALL, intermediate_size=48, rotary_pct=0.5),
    "opt": OPTConfig(**_SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "gemma2": Gemma2Config(**_QWEN3, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3_text": Gemma3TextConfig(
        **_QWEN3,
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": Phi3Config(**_LLAMA),
    "starcoder2": Starcoder2Config(**_LLAMA, use_bias=True, sliding_window=4),
    "mixtral": MixtralConfig(**_LLAMA, num_local_experts=EXPERTS, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **_QWEN3, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **_LLAMA,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
    ),
    "deepseek_v3": DeepseekV3Config(
        **_SMALL,
        intermediate_size=48,
        num_key_value_heads=4,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "phimoe": PhimoeConfig(
        **_LLAMA, num_local_experts=EXPERTS, num_experts_per_tok=2, router_jitter_noise=0.0
    ),
    "granitemoe": GraniteMoeConfig(**_LLAMA, num_local_experts=EXPERTS, num_experts_per_tok=2),
    "gpt_oss": GptOssConfig(
        **_QWEN3,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        sliding_window=4,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "truncate": False,
        },
    ),
    "llama4_text": Llama4TextConfig(
        **_QWEN3,
        intermediate_size_mlp=48,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        interleave_moe_layer_step=1,
    ),
    "gpt2": GPT2Config(**_SMALL, n_inner=48),
    "falcon": FalconConfig(**_SMALL, new_decoder_architecture=True, num_kv_heads=2),
}

_GATED = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]


_LATENT = [
    ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("self_attn.q_b_proj",),
    ("self_attn.kv_b_proj",),
    ("self_attn.o_proj",),
]
_PROJ = ("gate_proj", "up_proj", "down_proj")


def _gated(path: str, gate: str, up: str, down: str) -> list[tuple[str, ...]]:
    return [(f"{path}.{gate}", f"{path}.{up}"), (f"{path}.{down}",)]


def _experts(inside: str, gate: str, up: str, down: str) -> list[tuple[str, ...]]:
    paths = [f"{inside}.experts.{i}" for i in range(EXPERTS)]
    return [stage for path in paths for stage in _gated(path, gate, up, down)]


def _mixture(inside: str, gate: str, up: str, down: str) -> list[tuple[str, ...]]:
    return [*_GATED[:2], *_experts(inside, gate, up, down)]


# Linears of a block that read the same tensor, in the order in which they are called.
STAGES = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gpt_neox": [
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ],
    "opt": [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ],
    "gemma2": _GATED,
    "gemma3_text": _GATED,
    "phi3": [
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ],
    "starcoder2": [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.c_fc",),
        ("mlp.c_proj",),
    ],
    "mixtral": _mixture("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": _mixture("mlp", *_PROJ),
    "qwen2_moe": [
        *_GATED[:2],
        *_gated("mlp.shared_expert", *_PROJ),
        *_experts("mlp", *_PROJ),
    ],
    "deepseek_v3": [
        *_LATENT,
        *_experts("mlp", *_PROJ),
        *_gated("mlp.shared_experts", *_PROJ),
    ],
    "phimoe": _mixture("block_sparse_moe", "w1", "w3", "w2"),
    "granitemoe": _mixture("block_sparse_moe", "w1", "w3", "w2"),
    "gpt_oss": _mixture("mlp", *_PROJ),
    "llama4_text": [
        *_GATED[:2],
        *_gated("feed_forward.shared_expert", *_PROJ),
        *_experts("feed_forward", *_PROJ),
    ],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "falcon": [
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ],
}


def random_model(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model with random weights, in eval mode; ``changes`` go into its config."""
    config = type(CONFIGS[kind]).from_dict({**CONFIGS[kind].to_dict(), **changes})
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("proj_bias", "router.bias")):  # which start as zeros
                parameter.normal_(std=0.2)
    return model.eval().requires_grad_(False)


def save(kind: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """The random model as a folder; ``llmquant`` and transformers read the same weights from it."""
    random_model(kind, seed, **changes).save_pretrained(folder)
    return folder


def token_windows(count: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    """Random token ids, ``count`` windows ``[length]``."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, VOCAB, (count, length), generator=generator))


def long_rope(switch: int, vocabulary: int) -> PreTrainedModel:
    """A random Phi-3 ("longrope") whose positions all have other frequencies in a pass of more than
    ``switch`` tokens."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": switch,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0 + i for i in range(8)],
    }
    config = Phi3Config(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        original_max_position_embeddings=switch, rope_parameters=rope, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return Phi3ForCausalLM(config).eval().requires_grad_(False)
