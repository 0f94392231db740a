"""What an int8 engine does to a linear's input: one scale per token, found as the model runs.

In a layer of its own because two sides need the same arithmetic:
:class:`llmquant.kernels.packed_linear.PackedLinear`, so that an evaluation is one of the served
model, and the search for smoothing scales, so that what it compares is what will be served.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Activations = Literal["none", "int8-dynamic"]


def int8_per_token(x: Tensor) -> Tensor:
    """Round each token's activations ``[..., in]`` to int8 with the scale ``max|x| / 127``, and
    back, in ``x``'s dtype.

    The arithmetic is float32, as in vLLM's dynamic per-token kernel (transformers divides by 127.5
    instead); a row of zeros stays zero.
    """
    rows = x.to(torch.float32)
    scale = rows.abs().amax(-1, keepdim=True).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    return torch.round(rows / scale).clamp_(-128, 127).mul_(scale).to(x.dtype)
