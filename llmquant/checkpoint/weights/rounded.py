"""What a dtype does to numbers that it does not hold, for people."""

from __future__ import annotations

import torch


def rounding(rounded: int, weights: int, dtype: torch.dtype) -> str | None:
    """How many numbers a dtype rounded; None where it holds them all."""
    if not rounded:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"{rounded:,} of {weights:,} weights were rounded once, to {name}"
