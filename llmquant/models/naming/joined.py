"""Modules whose tensors a checkpoint has in parts, taken apart, and still one to the model's code.

transformers joins some tensors when it reads a file: the convolutions before queries, keys and
values of a linear attention, or a gate and an up projection. Here the parts are registered beside
the place of the whole, under the file's names. The whole's tensors are put together when they are
looked at; of a Linear the parts are Linears, and their outputs are put together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_PARTS = "_parts_beside"


def take_apart(model: nn.Module, path: str, parts: Mapping[str, int]) -> None:
    """Take a module apart; does nothing where a part's name is taken.

    Args:
        path: the module's; it holds tensors alone.
        parts: modules beside it, and how many rows of its tensors each gets, in order.
    """
    parent, _, leaf = path.rpartition(".")
    owner, whole = model.get_submodule(parent), model.get_submodule(path)
    if any(hasattr(owner, name) for name in parts):
        return
    for name in parts:
        part = copy.copy(whole)  # of its class; of what is no Linear the whole alone is called
        part.__dict__ = {n: v.copy() if isinstance(v, dict) else v for n, v in vars(whole).items()}
        part._parameters = dict.fromkeys(whole._parameters)
        owner.add_module(name, part)
    for tensor, parameter in list(whole.named_parameters(recurse=False)):
        rows = parameter.detach().split(list(parts.values()))
        for name, own in zip(parts, rows, strict=True):
            rest = nn.Parameter(own.clone(), requires_grad=parameter.requires_grad)
            owner.get_submodule(name).register_parameter(tensor, rest)
    if isinstance(whole, nn.Linear):
        for name, out_features in parts.items():
            owner.get_submodule(name).out_features = out_features  # type: ignore[assignment]
        del owner._modules[leaf]
        holder: Any = type(owner)
        owner.__class__ = _with_side_by_side(holder, leaf, tuple(parts))
        return
    whole.__dict__[_PARTS] = (owner, tuple(parts))
    kind: Any = type(whole)
    for tensor in list(whole._parameters):
        if whole._parameters.pop(tensor) is None:
            whole._parameters[tensor] = None
        else:
            kind = _put_together(kind, tensor)
    whole.__class__ = kind


@cache
def _put_together(kind: Any, tensor: str) -> Any:
    """The class with a tensor that is made of its parts each time it is asked for."""

    def found(self: nn.Module) -> Tensor:
        owner, parts = self.__dict__[_PARTS]
        return torch.cat([getattr(owner.get_submodule(part), tensor) for part in parts])

    return type(kind.__name__, (kind,), {tensor: property(found), "__module__": kind.__module__})


class SideBySide:
    """Linears that read the same, in place of the one that has all their rows."""

    def __init__(self, linears: list[Any]) -> None:
        self._linears = linears

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in]`` → ``[..., out]``, the linears' outputs one after the other."""
        return torch.cat([linear(x) for linear in self._linears], dim=-1)


@cache
def _with_side_by_side(kind: Any, leaf: str, parts: tuple[str, ...]) -> Any:
    def found(self: nn.Module) -> SideBySide:
        return SideBySide([self.get_submodule(part) for part in parts])

    return type(kind.__name__, (kind,), {leaf: property(found), "__module__": kind.__module__})
