"""What a model takes in memory beside its weights: the keys and values of a context."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

_ANY = torch.bfloat16  # mixtures of experts run without weights in this dtype only


def cache_bytes(config: PreTrainedConfig, context: int, batch_size: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of ``batch_size`` contexts of so many tokens.

    The model itself is run without weights (on the meta device) and the cache it filled is
    counted, so sliding windows, shared keys and compressed attention count as they are.

    Args:
        dtype: that the model computes in.
    """
    with torch.device("meta"), torch.inference_mode():
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=_ANY, attn_implementation="eager", trust_remote_code=False
        )
        cache = DynamicCache(config=model.config)
        ids = torch.zeros(batch_size, context, dtype=torch.int64)
        # Without a mask some models look for padding among the ids, which have no values here.
        mask = torch.ones_like(ids)
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    tensors = (t for layer in cache.layers for t in vars(layer).values())
    floats = (t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())
    return sum(t.numel() for t in floats) * dtype.itemsize
