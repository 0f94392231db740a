"""TrainedLinear: a packed linear whose scales are parameters. At every step it multiplies by
exactly what would be stored.

The codes stay packed. A product dequantizes the weight, multiplies and lets it go; the backward
pass does so once more. At no time is more than one layer's dense weight in memory::

    w = (code - zero) * round(scale * factor)        round: to a number that is stored exactly

``factor`` starts at 1 and is the parameter, so that one learning rate fits scales of any size. The
gradient passes ``round`` as if it were not there (straight-through)::

    dL/dfactor[o, g] = scale[o, g] * sum over the group's columns j of dL/dw[o, j] * (code - zero)

which is the exact derivative of a scale whose codes stand. A group whose scale is 0 stays 0.
``weight()`` equals
``quantized().dequantize()`` bit for bit: one function computes both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmquant import bitpack
from llmquant.activations import Activations, int8_per_token
from llmquant.weight import QuantizedWeight, eight_bits, is_portable, portable

Rounding = Callable[[Tensor], Tensor]


class TrainedLinear(nn.Module):
    """``y = x @ w.T + bias`` over packed codes and trained scales.

    Args:
        start: the quantized matrix ``[out, in]`` to begin with.
        bias: ``[out]`` or None; not trained.
        activations: ``int8-dynamic`` rounds the input as a W8A8 engine does; the gradient passes
            that as if it were not there.

    Attributes:
        factor: float32 ``[out, groups]``, what the start's scales are multiplied by.
        rounding: to scales that are stored exactly.
    """

    def __init__(
        self,
        start: QuantizedWeight,
        bias: Tensor | None = None,
        activations: Activations = "none",
    ) -> None:
        super().__init__()
        self.spec, self.shape, self.activations = start.spec, start.shape, activations
        self.rounding: Rounding = rounding_of(start.scales)
        self.register_buffer("packed", bitpack.pack(start.codes, start.spec.bits))
        self.register_buffer("start_scales", start.scales.clone())
        self.register_buffer("zeros", start.zeros.clone())
        self.register_buffer("g_idx", None if start.g_idx is None else start.g_idx.clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.factor = nn.Parameter(torch.ones_like(start.scales))

    def trained(self) -> list[nn.Parameter]:
        """The parameters, in the order of :meth:`gradients`."""
        return [self.factor]

    def codes(self) -> Tensor:
        """uint8 ``[out, in]``."""
        packed = self.get_buffer("packed")
        return bitpack.unpack(packed, self.spec.bits, self.shape[1])

    def scales(self) -> Tensor:
        """``[out, groups]`` as they would be stored."""
        start = self.get_buffer("start_scales")
        return torch.where(start == 0, start, self.rounding(start * self.factor.detach()))

    def column_groups(self) -> Tensor | None:
        """int64 ``[in]``, or None where groups are consecutive columns."""
        order = self._buffers["g_idx"]
        return None if order is None else order.to(torch.int64)

    def times(self, matrix: Tensor, values: Tensor) -> Tensor:
        """``matrix`` ``[out, in]`` times each group's value ``[out, groups]``, in place."""
        order = self.column_groups()
        if order is not None:
            return matrix.mul_(values[:, order])
        matrix.view(*values.shape, -1).mul_(values.unsqueeze(-1))
        return matrix

    def gathered(self, matrix: Tensor) -> Tensor:
        """``[out, in]`` → ``[out, groups]``, summed over each group's columns."""
        order, groups = self.column_groups(), self.factor.shape[1]
        if order is None:
            return matrix.view(self.shape[0], groups, -1).sum(-1)
        return matrix.new_zeros(self.shape[0], groups).index_add_(1, order, matrix)

    def levels(self) -> Tensor:
        """The codes as numbers in the dtype of the scales, ``[out, in]``."""
        return self.codes().to(self.factor.dtype)

    def steps(self) -> Tensor:
        """``code - zero`` of every weight, ``[out, in]``."""
        levels, zeros = self.levels(), self.get_buffer("zeros").to(self.factor.dtype)
        order = self.column_groups()
        if order is not None:
            return levels.sub_(zeros[:, order])
        levels.view(*zeros.shape, -1).sub_(zeros.unsqueeze(-1))
        return levels

    def weight(self, scales: Tensor | None = None) -> Tensor:
        """``[out, in]`` exactly as it would be dequantized; by :meth:`scales` that the caller has
        already."""
        return self.times(self.steps(), self.scales() if scales is None else scales)

    def gradients(self, of_weight: Tensor, steps: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        """From ``dL/dw`` ``[out, in]`` to those of :meth:`trained`, given :meth:`steps` and
        :meth:`scales`. The first two arguments may be overwritten."""
        return (self._of_factor(of_weight, steps),)

    def _of_factor(self, of_weight: Tensor, steps: Tensor) -> Tensor:
        return self.gathered(steps.mul_(of_weight)).mul_(self.get_buffer("start_scales"))

    def quantized(self) -> QuantizedWeight:
        """What would be stored."""
        return QuantizedWeight(
            self.codes(), self.scales(), self.get_buffer("zeros"), self.spec, self._buffers["g_idx"]
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` → ``[..., out]``, in autocast's dtype where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.activations != "none":
            x = x + (int8_per_token(x.detach()) - x.detach())
        y: Tensor = _Product.apply(x, self, *self.trained())  # type: ignore[no-untyped-call]
        bias = self._buffers["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}, {self.spec}"


class _Product(torch.autograd.Function):
    """``x @ w.T`` that keeps ``x`` and the rounded scales, and makes ``w`` anew for the backward
    pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: TrainedLinear, *trained: Tensor) -> Tensor:
        ctx.layer = layer
        scales = layer.scales()  # dozens of small operators: what a step on a GPU waits for
        ctx.save_for_backward(x, scales)
        return torch.nn.functional.linear(x, layer.weight(scales).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, scales = ctx.saved_tensors
        layer: TrainedLinear = ctx.layer
        steps, of_x = layer.steps(), None
        if ctx.needs_input_grad[0]:
            of_x = grad @ layer.times(steps.clone(), scales).to(grad.dtype)
        of_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        return of_x, None, *layer.gradients(of_weight.to(layer.factor.dtype), steps, scales)


def rounding_of(scales: Tensor) -> Rounding:
    """How trained scales are rounded so that whatever holds these holds them: to portable ones,
    else to the narrowest dtype that has these exactly. Those that are 0 are never rounded."""
    scales = scales[scales != 0]
    if is_portable(scales):
        return portable
    if torch.equal(eight_bits(scales), scales):
        return eight_bits
    if torch.equal(scales.to(torch.float16).to(torch.float32), scales):
        return _half
    return _same


def _half(scales: Tensor) -> Tensor:
    """To float16's range and precision, subnormal numbers too; a scale keeps its sign and never
    becomes 0."""
    limits = torch.finfo(torch.float16)
    size = scales.abs().clamp(limits.smallest_normal * limits.eps, limits.max)
    size = size.to(torch.float16).to(torch.float32)
    return torch.where(scales < 0, -size, size)


def _same(scales: Tensor) -> Tensor:
    return scales
