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

from llmquant.errors import UsageError
from llmquant.kernels import native_int8
from llmquant.kernels.base import Prepared
from llmquant.kernels.cpu import Cpu
from llmquant.kernels.native import TYPES
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
        if x.dtype not in TYPES:
            raise UsageError(
                f"kernel cpu_int8 takes float32, bfloat16 and float16 activations, but got {x.dtype}"
            )
        if x.shape[-1] != shape[1]:
            raise UsageError(f"a linear of {shape[1]} input columns was given {list(x.shape)}")
        words, scales = prepared["words"], prepared["scales"]
        assert words is not None
        assert scales is not None
        eager = type(x) is Tensor and not torch.compiler.is_compiling()
        differentiated = x.requires_grad and torch.is_grad_enabled()
        product = (
            native_int8.linear
            if eager and not differentiated
            else torch.ops.llmquant.packed_linear_int8
        )
        y: Tensor = product(
            x, words, scales, prepared.get("zeros"), prepared.get("columns"), spec.bits, *shape
        )
        return y


@torch.library.custom_op("llmquant::packed_linear_int8", mutates_args=(), device_types="cpu")
def _packed_linear_int8(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    columns: Tensor | None,
    bits: int,
    out: int,
    in_: int,
) -> Tensor:
    """:func:`native_int8.linear` as an operator, which ``torch.compile``, exports and autograd see
    as one node."""
    return native_int8.linear(x, words, scales, zeros, columns, bits, out, in_)


@_packed_linear_int8.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    columns: Tensor | None,
    bits: int,
    out: int,
    in_: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, words, scales, zeros, columns, bits, out, in_ = inputs
    ctx.prepared = {"words": words, "scales": scales, "zeros": zeros, "columns": columns}
    ctx.spec, ctx.shape = QuantSpec(bits), (out, in_)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the rounding."""
    weight = Cpu().weight(ctx.prepared, ctx.spec, ctx.shape, grad.dtype)
    return grad @ weight, *[None] * 7


_packed_linear_int8.register_autograd(_gradient, setup_context=_keep)
