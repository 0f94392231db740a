"""config.json and generation_config.json from a GGUF file's metadata.

transformers' table (``GGUF_CONFIG_MAPPING``) says what llama.cpp's keys are called there. It leaves
out much that changes what a model computes, and then the config class's default counts in silence:
rotary scaling, Gemma's soft caps and attention scale, widths of experts and heads, biases, the ids
of special tokens. Those are added here. Metadata of the architecture that neither knows is listed
in a note.

Llama 3's rotary scaling is in no metadata: llama.cpp stores what each frequency is divided by
(``rope_freqs.weight``), and :func:`_llama3` finds the four numbers that give these factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmquant.checkpoint.gguf.header import GgufFile
from llmquant.errors import CheckpointError, LayoutError

ROPE_FACTORS = "rope_freqs.weight"
# llama.cpp's architecture → transformers' model type, of those that are held against the original
# model in tests/checkpoint/test_gguf_architectures.py.
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "gpt2": "gpt2",
}
_MIXTRAL = "mixtral"
# Where transformers' table is called otherwise than both.
_TABLES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
# Beside transformers' table: what a config class has under these names is set from the file.
_MORE = {
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_weights_norm": "norm_topk_prob",
    "use_parallel_residual": "use_parallel_residual",
}
# Says nothing that a config has a place for, or is read elsewhere.
_SILENT = {
    *("vocab_size", "tensor_data_layout", "rope.dimension_count", "attention.value_length"),
    *("attention.key_length", "expert_group_count", "expert_gating_func", "attention.causal"),
    *("rope.scaling.finetuned", "feed_forward_length", "context_length", "expert_weights_scale"),
}
# A whole model's layers → the number that llama.cpp derives its attention scale from is hidden size
# over heads, and not the width of a head (llama.cpp, llama-model.cpp: LLM_TYPE_27B).
_SCALED_BY_HIDDEN = {("gemma2", 46), ("gemma3", 62)}
# (factor, low, high, original context) as Llama 3.1 and 3.2 have them.
_LLAMA3_KNOWN = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
# Names of tokens that end a turn, from llama.cpp (llama-vocab.cpp, special_eog_ids).
_ENDS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
        *("<|end_of_text|>", "<end_of_utterance>", "<EOT>", "_<EOT>", "<|return|>"),
    }
)
_CONTROL = 3  # tokenizer.ggml.token_type of special tokens


@dataclass(frozen=True, slots=True)
class GgufConfig:
    """What the metadata says.

    Attributes:
        config: keys for transformers' config class, ``model_type`` among them.
        notes: for people.
    """

    config: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])


def config_of(model: GgufFile) -> GgufConfig:
    """The config of a file's model.

    Raises:
        LayoutError: an architecture or rotary scaling that has no place in a config here.
        CheckpointError: metadata without which there is no model.
    """
    from transformers import AutoConfig
    from transformers.integrations import ggml

    name, stated = model.architecture, model.of_architecture()
    if name not in MODEL_TYPES:
        raise LayoutError(
            f"{model.path}: models of architecture {name!r} are not imported; these are: {', '.join(MODEL_TYPES)}"
        )
    kind = _MIXTRAL if name == "llama" and stated.get("expert_count") else MODEL_TYPES[name]
    table: Any = ggml.GGUF_CONFIG_MAPPING[_TABLES.get(name, name)]
    defaults: Any = ggml.GGUF_CONFIG_DEFAULTS_MAPPING.get(_TABLES.get(name, name), {})
    _require(model, stated, table)
    config: dict[str, Any] = {**defaults}
    config |= {table[k]: _one(model, k, v) for k, v in stated.items() if table.get(k)}
    known = AutoConfig.for_model(kind)
    config |= {
        name: _one(model, k, stated[k])
        for k, name in _MORE.items()
        if k in stated and (hasattr(known, name) or name == "rope_theta")
    }
    config["model_type"] = kind
    config["vocab_size"] = _embeddings(model)
    config["tie_word_embeddings"] = "output.weight" not in model.tensors
    config |= _ids(model)
    config |= _of_kind(model, stated, known)
    rope = _rope(model, stated, config)
    unknown = sorted(
        k
        for k in stated.keys() - table.keys() - _MORE.keys() - _SILENT
        if not k.startswith("rope.scaling.")
    )
    notes = []
    if unknown:
        notes.append(
            f"{model.path.name}: metadata that has no place in a config here and is left out: {', '.join(unknown)}"
        )
    return GgufConfig({**config, **rope}, tuple(notes))


def _require(model: GgufFile, stated: Mapping[str, Any], table: Mapping[str, Any]) -> None:
    needed = [k for k in ("block_count", "embedding_length", "attention.head_count") if k in table]
    missing = [f"{model.architecture}.{k}" for k in needed if k not in stated]
    if missing:
        raise CheckpointError(
            f"{model.path} lacks metadata that a config needs: {', '.join(missing)}; fetch a newer conversion of the model"
        )


def _one(model: GgufFile, key: str, value: Any) -> Any:
    """One number for all layers."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise LayoutError(
            f"{model.path}: {model.architecture}.{key} differs from layer to layer, which no config says"
        )
    return value[0]


