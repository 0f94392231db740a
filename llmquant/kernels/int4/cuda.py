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
from llmquant.kernels.int4.parameters import exact_scales, operator_group
from llmquant.spec import QuantSpec

GEMM_ROWS = 384
"""Rows from which the weight is dequantized. The operator's time grows with the rows; on an H100
both take as long at 384, for weights of 4096 and 14336 rows (docs/gpu.md)."""

_LEAST_CAPABILITY = (8, 0)  # bf16 tensor cores, which the operator is compiled for


class CudaInt4(Int4Operator):
    """torch's int4 CUDA operator. ``packed`` is int32 in the layout of
    :mod:`~llmquant.kernels.int4.cuda_layout`, rows = out padded to 8."""

    name = "cuda_int4"

    def why_not(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
        g_idx: bool = False,
    ) -> str | None:
        if device.type != "cuda":
            return f"it runs on an NVIDIA GPU, not on {device}"
        if spec.bits != 4:
            return f"it takes 4 bits, not {spec.bits}"
        if dtype is not torch.bfloat16:
            return f"torch's int4 operator takes torch.bfloat16, not {dtype}"
        if operator_group(spec.width(shape[1])) is None:
            return f"groups of {spec.width(shape[1])} columns are not a multiple of 32"
        if cuda_layout.inner_tiles(shape[1]) is None:
            return f"{shape[1]} columns are not a multiple of 32"
        return why_not_device(device)

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

    def _crossover(self) -> int:
        return GEMM_ROWS

    def _many(self, x: Tensor, prepared: Prepared) -> Tensor:
        packed = prepared["packed"]
        assert packed is not None
        scales, shift = exact_scales(prepared), prepared.get("shift")
        # Integers up to 15 are exact in bf16, and so is their product with a scale before its one
        # rounding; a scale that was split is float32, and its product is rounded at the end.
        codes = self._unpack(packed).to(scales.dtype).sub_(8)
        grouped = codes.view(codes.shape[0], scales.shape[0], -1)
        if shift is not None:
            grouped.add_(shift.T.unsqueeze(-1).to(scales.dtype))
        weight = grouped.mul_(scales.T.unsqueeze(-1)).view(codes.shape).to(x.dtype)
        return torch.nn.functional.linear(x, weight)


def why_not_device(device: torch.device) -> str | None:
    """Why this machine's torch and GPU cannot run the operator, or None."""
    gpu = gpu_device.find(device)
    if gpu is None:
        return "torch finds no GPU"
    if gpu.amd:
        return "torch's int4 layout on AMD is another one"
    if gpu.capability < _LEAST_CAPABILITY:
        return f"the GPU has {gpu}, and it needs 8.0"
    if not cuda_layout.agrees(device):
        return f"torch {torch.__version__} packs int4 weights in a layout that is not known here"
    return None
