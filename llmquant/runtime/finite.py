"""Whether a tensor holds NaN or Inf, without the several copies of it that ``torch.isfinite`` makes
on the way.

An embedding of a billion bytes would cost two more of them; in pieces it costs a few megabytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 1 << 22  # elements


def all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite; any dtype and shape."""
    if not tensor.is_floating_point():
        return True
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.reshape(-1).split(_PIECE))


def some(names: list[str]) -> str:
    """The first three of them."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
