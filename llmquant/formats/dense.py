"""Dense: no layout at all, the dequantized weight as an ordinary ``X.weight``. A place to convert
to, not one to read from.

The numbers are those that an engine multiplies by at the same dtype: ``(code - zero) * scale``,
exact in float32, rounded once. Codes and scales cannot be had back, so it is not among ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from llmquant.activations import Activations
from llmquant.errors import FormatError
from llmquant.formats.base import Plain, Scheme
from llmquant.runtime.finite import all_finite
from llmquant.weight import QuantizedWeight


class Dense(Plain):
    """The :class:`~llmquant.formats.base.Format` of an unquantized checkpoint; only writes."""

    name = "dense"

    def tensor_suffixes(self) -> frozenset[str]:
        return frozenset({"weight"})

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return None

    def pack(
        self, weight: QuantizedWeight, dtype: torch.dtype, activations: Activations = "none"
    ) -> dict[str, Tensor]:
        dense = weight.dequantize(dtype)
        if not all_finite(dense):
            raise FormatError(f"a weight is too large for {str(dtype).removeprefix('torch.')}")
        return {"weight": dense}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        raise FormatError("a dense weight has no codes to read")

    def shape_of(self, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        out_features, in_features = shapes["weight"]
        return out_features, in_features

    def config(self, schemes: Mapping[str, Scheme], ignore: Collection[str]) -> dict[str, Any]:
        return {}

    def schemes(
        self, config: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Scheme]:
        return {}
