"""Token embeddings rounded to nearest, a slice of rows at a time.

A row is a token's vector, and no other row's error can make up for its own, so there is nothing for
GPTQ to compensate: each row gets the scales that a search finds for it. What its error does to the
blocks, these do compensate for, because a calibrated walk begins with the rounded embeddings. A
vocabulary's float32 copy would be the largest tensor of a run, so only a slice of it exists.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from llmquant.algorithms import rtn
from llmquant.quantization.plan import WalkPlan
from llmquant.records import ModuleReport
from llmquant.runtime.memory import peak_resident_bytes
from llmquant.weight import QuantizedWeight, coarse_scales, unportable_scales

SLICE = 1 << 22
"""Numbers of an embedding that are rounded at a time."""


def rounded_embedding(plan: WalkPlan, name: str) -> tuple[QuantizedWeight, ModuleReport]:
    """The embeddings ``name`` on the recipe's grid, and the report.

    Raises:
        QuantizationError: NaN or Inf in them.
    """
    start = time.perf_counter()
    stored, spec = plan.reader.read(f"{name}.weight"), plan.specs[name]
    parts, error, norm = [], 0.0, 0.0
    for rows in slices(stored):
        weight = stored[rows].to(plan.device, torch.float32)
        part = rtn(weight, spec, plan.search, None, name)
        error += float((weight - part.dequantize()).square().sum())
        norm += float(weight.square().sum())
        parts.append(part.to("cpu"))
    codes, scales, zeros = (
        torch.cat([getattr(part, n) for part in parts]) for n in ("codes", "scales", "zeros")
    )
    whole = QuantizedWeight(codes, scales, zeros, spec)
    report = ModuleReport(
        name=name,
        spec=str(spec),
        shape=whole.shape,
        digest=whole.digest(),
        weight_error=error / norm if norm > 0 else 0.0,
        seconds=time.perf_counter() - start,
        peak=peak_resident_bytes(),
        coarse=coarse_scales(scales),
        wide=unportable_scales(scales),
    )
    return whole, report


def dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """:meth:`QuantizedWeight.dequantize` without a float32 copy of the whole."""
    whole = torch.empty(weight.shape, dtype=dtype)
    for rows in slices(weight.codes):
        part = QuantizedWeight(
            weight.codes[rows], weight.scales[rows], weight.zeros[rows], weight.spec
        )
        whole[rows] = part.dequantize(dtype)
    return whole


def slices(matrix: Tensor) -> Iterator[slice]:
    """Of its rows, some ``SLICE`` numbers each."""
    step = max(1, SLICE // matrix.shape[1])
    return (slice(start, start + step) for start in range(0, matrix.shape[0], step))