def _embeddings(model: GgufFile) -> int:
    try:
        return model.tensors["token_embd.weight"].shape[0]
    except KeyError as e:
        raise CheckpointError(f"{model.path} has no embeddings (token_embd.weight)") from e


def _ids(model: GgufFile) -> dict[str, Any]:
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{k}_token_id": model.metadata.get(f"tokenizer.ggml.{v}_token_id") for k, v in keys.items()
    }


def _of_kind(model: GgufFile, stated: Mapping[str, Any], known: Any) -> dict[str, Any]:
    """What follows from tensors, or what llama.cpp has built in for an architecture."""
    has, more = model.tensors.__contains__, dict[str, Any]()
    if hasattr(known, "attention_bias") and has("blk.0.attn_q.bias"):
        more["attention_bias"] = True
    if hasattr(known, "mlp_bias") and has("blk.0.ffn_down.bias"):
        more["mlp_bias"] = True
    heads = int(_one(model, "attention.head_count", stated["attention.head_count"]))
    hidden = int(stated["embedding_length"])
    width = int(stated.get("attention.key_length") or hidden // heads)
    if hasattr(known, "query_pre_attn_scalar"):
        by_hidden = (model.architecture, stated["block_count"]) in _SCALED_BY_HIDDEN
        more["query_pre_attn_scalar"] = hidden // heads if by_hidden else width
    rotated = stated.get("rope.dimension_count")
    if rotated and hasattr(known, "rope_parameters") and model.architecture in ("stablelm", "phi3"):
        more["partial_rotary_factor"] = rotated / width
    match model.architecture:
        case "stablelm":
            more["use_qkv_bias"] = has("blk.0.attn_q.bias")
            more["use_parallel_residual"] = not has("blk.0.ffn_norm.weight")
            more["qk_layernorm"] = has("blk.0.attn_q_norm.weight")
        case "starcoder2":
            more["use_bias"] = has("blk.0.attn_q.bias")
        case "gpt2":
            more["n_positions"] = stated.get("context_length", 1024)
        case "gemma3" if "rope.freq_base_swa" in stated:
            more["rope_local_base_freq"] = stated["rope.freq_base_swa"]
    return more


def _rope(model: GgufFile, stated: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` where the rotary frequencies are scaled."""
    kind = stated.get("rope.scaling.type", "none")
    factor = stated.get("rope.scaling.factor")
    if kind not in ("none", "linear", "yarn") or any("rope_factors_" in n for n in model.tensors):
        said = kind if kind != "none" else "long and short factors"
        raise LayoutError(
            f"{model.path}: rotary scaling {said!r} is not imported; none, linear, yarn and Llama 3's are"
        )
    if ROPE_FACTORS in model.tensors:
        return {"rope_scaling": _llama3(model, config)}
    if kind == "none" or factor in (None, 0.0, 1.0):
        return {}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = stated.get("rope.scaling.original_context_length")
    if kind == "yarn" and original:
        scaling["original_max_position_embeddings"] = original
    for key, name in (("attn_factor", "attention_factor"), ("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):  # fmt: skip
        if kind == "yarn" and f"rope.scaling.{key}" in stated:
            scaling[name] = stated[f"rope.scaling.{key}"]
    return {"rope_scaling": scaling}


def _llama3(model: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's four numbers, from what the frequencies are divided by.

    Between the two wavelengths ``context / high`` and ``context / low`` the inverse factor is
    linear in ``context / wavelength``. Only ``context / (high - low)`` and ``low / (high - low)``
    can be seen in factors, so where no known model fits, low is 1.

    Raises:
        LayoutError: other factors than Llama 3's.
    """
    tensor = model.tensors[ROPE_FACTORS]
    factors = tensor.values().reshape(-1).astype(np.float64)
    theta = float(config.get("rope_theta") or 10000.0)
    frequencies = 1.0 / theta ** (np.arange(len(factors)) / len(factors))
    longest = round(float(factors.max()), 4)
    tried = [k for k in _LLAMA3_KNOWN if k[0] == longest]
    inside = (factors > 1.0) & (factors < factors.max())
    smooth = (1 / factors[inside] - 1 / longest) / (1 - 1 / longest) if longest > 1 else factors[:0]
    turning = frequencies[inside] / (2 * math.pi)
    if len(smooth) > 1:
        slope, offset = np.polyfit(turning, smooth, 1)
        high = 1.0 - 1.0 / offset  # smooth = (context * f - low) / (high - low), low = 1
        tried.append((longest, 1.0, round(high, 3), round(slope * (high - 1.0))))
    elif len(smooth) == 1:  # of a small head: as wide as Llama's own
        tried.append((longest, 1.0, 4.0, round((1 + 3 * smooth[0]) / turning[0])))
    elif longest > 1 and factors.min() == 1:
        least = frequencies[factors == 1].min() / (2 * math.pi)
        tried.append((longest, 1.0, 4.0, math.ceil(4 / least)))
    for known in tried:
        if np.allclose(llama3_factors(frequencies, *known), factors, rtol=1e-4):
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # fmt: skip
            return {"rope_type": "llama3", **dict(zip(names, known, strict=True))}
    raise LayoutError(
        f"{model.path}: {ROPE_FACTORS} divides the rotary frequencies as no Llama 3 does, and no config says so"
    )


def llama3_factors(
    frequencies: np.ndarray, factor: float, low: float, high: float, context: float
) -> np.ndarray:
    """What Llama 3.1's scaling divides each frequency by, ``[head_dim / 2]``.

    Source: transformers' ``_compute_llama3_parameters``.
    """
    turns = context * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: np.ndarray = 1.0 / ((1 - smooth) / factor + smooth)
    return factors


def generation_config(model: GgufFile) -> dict[str, Any]:
    """Ids of special tokens, every one that ends a turn, and how the file says to sample."""
    said, found = model.metadata, {k: v for k, v in _ids(model).items() if v is not None}
    tokens = said.get("tokenizer.ggml.tokens") or ()
    types = said.get("tokenizer.ggml.token_type") or ()
    first = [said.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")]
    named = [
        i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL and token in _ENDS
    ]
    ends = list(dict.fromkeys(i for i in [*first, *named] if i is not None))
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    sampling = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    chosen = {
        name: said[f"general.sampling.{key}"]
        for key, name in sampling.items()
        if f"general.sampling.{key}" in said
    }
    return {**found, **({"do_sample": True, **chosen} if chosen else {})}
