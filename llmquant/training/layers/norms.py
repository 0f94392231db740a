"""Norms whose gains are trained: float32 factors of what they start with, as with scales, so that a
learning rate is a share. The forward pass rounds to what is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class _Straight(torch.autograd.Function):
    """Rounds to a dtype and back; the gradient passes as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Stored(nn.Module):
    """The number that is stored for a gain: the start's times a trained factor, rounded.

    A factor of 1 is the start, bit for bit. A start of 0 has no share to be moved by; there the
    factor less 1 is added.

    Args:
        start: float32 ``[width]``, as ``dtype`` holds it.
        dtype: of the file.
    """

    def __init__(self, start: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("start", start.detach().clone())

    def forward(self, factor: Tensor) -> Tensor:
        start = self.get_buffer("start")
        gain = torch.where(start == 0, factor - 1, start * factor)
        rounded: Tensor = _Straight.apply(gain, self.dtype)  # type: ignore[no-untyped-call]
        return rounded

    def right_inverse(self, gain: Tensor) -> Tensor:
        return torch.ones_like(gain)


@dataclass(frozen=True, slots=True)
class Gain:
    """A norm's trained ``factor``, float32 ``[width]``, and what the model sees of it."""

    factor: nn.Parameter
    seen: Stored

    @torch.no_grad()
    def stored(self) -> Tensor:
        """``[width]`` as it would be stored."""
        start, gain = self.seen.get_buffer("start"), self.seen(self.factor)
        return torch.where(gain == start, start, gain).to(self.seen.dtype)  # a zero has a sign


def norms_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a gain: ``weight`` with one dimension."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 1:
            yield name, module


def train_norm(module: nn.Module, dtype: torch.dtype) -> Gain:
    """Make a norm's gain a trained one, of which the model sees what ``dtype`` holds."""
    seen = Stored(module.get_parameter("weight"), dtype)
    parametrize.register_parametrization(module, "weight", seen, unsafe=True)
    factor = module.get_parameter("parametrizations.weight.original")
    factor.requires_grad_(True)
    return Gain(factor, seen)
