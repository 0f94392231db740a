"""One linear of a walk rounded, by the weights alone or with statistics of its inputs, and what is
reported of it."""

from __future__ import annotations

import time

from torch import Tensor

from llmquant.algorithms import Factor, asymmetric_target, descend, gptq, layer_error, rtn
from llmquant.quantization.plan import ModuleReport, WalkPlan
from llmquant.runtime.memory import peak_resident_bytes
from llmquant.spec import QuantSpec
from llmquant.stats import InputStats, PairStats
from llmquant.weight import QuantizedWeight, coarse_scales, unportable_scales

Rounded = tuple[QuantizedWeight, ModuleReport]


def to_nearest(plan: WalkPlan, name: str, weight: Tensor, fallback: str | None = None) -> Rounded:
    """Round to nearest without statistics.

    Args:
        plan: of the walk.
        name: of the linear.
        weight: float32 ``[out, in]``.
        fallback: why it is not the recipe's method.
    """
    start = time.perf_counter()
    quantized = rtn(weight, plan.specs[name], plan.search, None, name)
    report = ModuleReport(
        name=name,
        spec=quantized.spec,
        digest=quantized.digest(),
        weight_error=weight_error(weight, quantized),
        seconds=time.perf_counter() - start,
        peak=peak_resident_bytes(),
        fallback=fallback,
        coarse=coarse_scales(quantized.scales),
        wide=unportable_scales(quantized.scales),
    )
    return quantized, report


def with_statistics(
    plan: WalkPlan, name: str, weight: Tensor, stats: InputStats, factor: Factor | None
) -> Rounded:
    """Round by GPTQ, or without a ``factor`` to nearest, with scales that may weigh the inputs.

    Args:
        plan: of the walk.
        name: of the linear.
        weight: float32 ``[out, in]``.
        stats: of its inputs.
        factor: of their Hessian.
    """
    start = time.perf_counter()
    spec = plan.specs[name]
    quantized = round_weight(plan, weight, stats, factor, spec, name)
    report = ModuleReport(
        name=name,
        spec=spec,
        digest=quantized.digest(),
        weight_error=weight_error(weight, quantized),
        output_error=layer_error(weight, quantized.dequantize(), stats.hessian),
        damping=factor.damping if factor else None,
        dead=int((stats.hessian.diagonal() == 0).sum()),
        tokens=stats.tokens,
        dropped=stats.dropped,
        seconds=time.perf_counter() - start,
        peak=peak_resident_bytes(),
        coarse=coarse_scales(quantized.scales),
        wide=unportable_scales(quantized.scales),
    )
    return quantized, report


def round_weight(
    plan: WalkPlan,
    weight: Tensor,
    stats: InputStats,
    factor: Factor | None,
    spec: QuantSpec,
    name: str,
) -> QuantizedWeight:
    """A float32 weight ``[out, in]`` on the grid of ``spec``: to nearest without a ``factor``, else
    by GPTQ with the recipe's refinements around it. What a run does, and what measuring a linear's
    sensitivity does."""
    if factor is None:
        return rtn(weight, spec, plan.search, stats.importance if stats.tokens else None, name)
    wanted, target = plan.recipe.gptq, weight
    if isinstance(stats, PairStats):
        target = asymmetric_target(weight, stats.hessian, stats.cross, factor, wanted.asymmetric)
    quantized = gptq(target, factor, spec, plan.gptq_options, name)
    if wanted.passes == 0:
        return quantized
    damped = stats.hessian.clone()
    damped.diagonal().add_(factor.damping * damped.diagonal().mean())
    return descend(target, quantized, damped, wanted.passes, wanted.block_size)


def weight_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """``|W - Q|^2 / |W|^2``."""
    norm = float(weight.square().sum())
    return float((weight - quantized.dequantize()).square().sum()) / norm if norm > 0 else 0.0
