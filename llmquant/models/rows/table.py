"""The rows of the table: one for each family of model types.

Sets of linears that engines fuse are those of vLLM's models: attention's three, a gated MLP's two,
the two matrices that DeepSeek's latent attention reads the hidden states with, two of Qwen's gated
delta rule, and all the experts of a block, which are one tensor there. A row beyond attention and
MLP changes nothing for a model that lacks those linears, so types of one family share one.
"""

from __future__ import annotations

from dataclasses import replace

from llmquant.models.rows.architecture import Architecture, Experts, Stacked

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LATENT = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
_GATED_MLP = ("mlp.gate_proj", "mlp.up_proj")
_GATED = (
    _GATED_MLP,
    ("feed_forward.gate_proj", "feed_forward.up_proj"),
    ("feed_forward.w1", "feed_forward.w3"),
)
_DELTA = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")
_SCALED = (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj"))
_LLAMA = Architecture("model.layers", "model.norm", (_ATTENTION, _GATED_MLP), _SCALED)

_GPT2 = Architecture(
    "transformer.h",
    "transformer.ln_f",
    (),
    conv1d=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
)


def _mixture(
    experts: Experts, beside: str = "", renamed: tuple[tuple[str, str], ...] = ()
) -> Architecture:
    """A Llama with experts.

    Args:
        experts: of its blocks.
        beside: path of the MLP that every token passes, if there is one; it may be absent.
        renamed: see :class:`Architecture`.
    """
    shared = tuple(f"{beside}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    fused = (_ATTENTION, _LATENT, _GATED_MLP, *([shared[:2]] if beside else []), experts.linears())
    scaled = (*_SCALED, *([(shared[1], shared[2])] if beside else []), experts.scaled())
    return Architecture("model.layers", "model.norm", fused, scaled, renamed, experts)


def derived(
    blocks: str, norm: str, experts: Experts | None, outside: tuple[str, ...]
) -> Architecture:
    """A row for a model type that the table lacks: with the sets that engines fuse in most models,
    and no pairs that scale one another, of which nothing is known."""
    sets = (_ATTENTION, _LATENT, *_GATED, _DELTA, *([experts.linears()] if experts else []))
    return Architecture(blocks, norm, sets, experts=experts, outside=outside)


_MIXTRAL = Experts("block_sparse_moe", gate="w1", up="w3", down="w2")
_QWEN = Experts("mlp", gate="gate_proj", up="up_proj", down="down_proj")
# One tensor for the gates and ups of all experts, and one for their downs.
_GRANITE = replace(_MIXTRAL, stacked=Stacked("input_linear.weight", "output_linear.weight"))
_GRANITE_SWA = replace(_MIXTRAL, stacked=Stacked("experts.gate_up_proj", "experts.down_proj"))
_ARIA = replace(_QWEN, stacked=Stacked("experts.fc1.weight", "experts.fc2.weight", transposed=True))
_ONE_TENSOR = Stacked("experts.gate_up_proj", "experts.down_proj", transposed=True)
_QWEN_VL = replace(
    _QWEN, stacked=Stacked("experts.gate_up_proj", "experts.down_proj", either_way=True)
)
_GPT_OSS = replace(_QWEN, stacked=replace(_ONE_TENSOR, interleaved=True, biased=True))
_LLAMA4 = replace(_QWEN, inside="feed_forward", stacked=_ONE_TENSOR, weighs_inputs=True)
_DEEPSEEK = _mixture(_QWEN, "mlp.shared_experts")
_SHARED_GRANITE = (("model.layers.*.block_sparse_moe.router", "router.layer"),)

_DIRECT = "the model's own code reads its weight"
_GATE = "a gate of one row for each head"
# Linears that are left alone, by patterns of their names, and why. What reads a weight past its
# linear does not find a packed one: Mamba's step sizes, and the index over tokens of DeepSeek's
# sparse attention, where vLLM also merges two unpacked. The matrices of Gemma 3n's alternating
# updates have four rows or columns.
LEFT_ALONE = {
    "*.dt_proj": _DIRECT,
    "*.indexer.weights_proj": _DIRECT,
    "*.indexer.wk": "vLLM merges it with indexer.weights_proj, unpacked",
    "*.linear_attn.in_proj_a": _GATE,
    "*.linear_attn.in_proj_b": _GATE,
    "*.linear_attn.in_proj_ba": _GATE,
    "*.altup.*": "it weighs the few streams of hidden states",
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "mllama_text_model": _LLAMA,
    # Already one matrix in the checkpoint: qkv_proj and gate_up_proj.
    "phi3": Architecture("model.layers", "model.norm", ()),
    # The smallest OPT but one has narrower embeddings than blocks.
    "opt": Architecture(
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        (_ATTENTION,),
        outside=("model.decoder.project_in", "model.decoder.project_out"),
    ),
    "starcoder2": Architecture("model.layers", "model.norm", (_ATTENTION,)),
    # query_key_value is one matrix in the checkpoint.
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        (),
        renamed=(("lm_head", "embed_out"),),
        head="embed_out",
    ),
    # query_key_value is one matrix in the checkpoint.
    "falcon": Architecture("transformer.h", "transformer.ln_f", (), linears=("FalconLinear",)),
    # c_attn is one matrix in the checkpoint.
    "gpt2": _GPT2,
    "openai-gpt": replace(_GPT2, norm=""),  # each block ends with its own
    "mixtral": _mixture(_MIXTRAL, renamed=(("model.layers.*.mlp", "block_sparse_moe"),)),
    "phimoe": _mixture(
        _MIXTRAL,
        renamed=(
            ("model.layers.*.mlp", "block_sparse_moe"),
            ("model.layers.*.block_sparse_moe.router", "gate"),
        ),
    ),
    "minimax_m2": _mixture(_MIXTRAL, renamed=(("model.layers.*.mlp", "block_sparse_moe"),)),
    **dict.fromkeys(("qwen3_moe", "olmoe", "flex_olmo", "mellum"), _mixture(_QWEN)),
    "qwen2_moe": _mixture(_QWEN, "mlp.shared_expert"),
    "hunyuan_v1_moe": _mixture(_QWEN, "mlp.shared_mlp"),
    **dict.fromkeys(
        (
            *("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "dots1"),
            *("solar_open", "cohere2_moe", "afmoe"),
        ),
        _DEEPSEEK,
    ),
    # The shared expert's gate and up are one matrix in the checkpoint.
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        _mixture(_GRANITE, renamed=_SHARED_GRANITE),
    ),
    "granitemoe_swa": _mixture(_GRANITE_SWA),
    "gpt_oss": _mixture(_GPT_OSS),
    "aria_text": _mixture(_ARIA, "mlp.shared_experts"),
    "qwen3_vl_moe_text": _mixture(_QWEN_VL),
    "llama4_text": _mixture(_LLAMA4, "feed_forward.shared_expert"),
}
