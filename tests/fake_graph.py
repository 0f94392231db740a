"""A graph of operators recorded on any device, as frozen as a CUDA graph is: replaying repeats the
very operators with the very numbers that Python had when it was recorded, on the very memory.

What a capture does not permit (to wait for the device) fails while it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal")


class FakeGraph(TorchDispatchMode):
    """What runs inside is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self._ops: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in _WAITING:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self._ops.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, out in self._ops:
            again = func(*args, **kwargs)
            given = _memories((args, kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


def _memories(values: Any) -> set[int]:
    tensors = (t for t in tree_leaves(values) if isinstance(t, Tensor))
    return {t.untyped_storage().data_ptr() for t in tensors}


def fake_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A recorder, as :class:`llmquant_serve.engines.batching.step_graph.CudaGraphs` is one."""
    run()
    graph = FakeGraph()
    with graph:
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
