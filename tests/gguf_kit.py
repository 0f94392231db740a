"""GGUF files of tiny random models, as llama.cpp's converter writes them: its names, its order of
rows, its keys.

The converter itself is in no package, so what it does to the numbers is written down here once
more, the other way round than in the code under test: rows of q and k of Llamas are permuted, 1 is
added to Gemma's norms, Conv1D is transposed, the experts of a block are stacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
WORDS = ("he", "ll", "hell", "Ġw", "or", "Ġwor", "ld", "Ġworld", "12")
MERGES = ("h e", "l l", "he ll", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "1 2")
TOKENS = (*bytes_to_unicode().values(), *WORDS, *SPECIAL)
VOCAB = len(TOKENS)
EOS = VOCAB - 1


def metadata(model: PreTrainedModel, arch: str) -> dict[str, Any]:
    """What the converter says of a model."""
    config: Any = model.config
    text = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }
    sizes = {
        "feed_forward_length": "intermediate_size",
        "attention.head_count_kv": "num_key_value_heads",
        "expert_count": "num_experts" if hasattr(config, "num_experts") else "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
    text |= {key: getattr(config, n) for key, n in sizes.items() if getattr(config, n, None)}
    for name in ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon"):
        if hasattr(config, name):
            text["attention.layer_norm_epsilon"] = getattr(config, name)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_theta"):
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        text["rope.freq_base"] = float(rope["rope_theta"])
        text["rope.dimension_count"] = int(width * rope.get("partial_rotary_factor", 1.0))
        if arch in ("qwen3", "qwen3moe", "gemma2", "gemma3"):
            text |= {"attention.key_length": width, "attention.value_length": width}
    if arch in ("gemma2", "gemma3", "phi3"):
        text["attention.sliding_window"] = config.sliding_window
    return {f"{arch}.{key}": value for key, value in text.items()}


def tokenizer() -> dict[str, Any]:
    """Metadata of a byte-level tokenizer with a few merges."""
    types = [gguf.TokenType.NORMAL] * (VOCAB - len(SPECIAL)) + [gguf.TokenType.CONTROL] * 3
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.token_type": [int(t) for t in types],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": VOCAB - 3,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.padding_token_id": VOCAB - 3,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def tensors(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
    """float32 tensors by llama.cpp's names, in its order."""
    config: Any = model.config
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        values = tensor.to(torch.float32).numpy()
        if name.endswith("gate_up_proj") and ".experts." in name:
            gate, up = np.split(values, 2, axis=1)
            block = name.split(".")[2]
            found |= {
                f"blk.{block}.ffn_gate_exps.weight": gate,
                f"blk.{block}.ffn_up_exps.weight": up,
            }
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        target += "" if target.endswith((".weight", ".bias")) else ".weight"
        found[target] = changed(values, target, arch, config)
    return found


def changed(values: np.ndarray, name: str, arch: str, config: Any) -> np.ndarray:
    if arch == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
        query = name.split(".")[-2] == "attn_q"
        heads = config.num_attention_heads if query else config.num_key_value_heads
        return (
            values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            .swapaxes(1, 2)
            .reshape(values.shape)
        )
    if arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return values + 1
    if arch == "gpt2" and values.ndim == 2 and ("attn" in name or "ffn" in name):
        return np.ascontiguousarray(values.T)
    return values[0] if name.endswith("gate_inp_shexp.weight") else values


def write(
    path: Path,
    stored: Mapping[str, np.ndarray],
    said: Mapping[str, Any],
    arch: str,
    kinds: Mapping[str, str] | str = "F32",
) -> Path:
    """Write a file.

    Args:
        kinds: type of each tensor, or of every matrix; vectors are F32 otherwise.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in said.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    for name, values in stored.items():
        plain = "F32" if values.ndim == 1 else kinds if isinstance(kinds, str) else "F32"
        kind = gguf.GGMLQuantizationType[
            kinds.get(name, plain) if isinstance(kinds, Mapping) else plain
        ]
        whole = values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        kind = kind if whole else gguf.GGMLQuantizationType.F16
        data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def file_of(
    path: Path,
    model: PreTrainedModel,
    arch: str,
    kinds: Mapping[str, str] | str = "F32",
    **more: Any,
) -> Path:
    """A whole model's file; ``more`` goes into the metadata, dots written as two underscores."""
    extra = {k.replace("__", "."): v for k, v in more.items()}
    said = {**metadata(model, arch), **tokenizer(), **extra}
    return write(
        path, tensors(model, arch), {k: v for k, v in said.items() if v is not None}, arch, kinds
    )
