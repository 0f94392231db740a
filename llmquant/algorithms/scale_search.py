"""Group parameters: the (scale, zero-point) of every group of a weight, before any code is chosen.

Two ways. ``minmax`` spans the group's extremes. ``search`` tries a grid of narrower ranges, and for
symmetric specs both signs of the scale, and keeps the one with the smallest weighted error ``sum_j
importance_j * |w_j - q(w_j)|**norm``; ``importance`` is the mean square of each input channel (the
Hessian's diagonal) or 1. A negative scale mirrors the code range ``-2**(b-1) … 2**(b-1)-1``, so the
longer side can fall on whichever end of a group holds the outlier.

Every candidate is rounded to a portable scale *before* its error is measured, so what is compared
is what will be stored. The min-max candidate is always among them: a search is never worse than
min-max by its own measure. All of it is element-wise per group, so rows are processed in slices of
bounded size. A group's errors are summed in one order everywhere (:func:`_folded`), so the result
does not depend on the processor, the device or the number of threads. In float32 on the CPU
compiled code does the same, bit for bit (``native.py``).

A group whose scales would leave fp16's normal range is fitted at another power of two, which moves
no bit of the result, and gets its own back. Scales that fp16 then holds to fewer than five bits are
rounded to what it has (:func:`llmquant.weight.portable`) where next to nothing of the weight is in
their groups; otherwise the weight keeps scales that only a wider dtype holds, and a layout without
one refuses them. A zero-point below the layout's lowest is fitted once more, on a range that
reaches as far below 0 as that zero-point needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.algorithms import native
from llmquant.errors import SpecError
from llmquant.spec import QuantSpec
from llmquant.weight import (
    FP16_COARSE,
    FP16_EXACT,
    eight_bits,
    portable,
    times_power_of_two,
)

# Rows are searched in slices whose temporaries stay in a CPU's cache (measured up to three times
# faster than 1 << 21); an accelerator wants few, large launches instead. The result does not depend
# on it.
_SLICE_ELEMENTS = 1 << 17
_SLICE_ELEMENTS_ACCELERATOR = 1 << 24
# Scales outside these are searched at another power of two.
_LOWEST, _HIGHEST = 2.0**-14, 65280.0
# The share of a weight's squares that may lie in groups whose scales lose bits to fp16.
_NEGLIGIBLE = 1e-6
# Half of fp16's smallest step: a group inside it rounds to nothing.
_NOTHING = 2.0**-25


@dataclass(frozen=True, slots=True)
class ScaleSearch:
    """How group parameters are found.

    Attributes:
        steps: candidate ranges per sign; 0 means plain min-max.
        smallest: the narrowest candidate as a fraction of the widest.
        norm: exponent of the error.
        weighted: weigh errors by input-channel importance where statistics are at hand. Off by
            default: under GPTQ the unweighted search measures better (docs/decisions.md).
        lowest_zero: the smallest zero-point of an asymmetric group; 1 where the layout stores
            zero-points less one.
    """

    steps: int = 48
    smallest: float = 0.35
    norm: float = 2.0
    weighted: bool = False
    lowest_zero: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 < self.smallest <= 1 or self.norm <= 0:
            raise SpecError(
                f"scale search needs steps >= 0, 0 < smallest <= 1 and norm > 0, got {self}"
            )


MINMAX = ScaleSearch(steps=0)


def round_to_codes(w: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Nearest code of each weight as a float tensor in ``0 … max_code`` (ties to even). Shapes
    broadcast."""
    return torch.round(w / scale).add_(zero).clamp_(0, max_code)


