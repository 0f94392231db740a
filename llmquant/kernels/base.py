"""The Kernel contract: a linear layer over a QuantizedWeight. A kernel never knows a file layout.

``prepare`` turns the waist into whatever buffers the kernel multiplies by; ``linear`` uses them.
Selection asks twice: ``why_not`` knows spec, shape, device and dtype, so a plan can be made before
any tensor is read; ``why_not_weight`` looks at the numbers (a scale with too many bits for the
kernel's registers). ``reference`` never refuses and is every other kernel's twin.

Whatever the kernel, ``weight(prepared, ...)`` equals ``QuantizedWeight.dequantize(dtype)`` bit for
bit, and ``rows`` gives rows of it, which is what token embeddings need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

Prepared = Mapping[str, Tensor | None]


class Kernel(Protocol):
    """One way to compute ``x @ dequantize(weight).T``. Stateless: all its data are the prepared
    buffers.

    Attributes:
        name: what a user writes to ask for it.
        any_dtype: whether the buffers serve every activation dtype, or only the one they were
            prepared for.
        rounds_inputs: whether it computes with rounded activations; ``auto`` takes none that does.
    """

    name: str
    any_dtype: bool
    rounds_inputs: bool

    def why_not(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
        g_idx: bool = False,
    ) -> str | None:
        """Why this kernel cannot take a weight ``[out, in]`` at activations ``dtype`` on
        ``device``, or None."""

    def why_not_weight(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        """Why it cannot take these numbers exactly at activations ``dtype``, or None. Asked only
        after :meth:`why_not` found nothing."""

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Buffers (name → tensor) that replace the weight; registered on the module, moved with
        it."""

    def linear(
        self, x: Tensor, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        """``[..., in]`` → ``[..., out]`` in ``x.dtype``, bias not included."""

    def weight(
        self, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """The dequantized ``[out, in]`` weight, equal to ``QuantizedWeight.dequantize(dtype)``."""

    def rows(
        self, prepared: Prepared, ids: Tensor, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        """Rows ``ids`` (int64 ``[n]``) of the dequantized weight, without the other rows: in
        float32, or in the one dtype that the kernel keeps. Rounded to ``dtype`` they are
        ``weight(..., dtype)[ids]``, bit for bit."""
