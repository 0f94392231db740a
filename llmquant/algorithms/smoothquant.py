"""SmoothQuant: make activations easier to round and weights harder, by as much as helps (Xiao et
al., arXiv:2211.10438).

Where a linear's input is rounded per token, one channel far larger than the others takes the grid
of them all. ``W x = (W diag(s)) (diag(1/s) x)`` with ``s_j = max|X_j|^alpha / max|W_j|^(1-alpha)``
(paper, equation 4) hands part of such a channel's size to the weights, which are rounded per row
and hold it more easily. A factor common to all ``s`` changes nothing in either rounding, so the
extremes' geometric mean is made 1, which keeps what is folded inside fp16.

Whether it helps is measured, with weights *and* inputs rounded as they will be: ``|A(X / s) Q(W
diag(s))^T - X W^T|^2`` over a sample of calibration tokens, ``A`` being an int8 engine's rounding
of activations (not quadratic in ``X``, so no sum of ``x x^T`` can stand for the tokens). The best
of the candidates and no scaling at all wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmquant.activations import int8_per_token
from llmquant.algorithms.awq import Scaled, evened
from llmquant.algorithms.rtn import rtn
from llmquant.algorithms.scale_search import ScaleSearch
from llmquant.errors import SpecError
from llmquant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Reader:
    """One linear that reads the channels.

    Attributes:
        weight: ``[out, in]``.
        spec: its grid.
        int8: whether its input is rounded to int8.
    """

    weight: Tensor
    spec: QuantSpec
    int8: bool


def smooth_scale(
    weights: Sequence[Tensor], largest: Tensor, alpha: float, channel: Tensor
) -> Tensor:
    """``[channels]`` factors of the weights' columns.

    Args:
        weights: each ``[out, in]``, all reading the same input.
        largest: ``[in]`` largest magnitude of each input over the calibration tokens.
        alpha: how much of the difficulty moves: 0 none of the activations', 1 all of it.
        channel: int64 ``[in]``, the factor that each input takes.

    Raises:
        SpecError: ``alpha`` outside 0 … 1.
    """
    if not 0 <= alpha <= 1:
        raise SpecError(f"SmoothQuant's alpha must be between 0 and 1, got {alpha}")
    inputs = _pooled_max(largest, channel)
    columns = _pooled_max(
        torch.stack([w.abs().amax(0) for w in weights]).amax(0).to(largest.dtype), channel
    )
    known = (inputs > 0) & (columns > 0)
    if not bool(known.any()):
        return torch.ones_like(inputs)
    scale = inputs.where(known, 1.0).pow(alpha) / columns.where(known, 1.0).pow(1 - alpha)
    # A channel without inputs or without weights says nothing of its size: it takes a middling
    # factor.
    scale = torch.where(known, scale, scale[known].log().mean().exp())
    return scale / (scale.max() * scale.min()).sqrt()


def search_smoothing(
    readers: Sequence[Reader],
    rows: Tensor,
    largest: Tensor,
    alphas: Sequence[float],
    search: ScaleSearch,
    channel: Tensor | None = None,
) -> Scaled:
    """The best of some strengths, or no scaling where none helps.

    Args:
        readers: linears with the same input.
        rows: ``[tokens, in]`` of that input.
        largest: ``[in]`` largest magnitude of each input over all tokens.
        alphas: strengths to try.
        search: the recipe's scale search.
        channel: int64 ``[in]``, the factor that each input takes, where several must take the same;
            None: each its own.

    Raises:
        SpecError: an ``alpha`` outside 0 … 1.
    """
    own = torch.arange(largest.numel(), device=largest.device) if channel is None else channel
    weights = evened([r.weight for r in readers])
    readers = [replace(r, weight=w) for r, w in zip(readers, weights, strict=True)]
    signal = sum(float((rows @ w.to(rows.dtype).T).square().sum()) for w in weights)
    relative = 1 / signal if signal > 0 else 0.0
    ones = torch.ones_like(_pooled_max(largest, own))
    before = smoothed_loss(readers, rows, ones[own], search) * relative
    best, found = before, Scaled(ones, None, False, before, before)
    for alpha in alphas:
        scale = smooth_scale(weights, largest, alpha, own)
        if not bool(torch.isfinite(scale).all()):
            continue
        loss = smoothed_loss(readers, rows, scale[own], search) * relative
        if loss < best:
            best, found = loss, Scaled(scale, alpha, False, before, loss)
    return found


def smoothed_loss(
    readers: Sequence[Reader], rows: Tensor, scale: Tensor, search: ScaleSearch
) -> float:
    """``|A(X / s) Q(W diag(s))^T - X W^T|^2`` over the readers; ``scale`` is ``[in]``."""
    scaled = rows / scale
    rounded = int8_per_token(scaled)
    importance = scaled.square().mean(0)
    total = 0.0
    for reader in readers:
        weight = reader.weight.to(rows.dtype)
        quantized = rtn(weight * scale, reader.spec, search, importance).dequantize(rows.dtype)
        got = (rounded if reader.int8 else scaled) @ quantized.T
        total += float((got - rows @ weight.T).square().sum())
    return total


def _pooled_max(values: Tensor, channel: Tensor) -> Tensor:
    """The largest over the inputs of each channel."""
    channels = int(channel.max()) + 1
    return torch.zeros(channels, dtype=values.dtype, device=values.device).scatter_reduce_(
        0, channel, values, "amax"
    )
