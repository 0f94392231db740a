"""Round to nearest: fit each group's parameters, round each weight. The data-free baseline.

With a scale search it already beats plain min-max rounding; given input statistics the search
weighs the columns that matter. The result is exactly ``round_to_codes`` of
:func:`llmquant.algorithms.scale_search.fit`'s parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.algorithms.scale_search import ScaleSearch, fit, round_to_codes
from llmquant.errors import QuantizationError
from llmquant.runtime.finite import all_finite
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight


def check_weight(weight: Tensor, spec: QuantSpec, module: str) -> Tensor:
    """The weight in float32 (float64 kept), or an error naming ``module``.

    Raises:
        SpecError: the group size does not divide the columns.
        QuantizationError: the weight holds NaN or Inf.
    """
    spec.check(weight.shape[1], module)
    if not all_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise QuantizationError(
            f"{module}: the original weight holds {bad} NaN or Inf values; is the checkpoint damaged?"
        )
    return weight if weight.dtype == torch.float64 else weight.to(torch.float32)


def rtn(
    weight: Tensor,
    spec: QuantSpec,
    search: ScaleSearch | None = None,
    importance: Tensor | None = None,
    module: str = "weight",
) -> QuantizedWeight:
    """Quantize ``[out, in]`` by rounding to nearest.

    Args:
        weight: any float dtype, finite.
        spec: the grid.
        search: scale search; None means the default search.
        importance: ``[in]`` column weights for the search, or None.
        module: name used in errors.
    """
    search = search or ScaleSearch()
    w = check_weight(weight, spec, module)
    scales, zeros = fit(w, spec, search, importance if search.weighted else None)
    width = spec.width(w.shape[1])
    groups = w.reshape(w.shape[0], -1, width)
    codes = round_to_codes(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), spec.max_code)
    return QuantizedWeight(
        codes.reshape(w.shape).to(torch.uint8), scales.to(torch.float32), zeros, spec
    )
