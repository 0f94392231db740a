"""Scales and zero-points as torch's int4 operators take them: bfloat16 ``[G, rows, 2]``, and what
bfloat16 does not hold of them.

The operators compute ``sum_k x_k * ((q - 8) * s + zero)``. ``zero`` should be ``(8 - z) * s``, up
to 12 significant bits of which bfloat16 holds 8. What does not fit is again exact in bfloat16 (at
most 4 bits): the *residual*. Multiplied with the group sums of x, a matmul ``[rows, G] x [G,
out]``, it puts the missing part back. A scale that is not exact in bfloat16 (fp16 scales of other
tools) is split the same way, ``s = high + low``, and the operator runs a second time with ``low``;
our own portable scales never need that. (Only where such a scale meets a zero-point does anything
remain, below 2**-16 of the zero term; the dequantized weight is exact throughout.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.kernels.base import Prepared
from llmquant.weight import QuantizedWeight

_GROUPS = (256, 128, 64, 32)


def operator_group(width: int) -> int | None:
    """The widest group of the operators that divides a group of ``width`` columns."""
    return next((g for g in _GROUPS if width % g == 0), None)


def why_not_numbers(weight: QuantizedWeight) -> str | None:
    """Why the operators cannot take these scales or this order of columns, or None."""
    high = weight.scales.to(torch.bfloat16)
    rest = weight.scales - high.to(torch.float32)
    if not torch.equal(rest.to(torch.bfloat16).to(torch.float32), rest):
        return "a scale has more than 16 significant bits"
    if weight.g_idx is not None:
        counts = torch.bincount(weight.g_idx, minlength=weight.scales.shape[1])
        if not bool((counts == counts[0]).all()):
            return "its g_idx gives groups of different sizes"
    return None


def parameters_of(weight: QuantizedWeight, rows: int) -> dict[str, Tensor]:
    """``scales_and_zeros`` bf16 ``[G, rows, 2]``; ``shift`` int8 ``[G, rows]``, 8 - z, and
    ``residual`` bf16 ``[G, rows]`` where a zero-point needs them; ``low`` bf16 ``[G, rows, 2]``
    where a scale is not exact in bf16. Groups that are wider than the operators' are repeated.

    Args:
        rows: as stored; those beyond the weight's own have scale 1 and zero-point 8.
    """
    width = weight.spec.width(weight.codes.shape[1])
    repeats = width // (operator_group(width) or width)
    scales = _by_group(weight.scales, repeats, rows, 1.0)
    shift = 8.0 - _by_group(weight.zeros.to(torch.float32), repeats, rows, 8.0)
    wanted = torch.stack([scales, shift * scales], dim=-1)
    high = wanted.to(torch.bfloat16)
    rest = wanted - high.to(torch.float32)
    buffers = {"scales_and_zeros": high}
    if bool(shift.any()):
        buffers["shift"] = shift.to(torch.int8)
    if bool(rest[..., 0].any()):
        buffers["low"] = rest.to(torch.bfloat16)
    elif bool(rest.any()):
        buffers["residual"] = rest[..., 1].to(torch.bfloat16).contiguous()
    return buffers


def exact_scales(prepared: Prepared) -> Tensor:
    """The exact scales ``[G, rows]``: bf16, or float32 when they were split."""
    high, low = prepared["scales_and_zeros"], prepared.get("low")
    assert high is not None
    if low is None:
        return high[..., 0].contiguous()
    return high[..., 0].to(torch.float32) + low[..., 0].to(torch.float32)


def _by_group(values: Tensor, repeats: int, rows: int, fill: float) -> Tensor:
    """float32 ``[out, G]`` → ``[G * repeats, rows]``, rows of padding filled."""
    expanded = values.repeat_interleave(repeats, dim=1) if repeats > 1 else values
    padding = rows - values.shape[0]
    return torch.nn.functional.pad(expanded.T, (0, padding), value=fill).contiguous()
