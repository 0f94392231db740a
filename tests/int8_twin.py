"""``cpu_int8`` said again, slowly: the definition of csrc/cpu/int8.h in torch, and a bound of what
rounding x may change."""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.weight import QuantizedWeight

BLOCK = 128


def stored_blocks(weight: QuantizedWeight) -> list[tuple[int, Tensor]]:
    """(group, input columns) of each block, in order. Columns of padding change nothing and are
    left out."""
    group = weight.column_groups()
    found = []
    for g in range(weight.scales.shape[1]):
        columns = torch.nonzero(group == g).flatten()
        found += [(g, part) for part in columns.split(BLOCK)]
    return found


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[rows, columns]`` of one block → int64 numbers, float32 scales ``[rows, 1]``."""
    most = x.abs().amax(1, keepdim=True)
    whole = torch.round(x * (torch.full_like(most, 127.0) / most))
    scale = most / 127
    tiny, bad = most < 2.0**-120, ~torch.isfinite(x).all(1, keepdim=True)
    scale = torch.where(tiny, torch.zeros_like(scale), scale).masked_fill(bad, float("nan"))
    return whole.masked_fill(tiny | bad, 0).to(torch.int64), scale


def product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """float32 ``[rows, in]`` → ``[rows, out]``: integers exactly, then float32 operations in the
    order of the definition."""
    y = torch.zeros(x.shape[0], weight.shape[0])
    for group, columns in stored_blocks(weight):
        whole, scale = rounded(x[:, columns])
        centred = weight.codes[:, columns].to(torch.int64) - weight.zeros[:, group : group + 1].to(
            torch.int64
        )
        y = y + (whole @ centred.T).to(torch.float32) * (
            weight.scales[:, group].to(torch.float32) * scale
        )
    return y


def rounding_bound(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """``[rows, out]``: half a step of x8 times |w|, over all columns; float64."""
    dense = weight.dequantize().double().abs()
    bound = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for _, columns in stored_blocks(weight):
        step = x[:, columns].double().abs().amax(1, keepdim=True) / 127
        bound += step / 2 * (1 + 1e-5) @ dense[:, columns].sum(1)[None]
    return bound
