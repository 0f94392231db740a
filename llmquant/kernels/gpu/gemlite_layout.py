"""gemlite's layout of a weight, as tensor operations of any device.

Read in gemlite 0.6.0.post2: ``GemLiteLinear.pack`` (core.py) with ``fma_mode=False``, and
``pack_weights_over_cols_torch`` (bitpack.py)::

    packed  int32 [in * bits / 32, out]   ``per`` codes a word, that of column j in its bits
                                          bits * (j % per) …
    scales  [G, out]                      in the dtype of the activations
    zeros   [G, out]                      in that dtype; of a symmetric weight one int32, the middle

So its kernels compute ``(q - z) * s`` with an exact difference and one rounding, not the ``q * s +
(-z * s)`` of its default, whose second term was rounded before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.kernels.base import Prepared
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

# ``DType`` of gemlite's dtypes.py.
_FLOAT32 = 0
_NUMBER = {torch.float16: 1, torch.bfloat16: 2}
# W_group_mode: ``q - z``, scaled afterwards; ``(q - z) * s``.
_SHIFTED, _SHIFTED_AND_SCALED = 1, 3


def pack(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """``packed``, ``scales`` and ``zeros``. Columns are a multiple of 32, and scales are exact in
    ``dtype``."""
    bits, (out_features, in_features) = weight.spec.bits, weight.shape
    per = 32 // bits
    cut = weight.codes.view(out_features, in_features // per, per)
    packed = cut[..., 0].to(torch.int32)
    for place in range(1, per):
        packed |= cut[..., place].to(torch.int32) << bits * place
    if weight.spec.symmetric:
        zeros = torch.tensor(weight.spec.middle, dtype=torch.int32, device=weight.codes.device)
    else:
        zeros = weight.zeros.to(dtype).T.contiguous()
    return {
        "packed": packed.T.contiguous(),
        "scales": weight.scales.to(dtype).T.contiguous(),
        "zeros": zeros,
    }


def unpack(prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]) -> QuantizedWeight:
    """Inverse of :func:`pack`."""
    packed, scales, zeros = (prepared[n] for n in ("packed", "scales", "zeros"))
    assert packed is not None
    assert scales is not None
    assert zeros is not None
    words = packed.T
    codes = torch.stack(
        [(words >> spec.bits * p & spec.max_code).to(torch.uint8) for p in range(32 // spec.bits)],
        dim=-1,
    ).reshape(shape)
    points = zeros.expand(scales.shape) if spec.symmetric else zeros
    return QuantizedWeight(
        codes, scales.T.to(torch.float32).contiguous(), points.T.to(torch.uint8).contiguous(), spec
    )


def take(prepared: Prepared, rows: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """The buffers of some rows, int64 ``[n]``."""
    taken = {}
    for name in ("packed", "scales", "zeros"):
        buffer = prepared[name]
        assert buffer is not None
        taken[name] = buffer if buffer.ndim == 0 else buffer[:, rows]
    return taken


def arguments(spec: QuantSpec, width: int, row: bool, dtype: torch.dtype) -> list[int]:
    """What gemlite calls ``meta_args``: of a weight with groups of ``width`` columns, which are
    whole rows if ``row``."""
    number = _NUMBER[dtype]
    return [
        0,  # activations are not quantized
        spec.bits,
        width,
        spec.max_code,
        32 // spec.bits,  # codes of a word
        number,  # of the input
        number,  # of the result
        _FLOAT32,  # of the sums
        number,  # of the scales
        int(row),  # 1: scales are applied to the sums
        _SHIFTED if row else _SHIFTED_AND_SCALED,
        1,  # packed is contiguous
    ]
