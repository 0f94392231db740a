"""``cuda_int4``: 4-bit weights on an NVIDIA GPU in bf16, by torch's own int4 operator: the floor
that needs no other package.

The operator rounds ``(q - 8) * s + zero`` to bf16 and multiplies on tensor cores with float32 sums.
Where the zero-point is 8 that is the dequantized weight of bf16, bit for bit. It is made for few
rows; for many, the weight is dequantized and torch's matrix product (cuBLAS) takes it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmquant.kernels.base import Prepared
from llmquant.kernels.gpu import device as gpu_device
from llmquant.kernels.int4 import cuda_layout
from llmquant.kernels.int4.operator import Int4Operator

GEMM_ROWS = 384
"""Rows from which the weight is dequantized. The operator's time grows with the rows; on an H100
both take as long at 384, for weights of 4096 and 14336 rows (docs/gpu.md)."""

_LEAST_CAPABILITY = (8, 0)  # bf16 tensor cores, which the operator is compiled for


class CudaInt4(Int4Operator):
    """torch's int4 CUDA operator. ``packed`` is int32 in the layout of
    :mod:`~llmquant.kernels.int4.cuda_layout`, rows = out padded to 8."""

    name = "cuda_int4"
    runs_on = ("cuda", "an NVIDIA GPU")
    crossover = GEMM_ROWS

    def _why_not_here(self, device: torch.device) -> str | None:
        gpu = gpu_device.find(device)
        if gpu is None:
            return "torch finds no GPU"
        if gpu.amd:
            return "torch's int4 layout on AMD is another one"
        if gpu.capability < _LEAST_CAPABILITY:
            return f"the GPU has {gpu}, and it needs 8.0"
        if not cuda_layout.agrees(device):
            return (
                f"torch {torch.__version__} packs int4 weights in a layout that is not known here"
            )
        return None

    def _pack(self, codes: Tensor) -> Tensor:
        return cuda_layout.pack(codes)

    def _unpack(self, packed: Tensor) -> Tensor:
        return cuda_layout.unpack(packed)

    def _padded(self, out_features: int) -> int:
        return cuda_layout.padded_rows(out_features)

    def _block(self) -> int:
        return cuda_layout.TILE_ROWS

    def _take(self, packed: Tensor, blocks: Tensor) -> Tensor:
        return packed[blocks]

    def _operator(self) -> Callable[[Tensor, Tensor, int, Tensor], Tensor]:
        operator: Callable[[Tensor, Tensor, int, Tensor], Tensor]
        operator = torch.ops.aten._weight_int4pack_mm
        return operator

    def _many(self, x: Tensor, prepared: Prepared) -> Tensor:
        exact = torch.float32 if prepared.get("low") is not None else torch.bfloat16
        return torch.nn.functional.linear(x, self._dequantized(prepared, exact).to(x.dtype))
