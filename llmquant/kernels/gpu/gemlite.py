"""``gemlite``: 2, 4 and 8 bits on NVIDIA and AMD GPUs, bfloat16 and float16, by the Triton kernels
of gemlite.

Triton tunes and compiles them when a shape is first used. The package has a kernel for one row, one
for a few and one for many, and chooses itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.kernels.base import Prepared
from llmquant.kernels.gpu import gemlite_layout
from llmquant.kernels.gpu.device import Gpu
from llmquant.kernels.gpu.library import Library, LibraryKernel, group_of
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

# core.py of gemlite: SUPPORTED_BITS_TRITON, MIN_SIZE. Its README names groups that are a multiple
# of 32; its blocks of columns are powers of two and must not cross a group's end.
_BITS = (2, 4, 8)
_MULTIPLE = 32
_LEAST_CAPABILITY = (8, 0)  # of Triton


class Gemlite(LibraryKernel):
    """Buffers: those of :mod:`~llmquant.kernels.gpu.gemlite_layout`."""

    name = "gemlite"
    library = Library("gemlite", "0.6.0.post2")

    def _why_not_shape(self, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        group = group_of(spec, shape[1])
        if spec.bits not in _BITS:
            return f"it takes 2, 4 and 8 bits, not {spec.bits}"
        if shape[0] % _MULTIPLE or shape[1] % _MULTIPLE:
            return f"{list(shape)} is not a multiple of {_MULTIPLE} in both"
        if group is not None and (group < _MULTIPLE or group & (group - 1)):
            return f"groups of {group} columns are not a power of two from {_MULTIPLE} on"
        return None

    def _why_not_gpu(self, gpu: Gpu, dtype: torch.dtype) -> str | None:
        if not gpu.amd and gpu.capability < _LEAST_CAPABILITY:
            return f"the GPU has {gpu}, and Triton needs 8.0"
        return None

    def _pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        return gemlite_layout.pack(weight, dtype)

    def _unpack(
        self, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> QuantizedWeight:
        return gemlite_layout.unpack(prepared, spec, shape)

    def _theirs(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        import gemlite
        from gemlite.dtypes import TORCH_TO_DTYPE

        (out_features, in_features), spec = weight.shape, weight.spec
        layer = gemlite.GemLiteLinear(
            spec.bits, spec.width(in_features), in_features, out_features,
            TORCH_TO_DTYPE[dtype], TORCH_TO_DTYPE[dtype],
        )  # fmt: skip
        zeros = spec.middle if spec.symmetric else weight.zeros.to(dtype)
        layer.pack(weight.codes, weight.scales.to(dtype), zeros, fma_mode=False)
        if layer.get_meta_args() != _arguments(spec, in_features, dtype):
            raise ValueError(f"its arguments are {layer.get_meta_args()}")
        packed, scales, points, *_ = layer.get_tensor_args()
        return {"packed": packed, "scales": scales, "zeros": points}

    def _take(
        self, prepared: Prepared, ids: Tensor, spec: QuantSpec
    ) -> tuple[dict[str, Tensor], int, Tensor]:
        every = torch.arange(len(ids), device=ids.device)
        return gemlite_layout.take(prepared, ids, spec), len(ids), every

    def _multiply(
        self, x: Tensor, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        buffers = [prepared[n] for n in ("packed", "scales", "zeros")]
        return product(x, buffers, _arguments(spec, shape[1], x.dtype))


def product(x: Tensor, buffers: list[Tensor | None], arguments: list[int]) -> Tensor:
    """``[M, in]`` → ``[M, out]`` by the package, whose operator has a fake implementation."""
    import gemlite

    y: Tensor = gemlite.forward_functional(x, None, buffers, arguments)
    return y


def _arguments(spec: QuantSpec, in_features: int, dtype: torch.dtype) -> list[int]:
    row = group_of(spec, in_features) is None
    return gemlite_layout.arguments(spec, spec.width(in_features), row, dtype)
