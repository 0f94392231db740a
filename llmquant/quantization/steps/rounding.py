"""Linears of a walk rounded, by the weights alone or with statistics of its inputs, and what is
reported of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from llmquant.algorithms import (
    Factor,
    asymmetric_target,
    descend,
    factorize,
    gptq,
    layer_error,
    rtn,
)
from llmquant.errors import QuantizationError
from llmquant.models.experts import UNSEEN, place_of
from llmquant.quantization.plan import Progress, WalkPlan
from llmquant.quantization.steps.embedding import rounded_embedding
from llmquant.records import ModuleReport
from llmquant.runtime.memory import peak_resident_bytes
from llmquant.spec import QuantSpec
from llmquant.stats import InputStats, PairStats
from llmquant.weight import QuantizedWeight, coarse_scales, unportable_scales

Rounded = tuple[QuantizedWeight, ModuleReport]


class Rounding:
    """Rounds the linears of a walk, each in one of its processes, and says which it works on.

    Args:
        plan: of the walk.
        on_progress: called before each linear.
    """

    def __init__(self, plan: WalkPlan, on_progress: Callable[[Progress], None]) -> None:
        self.plan = plan
        self._on_progress = on_progress

    def announce(self, index: int, module: str) -> None:
        """``module`` of the block ``index`` is being worked on; the head follows the blocks, and
        the embeddings (-1) are before them."""
        first = self.plan.embedding is not None
        self._on_progress(Progress(index + first, self.plan.total, module))

    def original(self, name: str, scaled: Mapping[str, Tensor] | None = None) -> Tensor:
        """A linear's float32 weight ``[out, in]`` as rounding starts from it: from the checkpoint,
        or as scaling left it."""
        if scaled is not None and f"{name}.weight" in scaled:
            return scaled[f"{name}.weight"]
        return self.plan.reader.read(f"{name}.weight").to(self.plan.device, torch.float32)

    def embedding(self, name: str) -> dict[str, Rounded]:
        """The token embeddings, rounded to nearest."""

        def one(name: str) -> Rounded:
            self.announce(-1, name)
            return rounded_embedding(self.plan, name)

        return self.plan.world.scatter_gather([name], one)

    def nearest(
        self,
        index: int,
        names: Sequence[str],
        fallback: str | None = None,
        scaled: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Rounded]:
        """Round to nearest without statistics.

        Args:
            index: of the block.
            names: of its linears.
            fallback: why it is not the recipe's method.
            scaled: weights that scaling changed, by full name.
        """

        def one(name: str) -> Rounded:
            self.announce(index, name)
            return to_nearest(self.plan, name, self.original(name, scaled), fallback)

        return self.plan.world.scatter_gather(names, one)

    def calibrated(
        self,
        index: int,
        names: Sequence[str],
        stats: InputStats,
        scaled: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Rounded]:
        """Round linears that share an input by the recipe's method: one Hessian, one factorization.

        Args:
            index: of the block.
            names: of the linears.
            stats: of their input.
            scaled: weights that scaling changed, by full name.

        Raises:
            QuantizationError: no token was seen; of an expert that is a fallback instead.
        """
        if stats.tokens == 0 and stats.dropped == 0 and place_of(self.plan.model, names[0]):
            return self.nearest(index, names, UNSEEN, scaled)
        if stats.tokens == 0:
            raise QuantizationError(
                f"{names[0]} saw no finite calibration token ({stats.dropped} dropped)"
            )
        world, factor = self.plan.world, None
        if self.plan.recipe.method == "gptq" and world.shard(names):
            factor = factorize(stats.hessian, self.plan.gptq_options, names[0])

        def one(name: str) -> Rounded:
            self.announce(index, name)
            return with_statistics(self.plan, name, self.original(name, scaled), stats, factor)

        return world.scatter_gather(names, one)


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
        spec=str(quantized.spec),
        shape=quantized.shape,
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
        spec=str(spec),
        shape=quantized.shape,
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
