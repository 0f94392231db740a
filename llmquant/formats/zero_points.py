"""Are the zero-points what the label says? Bytes cannot tell, magnitudes can.

Read one convention as the other (GPTQ v1 stores z - 1, v2 stores z; tools have mislabelled both)
and every zero-point is off by one, hence every weight by one scale, always the same way. A model's
weights are centred: within a group the mean code less the zero-point strays from 0 by a random
amount, whose *median over many groups* is near 0 if z is right and near +1 or -1 if not.

With the unquantized base model there is nothing to infer: the right shift is the one whose weights
are nearest to it.

The magnitude argument needs narrow grids (at 8 bits one step is a tenth of the groups' own spread)
and centred weights. It answers ``None``, undecided, rather than guess: where the median lies
between, where there are too few groups, or where unquantized neighbours of the same model are not
centred themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmquant.errors import FormatError
from llmquant.formats.base import Scheme
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

_NEAR = 0.25  # of one code: how close to a whole shift the median has to be
_ERRORS = 4.0  # standard errors of the median that must fit into _NEAR
_WIDEST = 4  # bits


@dataclass(frozen=True, slots=True)
class ZeroVerdict:
    """What the numbers say of the zero-points as they were read.

    Attributes:
        shift: to add to every zero-point: 0 they are right, ±1 they are off by one, None undecided.
        by: ``base`` (compared with a base model) or ``magnitude``.
        offset: median over groups of mean(code) - zero, in codes; with a base, the root mean square
            error in scales.
        groups: how many groups were looked at.
    """

    shift: int | None
    by: Literal["base", "magnitude"]
    offset: float
    groups: int


def doubtful(config: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> tuple[str, ...]:
    """Modules whose zero-point convention rests on a label that is known to lie: asymmetric ones in
    GPTQ's layout."""
    method = str(config.get("quant_method"))
    if "awq" in f"{method} {config.get('packing_format')}" or method == "compressed-tensors":
        return ()
    return tuple(n for n, s in schemes.items() if not s.spec.symmetric)


def check_zero_convention(
    weights: Mapping[str, QuantizedWeight],
    base: Mapping[str, Tensor] | None = None,
    neighbours: Iterable[Tensor] = (),
) -> ZeroVerdict:
    """Judge zero-points that were read under some convention.

    Args:
        weights: asymmetric modules as read; a few are enough.
        base: the same modules' unquantized weights ``[out, in]``, of a model that was only rounded,
            not rescaled.
        neighbours: unquantized linear weights ``[out, in]`` of the same folder, to see that its
            weights are centred.
    """
    if base:
        return _by_base(weights, base)
    means = torch.cat([_mean_codes(w) for w in weights.values()])
    offset = float(means.median())
    deviation = (
        float((means - offset).abs().median()) * 1.4826
    )  # a standard deviation that outliers do not move
    error = 1.2533 * deviation / means.numel() ** 0.5
    nearest = round(offset)
    narrow = all(w.spec.bits <= _WIDEST for w in weights.values())
    spec = next(iter(weights.values())).spec
    centred = all(abs(_centre(n, spec)) < _NEAR for n in neighbours)
    sure = (
        narrow
        and centred
        and abs(nearest) <= 1
        and abs(offset - nearest) < _NEAR
        and _ERRORS * error < _NEAR
    )
    return ZeroVerdict(nearest if sure else None, "magnitude", offset, means.numel())


def refuse_shifted(verdict: ZeroVerdict, label: str) -> None:
    """Raise if the verdict is that the zero-points are off by one.

    Args:
        label: what the file calls its layout.

    Raises:
        FormatError: with the evidence and the ways out.
    """
    if not verdict.shift:
        return
    less_one, as_they_are = (
        "v1 (gptq, auto_round:auto_gptq: zeros less one)",
        "v2 (gptq_v2, auto_round: zeros as they are)",
    )
    other = less_one if verdict.shift > 0 else as_they_are
    evidence = (
        f"{verdict.groups} groups have a median of {verdict.offset:+.2f} scales where weights are centred on 0"
        if verdict.by == "magnitude"
        else "the base model's weights are nearest one scale away"
    )
    raise FormatError(
        f"the zero-points are labelled {label} but {evidence}, so the label is wrong: the bytes read right as GPTQ {other}. "
        "Correct the label in the config, or let `llmquant convert --base MODEL` decide by the unquantized model"
    )


def _mean_codes(weight: QuantizedWeight) -> Tensor:
    """mean(code) - zero of every group, flat; a group of all equal codes says nothing and is left
    out."""
    group = weight.column_groups().expand_as(weight.codes)
    codes = weight.codes.to(torch.float32)
    sums = torch.zeros_like(weight.scales).scatter_add_(1, group, codes)
    squares = torch.zeros_like(weight.scales).scatter_add_(1, group, codes * codes)
    counts = torch.bincount(weight.column_groups(), minlength=weight.scales.shape[1]).clamp(min=1)
    means = sums / counts
    return (means - weight.zeros)[squares / counts > means * means + 1e-3]


def _centre(weight: Tensor, spec: QuantSpec) -> float:
    """The same median for an unquantized weight, in units of the scale that min-max rounding would
    give it."""
    rows, columns = weight.shape
    if spec.group_size is not None and columns % spec.group_size:
        return 0.0
    groups = weight.to(torch.float32).reshape(rows, -1, spec.width(columns))
    scale = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)).clamp(
        min=1e-12
    ) / spec.max_code
    return float((groups.mean(-1) / scale).median())


def _by_base(weights: Mapping[str, QuantizedWeight], base: Mapping[str, Tensor]) -> ZeroVerdict:
    shared: Collection[str] = weights.keys() & base.keys()
    if not shared:
        raise FormatError(
            f"the base model has none of the modules {', '.join(sorted(weights)[:3])}"
        )
    errors = dict.fromkeys((0, 1, -1), 0.0)
    count = groups = 0
    for name in shared:
        weight, original = weights[name], base[name].to(torch.float32)
        if tuple(original.shape) != weight.shape:
            raise FormatError(
                f"{name} is {list(weight.shape)} here and {list(original.shape)} in the base model"
            )
        step = weight.scales[:, weight.column_groups()]
        off = torch.where(step == 0, 0.0, (weight.dequantize() - original) / step)
        for shift in errors:
            errors[shift] += float((off - shift).square().sum(dtype=torch.float64))
        count, groups = count + off.numel(), groups + weight.scales.numel()
    best = min(errors, key=errors.__getitem__)
    return ZeroVerdict(best, "base", (errors[best] / count) ** 0.5, groups)
