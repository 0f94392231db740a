"""A packed weight for code that asks a module for its ``weight``: shape, dtype and device are
known, and numbers are decoded for each operation that needs them.

Models ask for more than they use: Llama 4 for the device of its embeddings, DeepSeek-V3.2 for the
dtype of a linear, at every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Decode = Callable[[], Tensor]
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class UndecodedWeight(Tensor):
    """Stands for what ``decode`` returns.

    Args:
        decode: makes the plain tensor, of this shape, dtype and device.
    """

    _decode: Decode

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, decode: Decode
    ) -> UndecodedWeight:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._decode = decode
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Any operation, on the numbers; another view of all of it stays what it is."""
        if func in _ALIASES:
            it = args[0]
            return cls(it.shape, it.dtype, it.device, it._decode)
        args, kwargs = tree_map(_plain, (args, kwargs or {}))
        return func(*args, **kwargs)

    # These read memory without an operation.

    def numpy(self, *, force: bool = False) -> Any:
        return self._decode().numpy(force=force)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self._decode()

    def tolist(self) -> Any:
        return self._decode().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"UndecodedWeight({list(self.shape)}, {self.dtype}, {self.device})"


def _plain(value: Any) -> Any:
    return value._decode() if isinstance(value, UndecodedWeight) else value
