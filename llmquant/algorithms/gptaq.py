"""Asymmetric calibration: aim a linear at what the *original* model would have computed, not at its
own weight.

Behind quantized layers a linear reads ``x``, where the original model would have read ``f``. Plain
GPTQ keeps ``Q x`` near ``W x`` and so repeats the error that ``x`` brings along. Asked to keep ``Q
x`` near ``W f`` instead (GPTAQ, arXiv:2504.02692), the objective is, up to a constant that ``Q``
cannot change, GPTQ's own around another weight. With
``H = sum x x^T`` and ``C = sum f x^T``::

    sum |W f - Q x|^2 + damping |W - Q|^2  =  tr((T - Q) (H + damping) (T - Q)^T) + const,
    T = (W C + damping W) (H + damping)^-1  =  W + W (C - H) (H + damping)^-1

Any rounding algorithm then quantizes ``T``: no column-wise correction terms, one triangular solve
per shared input. ``strength`` goes part of the way from ``W`` to ``T``: the difference is estimated
from few tokens and the whole of it is not always the best (docs/decisions.md has the figures). A
column whose input was always zero stays as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.algorithms.gptq import Factor


def asymmetric_target(
    weight: Tensor, hessian: Tensor, cross: Tensor, factor: Factor, strength: float = 1.0
) -> Tensor:
    """The weight whose plain quantization keeps ``Q x`` near ``W f``.

    Args:
        weight: ``[out, in]``, float.
        hessian: ``[in, in]``, ``sum x x^T`` of the inputs read.
        cross: ``[in, in]``, ``sum f x^T`` with the original model's inputs ``f``.
        factor: of the same Hessian; its inverse factor and damping are used.
        strength: 0 gives the weight back, 1 the minimiser.

    Returns:
        ``[out, in]`` in ``hessian``'s dtype.
    """
    w = weight.to(hessian.dtype)
    order = factor.order
    drift = (w @ (cross - hessian))[:, order]
    step = torch.empty_like(w)
    step[:, order] = (drift @ factor.upper.T) @ factor.upper  # (H + damping)^-1 = U^T U
    return w + strength * step
