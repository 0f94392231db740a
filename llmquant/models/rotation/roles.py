"""What the linears of each architecture do to the residual stream and to the heads: what
:mod:`llmquant.models.rotation.rotated` goes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Roles:
    """What the linears of a block do, named from the block, ``*`` for an expert's number;
    embeddings named from the model.

    Attributes:
        norms: norm → the linears that read its output; empty where the residual stream cannot be
            rotated.
        writers: linears whose output is added to the residual stream.
        values: the linear that makes the values, as its last rows.
        output: the linear that reads the heads.
        embeddings: modules whose rows are added up to the first residual stream.
        layer_norm: whether norms subtract the mean.
        why_not: why the residual stream cannot be rotated, or None.
        needs: what else ``config.json`` must say for it, if it says anything.
    """

    norms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    values: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    layer_norm: bool = False
    why_not: str | None = None
    needs: tuple[tuple[str, object], ...] = ()


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Roles(
    {"input_layernorm": _QKV, "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
)
_GEMMA = Roles(
    why_not="its norms on the outputs of attention and MLP scale channels and cannot be absorbed"
)

ROLES: dict[str, Roles] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Roles(
        {
            "input_layernorm": ("self_attn.qkv_proj",),
            "post_attention_layernorm": ("mlp.gate_up_proj",),
        },
        values="self_attn.qkv_proj",
    ),
    "opt": Roles(
        {"self_attn_layer_norm": _QKV, "final_layer_norm": ("fc1",)},
        writers=("self_attn.out_proj", "fc2"),
        output="self_attn.out_proj",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        layer_norm=True,
        needs=(("do_layer_norm_before", True),),
    ),
    "starcoder2": Roles(
        {"input_layernorm": _QKV, "post_attention_layernorm": ("mlp.c_fc",)},
        writers=("self_attn.o_proj", "mlp.c_proj"),
        layer_norm=True,
    ),
    # Routers read what their experts read.
    "mixtral": Roles(
        {
            "input_layernorm": _QKV,
            "post_attention_layernorm": (
                "block_sparse_moe.gate",
                "block_sparse_moe.experts.*.w1",
                "block_sparse_moe.experts.*.w3",
            ),
        },
        writers=("self_attn.o_proj", "block_sparse_moe.experts.*.w2"),
    ),
    "qwen3_moe": Roles(
        {
            "input_layernorm": _QKV,
            "post_attention_layernorm": (
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.gate",
                "mlp.experts.*.gate_proj",
                "mlp.experts.*.up_proj",
            ),
        },
        writers=("self_attn.o_proj", "mlp.down_proj", "mlp.experts.*.down_proj"),
    ),
}
