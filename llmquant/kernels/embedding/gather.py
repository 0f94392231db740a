"""Rows of a weight in the tiles of kernel ``cpu``, picked by number and decoded in torch.

A row of ``words`` is ``words[row // 16, :, row % 16]``: its codes in the stored order of columns.
Every row of a batch of tokens is taken on its own, so that the work goes with the tokens and not
with the vocabulary. The numbers are those of the definition, ``(code - zero) * scale`` in float32.
The layout is drawn in csrc/cpu/packed.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.kernels.native import ROWS, Packed


def rows(weight: Packed, ids: Tensor) -> Tensor:
    """int64 ``[n]`` → float32 ``[n, in]``: the dequantized rows ``ids``."""
    tile, place = ids // ROWS, ids % ROWS
    codes = _codes(weight.words[tile, :, place], weight.bits)
    scales = weight.scales[tile, :, place].to(torch.float32).unsqueeze(-1)
    zeros: Tensor | int = 1 << (weight.bits - 1)
    if weight.zeros is not None:
        zeros = weight.zeros[tile, :, place].to(torch.float32).unsqueeze(-1)
    groups = codes.reshape(len(ids), scales.shape[1], codes.shape[1] // scales.shape[1])
    stored = groups.to(torch.float32).sub_(zeros).mul_(scales).reshape(codes.shape)
    if weight.columns is None:
        return stored
    real = weight.columns >= 0
    picked = stored.new_empty(len(ids), weight.in_)
    return picked.index_copy_(1, weight.columns[real].to(torch.int64), stored[:, real])


def _codes(words: Tensor, bits: int) -> Tensor:
    """int32 ``[n, words]`` → int32 ``[n, columns]``."""
    if bits == 3:
        return _three_bits(words.reshape(len(words), words.shape[1] // 3, 3))
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)


def _three_bits(units: Tensor) -> Tensor:
    """int32 ``[n, units, 3]`` → int32 ``[n, units * 32]``: two words of low bits, one of high."""
    column = torch.arange(16, dtype=torch.int32)
    low = (units[..., :2].unsqueeze(-1) >> (2 * column)) & 3
    high = 8 * (column // 4) + column % 4
    bit = (units[..., 2:] >> torch.cat([high, high + 4])) & 1
    return (low.flatten(2) | (bit << 2)).flatten(1)
