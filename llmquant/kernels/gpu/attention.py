"""Attention over grouped heads on a GPU, where transformers' own needs far more memory.

transformers has fewer heads of keys and values than of queries. It leaves that to torch where there
is no mask, and repeats keys and values where there is one. Two cases of these are bad on a GPU:

* Without a mask in float32: no fast kernel takes groups in that dtype, so torch builds all scores,
  ``[batch, heads, tokens, tokens]``, more than once. The memory-efficient kernel takes repeated
  heads, which are small beside that.
* One token with a mask, as a recorded decoding step has it: the whole cache is repeated for every
  token. Here the queries of a group are the rows of one head, so nothing is (releases of
  transformers later than 5.17 do that too).

The numbers are those of transformers' function, up to the order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

_ITS_OWN = frozenset({"cpu", "mps", "xpu"})  # have kernels for groups


class _Ungrouped(nn.Module):
    """Stands for an attention module all of whose heads have keys and values of their own."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.is_causal = getattr(module, "is_causal", True)


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa`` with other means; see the module text.

    Args:
        query: ``[batch, heads, tokens, head_dim]``.
        key, value: ``[batch, heads / groups, columns, head_dim]``.
        attention_mask: ``[batch, 1, tokens, columns]``, or None.

    Returns:
        ``[batch, tokens, heads, head_dim]``.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    beside = options.get("position_bias") is not None or options.get("cache") is not None
    if groups == 1 or query.device.type in _ITS_OWN or beside:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is None and query.dtype is torch.float32:
        key, value = (repeat_kv(t, groups) for t in (key, value))
        return sdpa_attention_forward(_Ungrouped(module), query, key, value, None, **options)
    if attention_mask is not None and query.shape[2] == 1 == attention_mask.shape[1]:
        batch, heads, _, width = query.shape
        rows = query.reshape(batch, heads // groups, groups, width)
        out, _ = sdpa_attention_forward(
            _Ungrouped(module), rows, key, value, attention_mask, **options
        )
        return out.transpose(1, 2).reshape(batch, 1, heads, -1), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def use_grouped_sdpa(device: torch.device) -> None:
    """Let transformers' models call it where they call ``sdpa``, if this is the device of one."""
    if device.type not in _ITS_OWN:
        AttentionInterface.register("sdpa", grouped_sdpa)
