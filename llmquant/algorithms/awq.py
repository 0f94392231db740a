"""AWQ: scale input channels that matter up before rounding, and their inputs down by as much
(arXiv:2306.00978).

``W x = (W diag(s)) (diag(1/s) x)``: the product stands, but rounding ``W diag(s)`` gives a channel
with a large ``s`` a finer grid relative to its weights. Candidates are ``s = a^r`` with ``a`` the
mean magnitude of each input channel and ``r`` from 0 to 1, and ("duo") ``a^r / b^(1-r)`` with ``b``
the mean over rows of ``|w|`` relative to its group's largest, as in AutoAWQ.

The loss of a candidate is the output error ``tr(D H D^T)`` with ``D = Q(W diag(s)) diag(1/s) - W``
and ``H`` the sum of ``x x^T``: exactly what a pass over all calibration tokens would measure, for
one matrix product. ``Q`` is round-to-nearest, whatever rounds in the end. The winner is measured
once more against no scaling with the recipe's own scale search; where it does not win, nothing is
scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llmquant.algorithms.rtn import rtn
from llmquant.algorithms.scale_search import ScaleSearch
from llmquant.errors import QuantizationError, SpecError
from llmquant.spec import QuantSpec
from llmquant.weight import times_power_of_two

DuoScaling = Literal["both", "on", "off"]
_SMALLEST = 1e-4
_UNEVEN = 3  # powers of two between the sizes of readers
_FAR = (-5, 10)  # exponents of the largest activity between which it is taken as it is


@dataclass(frozen=True, slots=True)
class AWQOptions:
    """How scales are searched.

    Attributes:
        grid: exponents between 0 and 1 per kind of candidate.
        duo_scaling: with the weights' magnitudes, without, or both kinds.
        steps: scale-search steps per candidate, at most the recipe's own (0: min-max), which the
            final comparison uses.
    """

    grid: int = 20
    duo_scaling: DuoScaling = "both"
    steps: int = 16

    def __post_init__(self) -> None:
        if self.grid < 1 or self.steps < 0 or self.duo_scaling not in ("both", "on", "off"):
            raise SpecError(
                f"AWQ needs grid >= 1, steps >= 0 and duo_scaling both, on or off, got {self}"
            )


@dataclass(frozen=True, slots=True)
class Scaled:
    """The result of a search.

    Attributes:
        scale: ``[channels]`` factors of the input channels, 1 where scaling did not help.
        ratio: the winner's exponent; None where nothing is scaled.
        duo: whether the winner looks at the weights' magnitudes.
        before, after: relative output error of all linears together when rounded to nearest,
            unscaled and with ``scale``.
    """

    scale: Tensor
    ratio: float | None
    duo: bool
    before: float
    after: float


def search_scale(
    weights: Sequence[Tensor],
    specs: Sequence[QuantSpec],
    hessian: Tensor,
    mean_abs: Tensor,
    search: ScaleSearch,
    options: AWQOptions,
    channel: Tensor | None = None,
    module: str = "weight",
) -> Scaled:
    """Find the scales of the channels that some linears read.

    Args:
        weights: each ``[out, in]``, of linears with the same input.
        specs: their grids.
        hessian: ``[in, in]`` sum of ``x x^T``.
        mean_abs: ``[in]`` mean magnitude of each input.
        search: the recipe's scale search, for the final comparison.
        options: see :class:`AWQOptions`.
        channel: int64 ``[in]``, the scale that each input takes, where several must take the same;
            None: each its own.
        module: name used in errors.

    Raises:
        QuantizationError: statistics that are not finite.
    """
    if not bool(torch.isfinite(hessian).all() and torch.isfinite(mean_abs).all()):
        raise QuantizationError(
            f"{module}: its calibration statistics overflowed; use a wider --dtype"
        )
    own = torch.arange(mean_abs.numel(), device=mean_abs.device) if channel is None else channel
    weights = evened([w.to(hessian.dtype) for w in weights])
    signal = sum(float(((w @ hessian) * w).sum()) for w in weights)
    cheap = replace(search, steps=min(options.steps, search.steps))
    importance = hessian.diagonal()
    best, found = float("inf"), None
    for ratio, duo, scale in candidates(weights, specs, mean_abs, own, options):
        loss = loss_of(weights, specs, hessian, importance, scale[own], cheap)
        if loss < best:
            best, found = loss, (ratio, duo, scale)
    ones = torch.ones_like(pooled(mean_abs, own))
    before = loss_of(weights, specs, hessian, importance, ones[own], search)
    after = (
        before
        if found is None
        else loss_of(weights, specs, hessian, importance, found[2][own], search)
    )
    relative = 1 / signal if signal > 0 else 0.0
    if found is None or not after < before:
        return Scaled(ones, None, False, before * relative, before * relative)
    ratio, duo, scale = found
    return Scaled(scale, ratio, duo, before * relative, after * relative)


def candidates(
    weights: Sequence[Tensor],
    specs: Sequence[QuantSpec],
    mean_abs: Tensor,
    channel: Tensor,
    options: AWQOptions,
) -> Iterator[tuple[float, bool, Tensor]]:
    """(exponent, duo, scales ``[channels]``), the geometric mean of each one's extremes 1."""
    activity = _near_one(pooled(mean_abs, channel))
    magnitude = pooled(_magnitude(weights, specs), channel)
    for duo in {"both": (False, True), "on": (True,), "off": (False,)}[options.duo_scaling]:
        for step in range(0 if duo else 1, options.grid + 1):
            ratio = step / options.grid
            scale = activity.pow(ratio)
            if duo:
                scale = scale / (magnitude.pow(1 - ratio) + _SMALLEST)
            scale = scale.clamp(min=_SMALLEST)
            # An input that was never seen says nothing about its channel.
            scale = torch.where(activity > 0, scale, scale.log().mean().exp())
            scale = scale / (scale.max() * scale.min()).sqrt()
            if bool(torch.isfinite(scale).all()):
                yield ratio, duo, scale


