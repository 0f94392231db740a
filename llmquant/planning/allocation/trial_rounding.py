"""Linears rounded for a trial, as the run would round them, and what that costs each layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from llmquant.algorithms import Factor, factorize
from llmquant.errors import QuantizationError
from llmquant.models.experts import place_of
from llmquant.quantization.plan import WalkPlan
from llmquant.quantization.steps.rounding import round_weight
from llmquant.spec import QuantSpec
from llmquant.stats import InputStats
from llmquant.weight import QuantizedWeight


class TrialRounding:
    """Rounds an item's linears to a scheme with the function that the run rounds with; one
    factorization per shared input. Channel scaling and tuning, which work on whole blocks, and the
    original's inputs of asymmetric calibration are left out."""

    def __init__(
        self, plan: WalkPlan, originals: Mapping[str, Tensor], stats: Mapping[str, InputStats]
    ) -> None:
        self.plan, self.originals, self.stats = plan, originals, stats
        self._factors: dict[int, Factor] = {}
        for name in originals:
            mine = stats[name]
            if mine.tokens == 0 and mine.dropped == 0 and place_of(plan.model, name):
                # an expert without tokens is rounded to nearest by the run, and costs nothing on
                # this text
                continue
            if mine.tokens == 0:
                raise QuantizationError(
                    f"{name} saw no finite calibration token ({mine.dropped} dropped)"
                )
            if plan.recipe.method != "rtn" and id(mine) not in self._factors:
                self._factors[id(mine)] = factorize(mine.hessian, plan.gptq_options, name)

    def __call__(self, spec: QuantSpec) -> dict[str, QuantizedWeight]:
        return {name: self._one(name, spec) for name in self.originals}

    def _one(self, name: str, spec: QuantSpec) -> QuantizedWeight:
        stats = self.stats[name]
        factor = self._factors.get(id(stats))
        return round_weight(self.plan, self.originals[name], stats, factor, spec, name)

    def error(self, rounded: Mapping[str, QuantizedWeight]) -> float:
        """``tr(D H D^T)`` per token, summed over the linears; rounding errors of the sum never make
        it negative."""
        return sum(
            max(_energy(w - rounded[n].dequantize(), self.stats[n]), 0.0)
            for n, w in self.originals.items()
        )

    @property
    def energy(self) -> float:
        """``tr(W H W^T)`` per token, summed over the linears."""
        return sum(_energy(w, self.stats[n]) for n, w in self.originals.items())


def _energy(weight: Tensor, stats: InputStats) -> float:
    return float(((weight @ stats.hessian) * weight).sum()) / max(stats.tokens, 1)
