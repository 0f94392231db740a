"""GPTQ: round one column at a time and let the columns still to come absorb the error
(arXiv:2210.17323).

For a layer ``y = W x`` with ``H = sum x x^T`` the objective is ``tr((W - Q) H (W - Q)^T)``.
Rounding column ``i`` to ``q`` and moving the remaining columns to their optimum costs ``err = (w_i
- q) / U_ii`` and shifts column ``j > i`` by ``-err * U_ij``, where ``U`` is the upper triangle with
  ``H^-1 = U^T U``. We get ``U`` without forming ``H^-1``: with ``J``
the reversal, ``J H J = L L^T`` gives ``H = R R^T`` for the upper triangular ``R = J L J``, hence
``U = R^-1``. One Cholesky, one triangular inverse; linears that share an input share both.

Work goes in blocks of columns: inside a block every column is updated at once, columns behind it
get the block's errors in one matrix product. That is the same arithmetic in another order; the
tests hold it equal to the one-column loop.

Orders: ``static`` (default) visits columns by falling ``H_jj`` but keeps the groups and their
parameters of the natural order, so no engine needs to know; ``off`` visits them left to right;
``group`` forms the groups themselves in visiting order, which needs a stored ``g_idx``. With
``off`` and ``group`` a group's parameters are fitted when its first column is reached, on weights
that already carry the errors so far.

Columns whose inputs were all zero ("dead") are rounded to nearest and take no part in the updates:
after damping ``H`` is diagonal there. Zeroing them, as the reference code does, would delete
weights that other text may need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from llmquant.algorithms import native
from llmquant.algorithms.rtn import check_weight
from llmquant.algorithms.scale_search import ScaleSearch, fit, round_to_codes
from llmquant.errors import QuantizationError, SpecError
from llmquant.runtime.finite import all_finite
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

ActOrder = Literal["static", "off", "group"]
_MAX_DAMPING = 1.0


@dataclass(frozen=True, slots=True)
class GPTQOptions:
    """GPTQ's knobs.

    Attributes:
        block_size: at most this many columns per block; blocks also end where a group that is
            fitted late begins.
        damping: fraction of the Hessian's mean diagonal added to it; raised tenfold while Cholesky
            fails, up to 1.
        act_order: visiting order of the columns, see the module text.
        search: how group parameters are found.
    """

    block_size: int = 128
    damping: float = 0.01
    act_order: ActOrder = "static"
    search: ScaleSearch = field(default_factory=ScaleSearch)

    def __post_init__(self) -> None:
        if self.block_size < 1 or not 0 < self.damping <= _MAX_DAMPING:
            raise SpecError(
                f"GPTQ needs block_size >= 1 and 0 < damping <= {_MAX_DAMPING}, got {self}"
            )
        if self.act_order not in ("static", "off", "group"):
            raise SpecError(f"act_order={self.act_order!r} is not one of static, off, group")


@dataclass(frozen=True, slots=True)
class Factor:
    """What GPTQ needs of a Hessian; shared by every linear that reads the same input.

    Attributes:
        order: int64 ``[in]`` visiting order of the columns.
        upper: ``[in, in]`` upper triangular ``U`` in visiting order, ``(H + damping)^-1 = U^T U``.
        importance: ``[in]`` Hessian diagonal, natural order.
        damping: the fraction that was finally used.
        dead: number of columns that saw only zeros.
    """

    order: Tensor
    upper: Tensor
    importance: Tensor
    damping: float
    dead: int


def factorize(hessian: Tensor, options: GPTQOptions, module: str = "weight") -> Factor:
    """Order, damp and factorize a Hessian ``[in, in]`` (float32 or float64).

    Raises:
        QuantizationError: the Hessian is zero or not finite, or no damping up to 1 makes it
            positive definite.
    """
    diagonal = hessian.diagonal().clone()
    if not all_finite(hessian):
        raise QuantizationError(
            f"{module}: its calibration statistics overflowed; use a wider --dtype"
        )
    if float(diagonal.max()) <= 0:
        raise QuantizationError(
            f"{module}: its inputs were zero for every calibration token, so GPTQ has no statistics"
        )
    order = _visiting_order(diagonal, options.act_order)
    damping = options.damping
    mean = diagonal.mean()
    while True:
        upper = _inverse_upper(hessian, order, damping * mean)
        if upper is not None:
            dead = int((diagonal == 0).sum())
            return Factor(order, upper, diagonal, damping, dead)
        if damping >= _MAX_DAMPING:
            raise QuantizationError(
                f"{module}: its Hessian is not positive definite even at damping {damping:g}"
            )
        damping = min(damping * 10, _MAX_DAMPING)


def _visiting_order(diagonal: Tensor, act_order: ActOrder) -> Tensor:
    if act_order == "off":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def _inverse_upper(hessian: Tensor, order: Tensor, damping: Tensor) -> Tensor | None:
    """``U`` with ``(H + damping)^-1 = U^T U`` in visiting order, or None when that is not
    numerically positive definite.

    Each matrix is let go before the next is made: at 14336 columns one takes 0.8 GB.
    """
    damped = hessian[order][:, order]
    damped.diagonal().add_(damping)
    damped = damped.flip(0, 1)
    lower, info = torch.linalg.cholesky_ex(damped)
    del damped
    if int(info) != 0:
        return None
    lower = lower.flip(0, 1)
    eye = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
    upper: Tensor = torch.linalg.solve_triangular(lower, eye, upper=True)
    return upper if all_finite(upper) else None


@dataclass(slots=True)
class _Grid:
    """Group parameters in visiting order: each visited column's group, and parameters filled in as
    they are known."""

    group_of: Tensor  # int64 [in]: group of each visited column
    scales: Tensor  # [groups, out]
    zeros: Tensor  # [groups, out], same dtype as scales
    fitted_ahead: bool


def gptq(
    weight: Tensor, factor: Factor, spec: QuantSpec, options: GPTQOptions, module: str = "weight"
) -> QuantizedWeight:
    """Quantize ``[out, in]`` given its input's factorized Hessian.

    Args:
        weight: float; computed in the dtype of ``factor.upper``.
        factor: from :func:`factorize` with the same options.
        spec: the grid; ``act_order="group"`` needs a group size.
        options: see :class:`GPTQOptions`.
        module: name used in errors.
    """
    w = check_weight(weight, spec, module).to(factor.upper.dtype)
    if options.act_order == "group" and spec.group_size is None:
        raise SpecError(
            f"{module}: act_order group needs a group size; one group per row has no order (use static)"
        )
    grid = _start_grid(w, factor, spec, options)
    codes = _visit(w.T[factor.order].contiguous(), grid, factor, spec, options)
    natural = torch.empty_like(codes)
    natural[factor.order] = codes
    g_idx = None
    if options.act_order == "group":
        g_idx = torch.empty_like(factor.order)
        g_idx[factor.order] = grid.group_of
    return QuantizedWeight(
        natural.T.to(torch.uint8).contiguous(),
        grid.scales.T.to(torch.float32).contiguous(),
        grid.zeros.T.to(torch.uint8).contiguous(),
        spec,
        None if g_idx is None else g_idx.to(torch.int32),
    )


def _start_grid(w: Tensor, factor: Factor, spec: QuantSpec, options: GPTQOptions) -> _Grid:
    out_features, in_features = w.shape
    width = spec.width(in_features)
    visited = torch.arange(in_features, device=w.device)
    if options.act_order == "static":
        importance = factor.importance if options.search.weighted else None
        scales, zeros = fit(w, spec, options.search, importance)
        return _Grid(
            factor.order // width, scales.T.contiguous(), zeros.T.to(w.dtype).contiguous(), True
        )
    empty = torch.empty(spec.groups(in_features), out_features, dtype=w.dtype, device=w.device)
    return _Grid(visited // width, empty, empty.clone(), False)


def _fit_group(
    w: Tensor, first: int, grid: _Grid, factor: Factor, spec: QuantSpec, options: GPTQOptions
) -> None:
    """Fit the group that begins at visited column ``first`` on the weights ``[in, out]`` as they
    now stand."""
    width = spec.width(w.shape[0])
    columns = slice(first, first + width)
    importance = factor.importance[factor.order[columns]] if options.search.weighted else None
    scale, zero = fit(
        w[columns].T, QuantSpec(spec.bits, None, spec.symmetric), options.search, importance
    )
    grid.scales[first // width] = scale[:, 0]
    grid.zeros[first // width] = zero[:, 0].to(w.dtype)


def _blocks(in_features: int, wanted: int, width: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of blocks of at most ``wanted`` columns: whole groups of ``width``, or
    pieces of one wider group.

    Either way a group begins with a block, or behind whole groups of it, so that no error is still
    on its way to any of its columns when it is fitted.
    """
    span = width * max(1, wanted // width)
    for first in range(0, in_features, span):
        last = min(first + span, in_features)
        for start in range(first, last, wanted):
            yield start, min(start + wanted, last)


def _visit(w: Tensor, grid: _Grid, factor: Factor, spec: QuantSpec, options: GPTQOptions) -> Tensor:
    """The blocked GPTQ loop; returns codes as floats.

    ``w`` (overwritten) and the codes are ``[in, out]`` in visiting order: a column of the weight is
    one contiguous row here, which measured five times faster than striding over ``[out, in]``.
    """
    codes = torch.empty_like(w)
    width = spec.width(w.shape[0])
    visit = native.visit
    if native.why_not(w) is not None:
        # Read once: in the loop a device would be waited for at every block.
        visit = partial(_visit_block, groups=grid.group_of.tolist())
    for start, stop in _blocks(w.shape[0], options.block_size, 1 if grid.fitted_ahead else width):
        errors = torch.empty(stop - start, w.shape[1], dtype=w.dtype, device=w.device)
        square = factor.upper[start:stop, start:stop]
        for first in range(start, stop, stop - start if grid.fitted_ahead else width):
            if not grid.fitted_ahead and first % width == 0:
                _fit_group(w, first, grid, factor, spec, options)
            last = stop if grid.fitted_ahead else min(first + width, stop)
            visit(
                w,
                codes,
                errors,
                square,
                (grid.scales, grid.zeros, grid.group_of),
                start,
                range(first, last),
                spec.max_code,
            )
        w[stop:].addmm_(factor.upper[start:stop, stop:].T, errors, alpha=-1)
    return codes


def _visit_block(
    w: Tensor,
    codes: Tensor,
    errors: Tensor,
    square: Tensor,
    grid: tuple[Tensor, Tensor, Tensor],
    start: int,
    columns: range,
    max_code: int,
    *,
    groups: Sequence[int],
) -> None:
    """Round ``columns`` of the block that begins at ``start``; ``square`` is its part of ``U``,
    ``groups`` the group of each visited column.

    Their codes and errors are written, and ``w`` behind each, up to the block's end, is rid of its
    error.
    """
    stop, (scales, zeros, _) = start + len(errors), grid
    for column in columns:
        row = square[column - start]
        scale, zero = scales[groups[column]], zeros[groups[column]]
        code = round_to_codes(w[column], scale, zero, max_code)
        error = (w[column] - (code - zero) * scale) / row[column - start]
        codes[column] = code
        errors[column - start] = error
        w[column + 1 : stop].addr_(row[column + 1 - start :], error, alpha=-1)


def layer_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Relative output error ``tr(D H D^T) / tr(W H W^T)`` with ``D = W - Q``; 0 when the outputs
    are all zero."""
    w = weight.to(hessian.dtype)
    delta = w - quantized.to(hessian.dtype)
    signal = float(((w @ hessian) * w).sum())
    return float(((delta @ hessian) * delta).sum()) / signal if signal > 0 else 0.0
