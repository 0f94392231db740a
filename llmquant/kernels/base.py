"""The Kernel contract: a linear layer over a QuantizedWeight. A kernel never knows a file layout.

``prepare`` turns the waist into whatever buffers the kernel multiplies by; ``linear`` uses them. Selection asks
``why_not`` in order of preference and logs the refusals; ``reference`` never refuses and is every other kernel's twin.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

Prepared = dict[str, Tensor]


class Kernel(Protocol):
    """One way to compute ``x @ dequantize(weight).T``."""

    name: str

    def why_not(
        self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype, g_idx: bool = False
    ) -> str | None:
        """Why this kernel cannot take a weight ``[out, in]`` at activations ``dtype`` on ``device``, or None."""

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Prepared:
        """Buffers (name → tensor) that replace the weight; registered on the module, moved with it."""

    def linear(self, x: Tensor, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
        """``[..., in]`` → ``[..., out]`` in ``x.dtype``, bias not included."""

    def weight(self, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The dequantized ``[out, in]`` weight that :meth:`linear` multiplies by."""
