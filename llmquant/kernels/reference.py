"""``reference``: the slow, obvious kernel. It takes everything and every other kernel is tested
against it.

Buffers: ``codes`` int32, a dense bit stream per row; ``scales`` in the narrowest of bf16, fp16 and
fp32 that holds them exactly; ``zeros`` uint8 unless symmetric; ``g_idx`` int32 if the columns have
an order of their own. Each forward unpacks, dequantizes in float32, rounds once to the activations'
dtype and calls ``F.linear``; that is the definition of the packed model, whatever the dtype. Rows
are dequantized a slice at a time so the float32 intermediate stays small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant import bitpack
from llmquant.kernels.base import Prepared
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

_SLICE_ELEMENTS = 1 << 21  # 8 MiB of float32 at a time


def narrowest(scales: Tensor) -> Tensor:
    """The same float32 numbers in bf16, fp16 or, if neither holds them exactly, float32."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = scales.to(dtype)
        if torch.equal(narrow.to(torch.float32), scales):
            return narrow
    return scales


class Reference:
    """Unpack, dequantize in float32, multiply."""

    name = "reference"
    any_dtype = True
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
        buffers = {
            "codes": bitpack.pack(weight.codes, weight.spec.bits),
            "scales": narrowest(weight.scales),
        }
        if not weight.spec.symmetric:
            buffers["zeros"] = weight.zeros
        if weight.g_idx is not None:
            buffers["g_idx"] = weight.g_idx
        return buffers

    def linear(
        self, x: Tensor, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        return torch.nn.functional.linear(x, self.weight(prepared, spec, shape, x.dtype))

    def weight(
        self, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        packed, scales, zeros, g_idx = (
            prepared.get(n) for n in ("codes", "scales", "zeros", "g_idx")
        )
        assert packed is not None
        assert scales is not None
        out_features, in_features = shape
        weight = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
        step = max(1, _SLICE_ELEMENTS // in_features)
        columns = None if g_idx is None else g_idx.to(torch.int64)
        for start in range(0, out_features, step):
            rows = slice(start, start + step)
            codes = bitpack.unpack(packed[rows], spec.bits, in_features).to(torch.float32)
            zero = spec.middle if zeros is None else zeros[rows].to(torch.float32)
            weight[rows] = _dequantize(codes, scales[rows].to(torch.float32), zero, columns)
        return weight

    def rows(
        self, prepared: Prepared, ids: Tensor, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        picked = {n: t[ids] if t is not None and n != "g_idx" else t for n, t in prepared.items()}
        return self.weight(picked, spec, (len(ids), shape[1]), torch.float32)


def _dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | int, columns: Tensor | None
) -> Tensor:
    """``(codes - zeros) * scales`` in float32, in place; ``columns`` int64 ``[in]`` is each
    column's group."""
    if columns is not None:
        zero = zeros if isinstance(zeros, int) else zeros[:, columns]
        return codes.sub_(zero).mul_(scales[:, columns])
    groups = codes.view(*scales.shape, -1)
    zero = zeros if isinstance(zeros, int) else zeros.unsqueeze(-1)
    return groups.sub_(zero).mul_(scales.unsqueeze(-1)).view(codes.shape)
