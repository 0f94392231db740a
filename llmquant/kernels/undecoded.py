"""A packed weight for code that asks a module for its ``weight``: shape, dtype and device are
known, and numbers are decoded once one is needed.

Models ask for more than they use: Llama 4 for the device of its embeddings, DeepSeek-V3.2 for the
dtype of a linear, at every token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Decode = Callable[[], Tensor]
_KNOWN: tuple[Any, ...] = (
    *(Tensor.shape, Tensor.dtype, Tensor.device, Tensor.layout, Tensor.ndim, Tensor.is_cuda),
    Tensor.requires_grad,
)
_GIVEN = frozenset(
    {
        *(attribute.__get__ for attribute in _KNOWN),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point),
        # What stands for the same numbers, as a parameter is made of a tensor.
        *(Tensor.detach, Tensor.requires_grad_),
    }
)
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class UndecodedWeight(Tensor):
    """Stands for what ``decode`` returns, which is called once at most.

    Args:
        decode: makes the plain tensor, of this shape, dtype and device.
    """

    _decode: Decode

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, decode: Decode
    ) -> UndecodedWeight:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._decode = cache(decode)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Whatever Python asks of it."""
        if func in _GIVEN:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        return _on_numbers(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The same of what compiled code does with it."""
        if func in _ALIASES:
            it = args[0]
            return cls(it.shape, it.dtype, it.device, it._decode)
        return _on_numbers(func, args, kwargs)


def _on_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    args, kwargs = tree_map(_plain, (args, kwargs or {}))
    return func(*args, **kwargs)


def _plain(value: Any) -> Any:
    return value._decode() if isinstance(value, UndecodedWeight) else value
