"""Coordinate descent on codes: after GPTQ, visit every column again, now with all others in place.

For ``D = Q - W`` the objective ``tr(D H D^T)`` is, in one code alone, a parabola with its minimum
at ``q_j - (D H)_j / H_jj``; the nearest code to it is therefore the exact minimiser of that code
given all others, and a pass over all columns can only lower the objective. GPTQ fixes each column
before the later ones are known; here the early ones get a second look. Rows are independent, so a
column is one vector operation, and work goes in blocks of columns as in GPTQ: inside a block
gradients are kept current, columns outside it get the block's changes in one matrix product.

Passes end early when a whole one changed nothing: that is a point which no single code can improve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.weight import QuantizedWeight


def descend(
    weight: Tensor, start: QuantizedWeight, hessian: Tensor, passes: int, block_size: int = 128
) -> QuantizedWeight:
    """Lower ``tr((Q - W) H (Q - W)^T)`` by up to ``passes`` rounds over the codes; scales and
    zero-points stay.

    Args:
        weight: ``[out, in]`` float.
        start: where to begin, of the same shape.
        hessian: ``[in, in]`` with a positive diagonal (damped); float32 or float64, which is what
            is computed in.
        passes: rounds; 0 gives ``start`` back.
        block_size: columns per block; changes speed, and results only by rounding.
    """
    group = start.column_groups()
    scales = start.scales.to(hessian.dtype).T[
        group
    ]  # [in, out], as all below: one column of the weight is one contiguous row
    zeros = start.zeros.to(hessian.dtype).T[group]
    codes = start.codes.to(hessian.dtype).T.contiguous()
    gradient = hessian @ ((codes - zeros) * scales - weight.to(hessian.dtype).T)
    for _ in range(passes):
        if not _sweep(codes, gradient, scales, hessian, start.spec.max_code, block_size):
            break
    return QuantizedWeight(
        codes.T.to(torch.uint8).contiguous(), start.scales, start.zeros, start.spec, start.g_idx
    )


def _sweep(
    codes: Tensor, gradient: Tensor, scales: Tensor, hessian: Tensor, max_code: int, block_size: int
) -> bool:
    """One pass over all columns, in place; whether any code changed."""
    changed = False
    for first in range(0, codes.shape[0], block_size):
        columns = slice(first, first + block_size)
        before = codes[columns].clone()
        local, square = gradient[columns].clone(), hessian[columns, columns]
        for i in range(local.shape[0]):
            scale, code = scales[first + i], codes[first + i]
            best = torch.round(code - local[i] / (square[i, i] * scale)).clamp_(0, max_code)
            local.addr_(square[i], (best - code) * scale)
            codes[first + i] = best
        moved = (codes[columns] - before) * scales[columns]
        if bool(moved.any()):
            changed = True
            gradient.addmm_(hessian[:, columns], moved)
    return changed
