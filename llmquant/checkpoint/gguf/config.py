"""config.json and generation_config.json from a GGUF file's metadata.

transformers' table (``GGUF_CONFIG_MAPPING``) says what llama.cpp's keys are called there. It leaves
out much that changes what a model computes, and then the config class's default counts in silence:
rotary scaling, Gemma's soft caps and attention scale, widths of experts and heads, biases, the ids
of special tokens. Those are added here; where llama.cpp has a default, it counts, and not the
config class's. Metadata of the architecture that nobody read is listed in a note.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmquant.checkpoint.gguf.header import GgufFile
from llmquant.checkpoint.gguf.rope import rope_of
from llmquant.checkpoint.gguf.stated import Stated
from llmquant.checkpoint.gguf.tokens.vocabulary import CONTROL, token_id
from llmquant.errors import CheckpointError, LayoutError

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
_PARTLY = ("stablelm", "phi3")  # rotate a part of each head
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
# Says nothing that a config has a place for.
_SILENT = {
    *("vocab_size", "tensor_data_layout", "attention.value_length", "rope.scaling.finetuned"),
    *("feed_forward_length", "context_length"),
}
_THETA = 10000.0  # llama.cpp's, where a file says none
# A whole model's layers → the number that llama.cpp derives its attention scale from is hidden size
# over heads, and not the width of a head (llama.cpp, llama-model.cpp: LLM_TYPE_27B).
_SCALED_BY_HIDDEN = {("gemma2", 46), ("gemma3", 62)}
# Names of tokens that end a turn, from llama.cpp (llama-vocab.cpp, special_eog_ids).
ENDS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
        *("<|end_of_text|>", "<end_of_utterance>", "<EOT>", "_<EOT>", "<|return|>"),
    }
)


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

    name, stated = model.architecture, Stated(model)
    if name not in MODEL_TYPES:
        raise LayoutError(
            f"{model.path}: models of architecture {name!r} are not imported; these are: {', '.join(MODEL_TYPES)}"
        )
    kind = MODEL_TYPES[name]
    if name == "llama" and stated.count("expert_count"):
        kind = _MIXTRAL
    table: Any = ggml.GGUF_CONFIG_MAPPING[_TABLES.get(name, name)]
    defaults: Any = ggml.GGUF_CONFIG_DEFAULTS_MAPPING.get(_TABLES.get(name, name), {})
    _require(model, stated, table)
    config: dict[str, Any] = {**defaults}
    config |= {table[k]: stated.checked(k) for k in stated if table.get(k)}
    known = AutoConfig.for_model(kind)
    config |= {
        name: stated.checked(k)
        for k, name in _MORE.items()
        if k in stated and (hasattr(known, name) or name == "rope_theta")
    }
    config["model_type"] = kind
    config["vocab_size"] = _embeddings(model, stated)
    config["tie_word_embeddings"] = "output.weight" not in model.tensors
    config |= _ids(model)
    config |= _of_kind(model, stated, known)
    rope = rope_of(model, stated, config)
    stated.refuse_computing(kind)
    unknown = [k for k in stated.unread() if k not in _SILENT]
    notes = []
    if unknown:
        notes.append(
            f"{model.path.name}: metadata that has no place in a config here and is left out: {', '.join(unknown)}"
        )
    return GgufConfig({**config, **rope}, tuple(notes))


def _require(model: GgufFile, stated: Stated, table: Mapping[str, Any]) -> None:
    needed = ["block_count", "context_length", "embedding_length", "attention.head_count"]
    needed += [k for k in table if k.endswith("_epsilon")]
    missing = [stated.name(k) for k in needed if k not in stated]
    if missing:
        raise CheckpointError(
            f"{model.path} lacks metadata that a config needs: {', '.join(missing)}; fetch a newer conversion of the model"
        )


def _embeddings(model: GgufFile, stated: Stated) -> int:
    """How many rows the embeddings have."""
    table = model.tensors.get("token_embd.weight")
    if table is None:
        raise CheckpointError(f"{model.path} has no embeddings (token_embd.weight)")
    wide = stated.count("embedding_length")
    if len(table.shape) != 2 or table.shape[1] != wide:
        raise CheckpointError(
            f"{model.path}: {table.name} is {list(table.shape)}, the metadata makes it {wide} wide; "
            "fetch it again, or another conversion"
        )
    return table.shape[0]


def _ids(model: GgufFile) -> dict[str, Any]:
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{k}_token_id": token_id(model, v) for k, v in keys.items()}


def _of_kind(model: GgufFile, stated: Stated, known: Any) -> dict[str, Any]:
    """What follows from tensors, or what llama.cpp has built in for an architecture."""
    has, more = model.tensors.__contains__, dict[str, Any]()
    if hasattr(known, "attention_bias") and has("blk.0.attn_q.bias"):
        more["attention_bias"] = True
    if hasattr(known, "mlp_bias") and has("blk.0.ffn_down.bias"):
        more["mlp_bias"] = True
    heads = stated.count("attention.head_count")
    hidden = stated.count("embedding_length")
    width = stated.count("attention.key_length") or hidden // heads
    if model.architecture == "llama" and "attention.key_length" not in stated:
        width = stated.count("rope.dimension_count") or width  # as transformers reads it
    if hasattr(known, "num_key_value_heads") and "attention.head_count_kv" not in stated:
        more["num_key_value_heads"] = heads
    if hasattr(known, "query_pre_attn_scalar"):
        by_hidden = (model.architecture, stated.get("block_count")) in _SCALED_BY_HIDDEN
        more["query_pre_attn_scalar"] = hidden // heads if by_hidden else width
    if hasattr(known, "rope_parameters"):
        more |= _rotated(model, stated, width)
    match model.architecture:
        case "stablelm":
            more["use_qkv_bias"] = has("blk.0.attn_q.bias")
            more["use_parallel_residual"] = not has("blk.0.ffn_norm.weight")
            more["qk_layernorm"] = has("blk.0.attn_q_norm.weight")
        case "starcoder2":
            more["use_bias"] = has("blk.0.attn_q.bias")
        case "gpt2":
            more["n_positions"] = stated.count("context_length")
            more["n_inner"] = stated.count("feed_forward_length")
        case "gemma3" if "rope.freq_base_swa" in stated:
            more["rope_local_base_freq"] = stated.number("rope.freq_base_swa")
    if model.architecture in ("gemma2", "gemma3"):
        more |= _windows(model, stated, known)
    return more


def _windows(model: GgufFile, stated: Stated, known: Any) -> dict[str, Any]:
    """Which layers see a window only: every one but each sixth of Gemma 3 and each second of
    Gemma 2, as their classes have it, unless the file says otherwise. Without a window llama.cpp
    lets every layer of Gemma 3 see everything (gemma3.cpp)."""
    layers = stated.count("block_count")
    sliding = stated.per_layer("attention.sliding_window_pattern", layers)
    if model.architecture == "gemma3" and not stated.get("attention.sliding_window"):
        return {
            "layer_types": ["full_attention"] * layers,
            "sliding_window": known.sliding_window,
        }
    if sliding is None:
        return {}
    return {"layer_types": [f"{'sliding' if s else 'full'}_attention" for s in sliding]}


def _rotated(model: GgufFile, stated: Stated, width: int) -> dict[str, Any]:
    """The base of the frequencies where the file leaves it to llama.cpp, and how much of a head is
    rotated.

    Raises:
        LayoutError: a part of a head in an architecture whose config has no place for that.
    """
    more: dict[str, Any] = {}
    if "rope.freq_base" not in stated:
        more["rope_theta"] = _THETA
    rotated = stated.count("rope.dimension_count")
    if not rotated:
        return more
    if model.architecture in _PARTLY:
        more["partial_rotary_factor"] = rotated / width
    elif rotated != width:
        raise LayoutError(
            f"{model.path}: {stated.name('rope.dimension_count')} is {rotated} of heads that are {width} wide, "
            f"which no config of a {model.architecture} says"
        )
    return more


def stored_config(config: Any) -> dict[str, Any]:
    """config.json of a transformers config: what differs from its class's defaults. What is None
    here and a number there is such a difference too, which transformers leaves out."""
    stored: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    stored.pop("_name_or_path", None)
    usual = type(config)().to_dict()
    stored |= {k: None for k, v in usual.items() if v is not None and getattr(config, k, 0) is None}
    ids = (f"{k}_token_id" for k in ("bos", "eos", "pad"))
    stored |= {key: getattr(config, key) for key in ids}
    return stored | {"tie_word_embeddings": bool(config.tie_word_embeddings)}


def generation_config(model: GgufFile) -> dict[str, Any]:
    """Ids of special tokens, every one that ends a turn, and how the file says to sample."""
    said, found = model.metadata, {k: v for k, v in _ids(model).items() if v is not None}
    tokens = said.get("tokenizer.ggml.tokens") or ()
    types = said.get("tokenizer.ggml.token_type") or ()
    first = [token_id(model, k) for k in ("eos", "eot", "eom")]
    named = [
        i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == CONTROL and token in ENDS
    ]
    ends = list(dict.fromkeys(i for i in [*first, *named] if i is not None))
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return {**found, **_sampling(said)}


def _sampling(said: Mapping[str, Any]) -> dict[str, Any]:
    """How the file says to sample. No temperature is the likeliest token in llama.cpp and an error
    in transformers, and so are a top-k below 0 and a top-p above 1, which are none."""
    names = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    chosen = {
        name: said[f"general.sampling.{key}"]
        for key, name in names.items()
        if f"general.sampling.{key}" in said
    }
    if chosen.get("temperature", 1) <= 0:
        return {"do_sample": False}
    if "top_k" in chosen:
        chosen["top_k"] = max(0, chosen["top_k"])
    if "top_p" in chosen:
        chosen["top_p"] = min(1.0, chosen["top_p"])
    return {"do_sample": True, **chosen} if chosen else {}
