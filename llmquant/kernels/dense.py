"""``dense``: dequantize once, then an ordinary linear. Full memory, full speed for many rows; never
chosen by ``auto``.

For looking at a packed model with the packing taken out of the picture, and where speed matters
more than memory and no packed kernel takes the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.errors import UsageError
from llmquant.kernels.base import Prepared
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight


class Dense:
    """``F.linear`` over the weight as ``QuantizedWeight.dequantize(dtype)`` gave it."""

    name = "dense"
    any_dtype = False
    rounds_inputs = False

    def why_not(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
        g_idx: bool = False,
    ) -> str | None:
        return None

    def why_not_weight(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"dense": weight.dequantize(dtype)}

    def linear(
        self, x: Tensor, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        weight = prepared["dense"]
        assert weight is not None
        return torch.nn.functional.linear(x, weight)

    def weight(
        self, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """The weight as prepared.

        Raises:
            UsageError: another dtype is asked for; it would be rounded twice, or not at all.
        """
        weight = prepared["dense"]
        assert weight is not None
        if weight.dtype != dtype:
            raise UsageError(
                f"kernel dense keeps the weight in {weight.dtype} only; load with kernel reference for {dtype}"
            )
        return weight

    def rows(
        self, prepared: Prepared, ids: Tensor, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        weight = prepared["dense"]
        assert weight is not None
        return weight[ids]