def fit(
    weight: Tensor, spec: QuantSpec, search: ScaleSearch = MINMAX, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales and zero-points of every group in natural column order.

    Args:
        weight: float32 or float64 ``[out, in]``, finite.
        spec: its group size divides ``in``.
        search: min-max or a range search.
        importance: ``[in]`` non-negative weights of the columns' errors, or None for equal ones.

    Returns:
        scales ``[out, groups]`` in ``weight``'s dtype, portable unless fp16 has no room for them,
        and zeros uint8 ``[out, groups]``.
    """
    width = spec.width(weight.shape[1])
    groups = weight.contiguous().reshape(weight.shape[0], -1, width)
    cost = None if importance is None else importance.to(weight.dtype).reshape(1, -1, width)
    reach = _reach(groups, spec)
    shift = _shifts(reach, spec, search)
    moved = groups if shift is None else times_power_of_two(groups, shift.unsqueeze(-1))
    scales, zeros = _fit_groups(moved, spec, search, cost)
    if not spec.symmetric and search.lowest_zero:
        scales, zeros = _raised(moved, scales, zeros, spec, search, cost)
    if shift is None:
        return scales, zeros
    scales = eight_bits(times_power_of_two(scales, -shift)).to(scales.dtype)
    return _held(groups, reach, scales, zeros, spec, search)


def _fit_groups(
    groups: Tensor, spec: QuantSpec, search: ScaleSearch, cost: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The search over ``[out, groups, width]`` whose scales lie in fp16's normal range."""
    if search.norm == 2.0 and native.why_not(groups) is None:
        factors, fractions = _ranges(spec, search)
        lines = None if cost is None else cost[0]
        return native.fit(
            groups, lines, spec.max_code, spec.symmetric, search.steps, factors, fractions
        )
    elements = _SLICE_ELEMENTS if groups.device.type == "cpu" else _SLICE_ELEMENTS_ACCELERATOR
    rows = max(1, elements // (groups.shape[1] * groups.shape[2]))
    parts = [_fit_slice(part, spec, search, cost) for part in groups.split(rows)]
    scales, zeros = (torch.cat(p) for p in zip(*parts, strict=True))
    return scales, zeros.to(torch.uint8)


def _reach(groups: Tensor, spec: QuantSpec) -> Tensor:
    """``[out, groups]``: what a range's factor is multiplied with."""
    low, high = groups.amin(-1), groups.amax(-1)
    if spec.symmetric:
        return torch.maximum(high, -low)
    return high.clamp(min=0) - low.clamp(max=0)


def _shifts(reach: Tensor, spec: QuantSpec, search: ScaleSearch) -> Tensor | None:
    """Exponents ``[out, groups]`` that bring the reach of a group near 1 where a scale of its
    search would leave fp16's normal range, else 0; None where no group needs one."""
    factors, _ = _ranges(spec, search)
    outside = (reach * min(factors) < _LOWEST) | (reach * max(factors) > _HIGHEST)
    outside &= reach > 0
    if not bool(outside.any()):
        return None
    finite = reach.clamp(max=torch.finfo(reach.dtype).max)
    return torch.where(outside, 1 - torch.frexp(finite).exponent, 0)


def _raised(
    groups: Tensor,
    scales: Tensor,
    zeros: Tensor,
    spec: QuantSpec,
    search: ScaleSearch,
    cost: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The parameters with those of groups whose zero-point is below the lowest fitted once more."""
    low = zeros < search.lowest_zero
    if not bool(low.any()):
        return scales, zeros
    costs = None if cost is None else cost.expand_as(groups)[low].unsqueeze(1)
    scale, zero = _fit_slice(groups[low].unsqueeze(1), spec, search, costs, search.lowest_zero)
    scales, zeros = scales.clone(), zeros.clone()
    scales[low], zeros[low] = scale[:, 0], zero[:, 0].to(torch.uint8)
    return scales, zeros


def _held(
    groups: Tensor,
    reach: Tensor,
    scales: Tensor,
    zeros: Tensor,
    spec: QuantSpec,
    search: ScaleSearch,
) -> tuple[Tensor, Tensor]:
    """Scales as fp16 has them, unless that would cost more than next to nothing of the weight."""
    size = scales.abs()
    lost = (size < FP16_COARSE) | (size > _HIGHEST)
    if bool(lost.any()):
        largest = groups.abs().amax()
        squares = (groups / largest).square().sum(-1, dtype=torch.float64)
        if float(squares[lost].sum()) > _NEGLIGIBLE * float(squares.sum()):
            return scales, zeros
    scales = torch.where(size < FP16_EXACT, portable(scales).to(scales.dtype), scales)
    nothing = reach < _NOTHING
    scales = torch.where(nothing, portable(torch.zeros_like(scales)).to(scales.dtype), scales)
    return scales, zeros if spec.symmetric else torch.where(nothing, search.lowest_zero, zeros)


def _fit_slice(
    w: Tensor, spec: QuantSpec, search: ScaleSearch, cost: Tensor | None, lowest_zero: int = 0
) -> tuple[Tensor, Tensor]:
    candidates = _candidates(w, spec, search, lowest_zero)
    scale, zero = next(candidates)
    if search.steps == 0:
        return scale, zero
    best = _error(w, scale, zero, spec, search, cost)
    for new_scale, new_zero in candidates:
        error = _error(w, new_scale, new_zero, spec, search, cost)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, new_scale, scale)
        zero = torch.where(better, new_zero, zero)
    return scale, zero


def _ranges(spec: QuantSpec, search: ScaleSearch) -> tuple[list[float], list[float]]:
    """What a group's reach is multiplied with for the scale of every candidate range, and its
    fraction of the widest.

    The first is min-max. For symmetric specs that is one range more: their search spans the shorter
    side of the codes.
    """
    fractions = torch.linspace(1.0, search.smallest, max(search.steps, 1)).tolist()
    if not spec.symmetric:
        return [fraction / spec.max_code for fraction in fractions], fractions
    return [2 / spec.max_code, *(fraction / (spec.middle - 1) for fraction in fractions)], [
        1.0,
        *fractions,
    ]


def _candidates(
    w: Tensor, spec: QuantSpec, search: ScaleSearch, lowest_zero: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """(scale, zero) pairs ``[rows, groups]``; the first is min-max."""
    factors, fractions = _ranges(spec, search)
    if spec.symmetric:
        reach = w.abs().amax(-1)
        middle = torch.full_like(reach, spec.middle)
        yield eight_bits(reach * factors[0]).to(w.dtype), middle
        for factor in factors[1:]:
            scale = eight_bits(reach * factor).to(w.dtype)
            yield scale, middle
            yield -scale, middle
        return
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    if lowest_zero:
        low = torch.minimum(low, high * (-lowest_zero / (spec.max_code - lowest_zero)))
    for factor, fraction in zip(factors, fractions, strict=True):
        scale = eight_bits((high - low) * factor).to(w.dtype)
        zero = torch.round(-low * fraction / scale).clamp(lowest_zero, spec.max_code)
        yield scale, zero
        if search.steps:
            yield scale, (zero + 1).clamp(max=spec.max_code)
            yield scale, (zero - 1).clamp(min=lowest_zero)


def _error(
    w: Tensor,
    scale: Tensor,
    zero: Tensor,
    spec: QuantSpec,
    search: ScaleSearch,
    cost: Tensor | None,
) -> Tensor:
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    delta = round_to_codes(w, scale, zero, spec.max_code).sub_(zero).mul_(scale).sub_(w)
    delta = delta.square_() if search.norm == 2.0 else delta.abs_().pow_(search.norm)
    return _folded(delta if cost is None else delta.mul_(cost))


def _folded(numbers: Tensor) -> Tensor:
    """The sum over the last dim: its second half onto the first until one is left; of an odd number
    the middle one stays.

    ``sum`` would add in an order of the processor's choosing, and a last bit can choose between two
    candidates.
    """
    while (count := numbers.shape[-1]) > 1:
        half = (count + 1) // 2
        numbers[..., : count - half] += numbers[..., half:]
        numbers = numbers[..., :half]
    return numbers[..., 0]
