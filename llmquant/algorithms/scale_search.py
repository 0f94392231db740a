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
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.algorithms import native
from llmquant.errors import SpecError
from llmquant.spec import QuantSpec
from llmquant.weight import portable

# Rows are searched in slices whose temporaries stay in a CPU's cache (measured up to three times
# faster than 1 << 21); an accelerator wants few, large launches instead. The result does not depend
# on it.
_SLICE_ELEMENTS = 1 << 17
_SLICE_ELEMENTS_ACCELERATOR = 1 << 24


@dataclass(frozen=True, slots=True)
class ScaleSearch:
    """How group parameters are found.

    Attributes:
        steps: candidate ranges per sign; 0 means plain min-max.
        smallest: the narrowest candidate as a fraction of the widest.
        norm: exponent of the error.
        weighted: weigh errors by input-channel importance where statistics are at hand. Off by
            default: under GPTQ the unweighted search measures better (docs/decisions.md).
    """

    steps: int = 48
    smallest: float = 0.35
    norm: float = 2.0
    weighted: bool = False

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
        scales ``[out, groups]`` in ``weight``'s dtype, portable, and zeros uint8 ``[out, groups]``.
    """
    out_features, in_features = weight.shape
    width = spec.width(in_features)
    groups = weight.contiguous().reshape(out_features, -1, width)
    cost = None if importance is None else importance.to(weight.dtype).reshape(1, -1, width)
    if search.norm == 2.0 and native.why_not(groups) is None:
        factors, fractions = _ranges(spec, search)
        lines = None if cost is None else cost[0]
        return native.fit(
            groups, lines, spec.max_code, spec.symmetric, search.steps, factors, fractions
        )
    elements = _SLICE_ELEMENTS if weight.device.type == "cpu" else _SLICE_ELEMENTS_ACCELERATOR
    rows = max(1, elements // in_features)
    parts = [_fit_slice(part, spec, search, cost) for part in groups.split(rows)]
    scales, zeros = (torch.cat(p) for p in zip(*parts, strict=True))
    return scales, zeros.to(torch.uint8)


def _fit_slice(
    w: Tensor, spec: QuantSpec, search: ScaleSearch, cost: Tensor | None
) -> tuple[Tensor, Tensor]:
    candidates = _candidates(w, spec, search)
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


def _candidates(w: Tensor, spec: QuantSpec, search: ScaleSearch) -> Iterator[tuple[Tensor, Tensor]]:
    """(scale, zero) pairs ``[rows, groups]``; the first is min-max."""
    factors, fractions = _ranges(spec, search)
    if spec.symmetric:
        reach = w.abs().amax(-1)
        middle = torch.full_like(reach, spec.middle)
        yield portable(reach * factors[0]).to(w.dtype), middle
        for factor in factors[1:]:
            scale = portable(reach * factor).to(w.dtype)
            yield scale, middle
            yield -scale, middle
        return
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    for factor, fraction in zip(factors, fractions, strict=True):
        scale = portable((high - low) * factor).to(w.dtype)
        zero = torch.round(-low * fraction / scale).clamp(0, spec.max_code)
        yield scale, zero
        if search.steps:
            yield scale, (zero + 1).clamp(max=spec.max_code)
            yield scale, (zero - 1).clamp(min=0)


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
