"""Slow, obvious twins of the algorithms, written from the papers and not from the code they check.

``gptq_twin`` is the greedy solver of *Optimal Brain Compression* (arXiv:2208.11580, eq. 3 and 4) in
GPTQ's fixed order: it holds the whole inverse Hessian, moves *all* remaining columns after every
single one, and then eliminates that column's row and column from the inverse by ``H^-1 -= H^-1[:,
i] H^-1[i, :] / H^-1[i, i]``. No blocks, no Cholesky, float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.algorithms import GPTQOptions, ScaleSearch, fit
from llmquant.spec import QuantSpec


@dataclass(frozen=True)
class TwinResult:
    """Codes ``[out, in]`` and the numbers they mean, both in natural column order; the group of
    each column."""

    codes: Tensor
    dequantized: Tensor
    group_of: Tensor


def gptq_twin(weight: Tensor, hessian: Tensor, spec: QuantSpec, options: GPTQOptions) -> TwinResult:
    """GPTQ on float64 ``weight`` ``[out, in]`` and ``hessian`` ``[in, in]``, one column at a
    time."""
    in_features = weight.shape[1]
    importance = hessian.diagonal().clone()
    columns = list(range(in_features))
    if options.act_order != "off":
        columns.sort(key=lambda j: -float(importance[j]))
    inverse = torch.linalg.inv(
        hessian + options.damping * importance.mean() * torch.eye(in_features, dtype=torch.float64)
    )
    members = _groups(columns, spec.width(in_features), options.act_order)
    weighted = importance if options.search.weighted else None

    w = weight.clone()
    codes, dequantized = torch.zeros_like(w), torch.zeros_like(w)
    group_of = torch.zeros(in_features, dtype=torch.int64)
    parameters: dict[int, tuple[Tensor, Tensor]] = {}
    left = list(columns)
    for j in columns:
        group = next(g for g, inside in enumerate(members) if j in inside)
        if group not in parameters:
            # Static groups are fitted on the original weights, the others on what the columns
            # before them left behind.
            source = weight if options.act_order == "static" else w
            parameters[group] = _fit(
                source[:, members[group]], spec, options.search, weighted, members[group]
            )
        scale, zero = parameters[group]
        code = torch.clamp(torch.round(w[:, j] / scale) + zero, 0, spec.max_code)
        codes[:, j], dequantized[:, j], group_of[j] = code, (code - zero) * scale, group
        left.remove(j)
        error = (w[:, j] - dequantized[:, j]) / inverse[j, j]
        for k in left:
            w[:, k] = w[:, k] - error * inverse[j, k]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
    return TwinResult(codes, dequantized, group_of)


def _groups(columns: list[int], width: int, act_order: str) -> list[list[int]]:
    """Columns of each group: consecutive ones as stored, or for ``group`` as visited."""
    source = columns if act_order == "group" else sorted(columns)
    return [source[i : i + width] for i in range(0, len(source), width)]


def _fit(
    w: Tensor, spec: QuantSpec, search: ScaleSearch, importance: Tensor | None, members: list[int]
) -> tuple[Tensor, Tensor]:
    """One group's parameters; the fit itself has twins of its own below."""
    one = QuantSpec(spec.bits, None, spec.symmetric)
    scale, zero = fit(w, one, search, None if importance is None else importance[members])
    return scale[:, 0], zero[:, 0].double()


def portable_twin(value: float) -> float:
    """Eight significant bits, ties to even, magnitude in fp16's normal range."""
    magnitude = min(max(abs(value), 2.0**-14), 65280.0)
    fraction, exponent = math.frexp(magnitude)
    return math.copysign(
        min(math.ldexp(round(fraction * 256) / 256, exponent), 65280.0), -1.0 if value < 0 else 1.0
    )


def quantized_value(w: float, scale: float, zero: int, max_code: int) -> float:
    return (min(max(round(w / scale) + zero, 0), max_code) - zero) * scale


def minmax_twin(group: list[float], spec: QuantSpec) -> tuple[float, int]:
    """Scale and zero-point that span a group's extremes (and 0, when the zero-point is free)."""
    if spec.symmetric:
        return portable_twin(max(abs(w) for w in group) * (2 / spec.max_code)), spec.middle
    low, high = min(*group, 0.0), max(*group, 0.0)
    scale = portable_twin((high - low) * (1.0 / spec.max_code))
    return scale, min(max(round(-low / scale), 0), spec.max_code)


def candidates(
    group: list[float], spec: QuantSpec, search: ScaleSearch
) -> Iterator[tuple[float, int]]:
    """Min-max and every narrower range of a search, signs and neighbouring zero-points included."""
    yield minmax_twin(group, spec)
    step = (1.0 - search.smallest) / max(search.steps - 1, 1)
    for i in range(search.steps):
        fraction = 1.0 - i * step
        if spec.symmetric:
            scale = portable_twin(max(abs(w) for w in group) * fraction / (spec.middle - 1))
            yield scale, spec.middle
            yield -scale, spec.middle
            continue
        low, high = min(*group, 0.0), max(*group, 0.0)
        scale = portable_twin((high - low) * fraction / spec.max_code)
        zero = min(max(round(-low * fraction / scale), 0), spec.max_code)
        for near in (zero - 1, zero, zero + 1):
            yield scale, min(max(near, 0), spec.max_code)


def error_of(
    group: list[float],
    scale: float,
    zero: int,
    spec: QuantSpec,
    norm: float,
    cost: list[float] | None = None,
) -> float:
    """``sum cost * |w - q(w)|**norm``."""
    weights = cost or [1.0] * len(group)
    return sum(
        c * abs(w - quantized_value(w, scale, zero, spec.max_code)) ** norm
        for c, w in zip(weights, group, strict=True)
    )