def evened(weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights of readers of one input at powers of two that make their sizes alike, where the
    largest is several times the smallest: their losses are added up, and what a reader's size
    is says nothing of what it counts for."""
    sizes = torch.stack([w.abs().amax() for w in weights])
    exponents = torch.where(sizes > 0, sizes, sizes.max()).clamp(min=1e-38).log2()
    moves = (exponents.max() - exponents).round().to(torch.int32)
    if int(moves.max()) < _UNEVEN:
        return list(weights)
    return [times_power_of_two(w, move) for w, move in zip(weights, moves, strict=True)]


def _near_one(activity: Tensor) -> Tensor:
    """Activations that are all small, or large, at another power of two: it falls out of the
    candidates, but their floor is absolute."""
    largest = activity.max()
    exponent = torch.frexp(largest).exponent
    far = (exponent < _FAR[0]) | (exponent > _FAR[1])
    return times_power_of_two(activity, torch.where(far, -exponent, 0))


def pooled(values: Tensor, channel: Tensor) -> Tensor:
    """The mean over the inputs of each channel."""
    channels = int(channel.max()) + 1
    total = torch.zeros(channels, dtype=values.dtype, device=values.device).index_add_(
        0, channel, values
    )
    return total / torch.bincount(channel, minlength=channels)


def _magnitude(weights: Sequence[Tensor], specs: Sequence[QuantSpec]) -> Tensor:
    """``[in]`` mean over all rows of ``|w|`` relative to the largest of its group."""
    rows = []
    for w, spec in zip(weights, specs, strict=True):
        groups = w.abs().reshape(w.shape[0], -1, spec.width(w.shape[1]))
        rows.append((groups / (groups.amax(-1, keepdim=True) + 1e-6)).reshape(w.shape))
    return torch.cat(rows).mean(0)


def loss_of(
    weights: Sequence[Tensor],
    specs: Sequence[QuantSpec],
    hessian: Tensor,
    importance: Tensor,
    scale: Tensor,
    search: ScaleSearch,
) -> float:
    """``sum tr(D H D^T)`` over the linears, rounded to nearest under ``scale`` ``[in]``."""
    total = 0.0
    for w, spec in zip(weights, specs, strict=True):
        rounded = rtn(w * scale, spec, search, importance / scale.square()).dequantize(w.dtype)
        delta = rounded / scale - w
        total += float(((delta @ hessian) * delta).sum())
    return total
