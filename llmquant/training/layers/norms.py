"""Norms whose gains are trained: float32 masters, in the forward pass rounded to what is stored."""

from __future__ import annotations

from collections.abc import Iterator
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
    """The number that is stored for a float32 master."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        rounded: Tensor = _Straight.apply(master, self.dtype)  # type: ignore[no-untyped-call]
        return rounded


def norms_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a gain: ``weight`` with one dimension."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 1:
            yield name, module


def train_norm(module: nn.Module, dtype: torch.dtype) -> nn.Parameter:
    """Make a norm's gain a trained master of which the model sees what ``dtype`` holds; returns
    it."""
    parametrize.register_parametrization(module, "weight", Stored(dtype), unsafe=True)
    master = module.get_parameter("parametrizations.weight.original")
    master.requires_grad_(True)
    return master
