"""Which of a model's tensors are float32 whatever 16-bit dtype the rest is in, and which buffers
a checkpoint has: as transformers' own loading decides both.

A router's correction bias is such a tensor: it is added to scores that lie close together, so 16
bits send tokens to other experts, and none at all to most others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def stays_float32(model: PreTrainedModel, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers loads a tensor in float32 where the model's dtype is ``dtype``."""
    kept = model._get_dtype_plan(dtype)
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in kept)


def dtype_of(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a floating tensor of a model of this dtype has."""
    return torch.float32 if stays_float32(model, name, dtype) else dtype


def stored_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a checkpoint has, by their names in the module: not what is computed as the
    module is made."""
    for path, inside in module.named_modules():
        for leaf, buffer in inside.named_buffers(recurse=False):
            if leaf not in inside._non_persistent_buffers_set:
                yield f"{path}.{leaf}".lstrip("."), buffer
