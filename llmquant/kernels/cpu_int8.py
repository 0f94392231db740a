"""``cpu_int8``: the packed weight of ``cpu`` times activations that are rounded to 8 bits. Faster,
and other numbers.

Every row of x is cut where the weight's groups are cut, wider groups (per-row scales) into pieces
of 128 columns, and each piece is rounded to int8 with a scale of its own, ``max|x| / 127``, to
nearest even. Codes and activations are multiplied and summed as integers, exactly; the pieces are
summed in float32, in their order, with no fused operation. So the result is the same bits on every
instruction set, for any number of threads, and for a row of x whether it comes alone or among
others. csrc/cpu/int8.h has the definition, tests/int8_twin.py says it again in torch.

It is taken by name only: it stands behind ``reference``, which refuses nothing. Memory is that of
``cpu``, the weight itself is held exactly. A NaN or an infinity makes all outputs of its row NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmquant.kernels import native, native_int8
from llmquant.kernels.base import Prepared
from llmquant.kernels.cpu import Cpu, eager
from llmquant.kernels.native import Packed
from llmquant.spec import QuantSpec


class CpuInt8(Cpu):
    """Integer products; buffers as of :class:`~llmquant.kernels.cpu.Cpu`."""

    name = "cpu_int8"
    rounds_inputs = True

    def linear(
        self, x: Tensor, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        """The product with x rounded; its gradient is that of the product with x itself.

        Raises:
            UsageError: activations of a dtype that is none of float32, bfloat16 and float16, or of
                another width.
        """
        self._check(x, shape)
        packed = Packed.of(prepared, spec, shape)
        differentiated = x.requires_grad and torch.is_grad_enabled()
        plain = eager(x) and not differentiated
        y: Tensor = native_int8.linear(x, packed) if plain else _OPERATOR(x, *packed)
        return y


_OPERATOR = native.operator("llmquant::packed_linear_int8", native_int8.linear)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, words, scales, zeros, columns, bits, out, in_ = inputs
    ctx.prepared = {"words": words, "scales": scales, "zeros": zeros, "columns": columns}
    ctx.spec, ctx.shape = QuantSpec(bits), (out, in_)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the rounding."""
    weight = Cpu().weight(ctx.prepared, ctx.spec, ctx.shape, grad.dtype)
    return grad @ weight, *[None] * 7


_OPERATOR.register_autograd(_gradient, setup_context=_keep)
