"""All blocks of a model, each of which is a :class:`~llmquant.kernels.block.Step`, in one compiled
call."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from llmquant.kernels import native
from llmquant.kernels.block import Step
from llmquant.kernels.native import TYPES


class Steps:
    """Several blocks stepped one behind the other in one compiled call.

    Args:
        steps: of the blocks, in order.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._allocate()

    def _allocate(self) -> None:
        count = len(self._steps)
        self._blocks, self._keys, self._values = ((ctypes.c_void_p * count)() for _ in range(3))
        self._strides, self._held = (ctypes.c_int64 * (4 * count))(), (ctypes.c_int64 * count)()

    def __deepcopy__(self, memo: dict[int, object]) -> Steps:
        made = Steps.__new__(Steps)
        memo[id(self)] = made
        made._steps = copy.deepcopy(self._steps, memo)
        made._allocate()
        return made

    def takes(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """As :meth:`Step.takes`, of every block; their heads are of one size, being turned by the
        same angles."""
        for step in self._steps:
            step.follow()
        return self._steps[0].takes(hidden, cos, sin)

    def run(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, caches: Sequence[tuple[Tensor, Tensor, int]]
    ) -> Tensor:
        """``[1, 1, width]`` → the last block's output.

        Args:
            hidden, cos, sin: as the first block gets them; :meth:`takes` must have agreed to them.
            caches: for each block the buffers of keys and values ``[1, kv_heads, capacity,
                head_dim]``, in the dtype of ``hidden``, and how many tokens they hold; the new
                token's are written behind those, so there must be room.
        """
        strides, held = self._strides, self._held
        for i, (step, (keys, values, count)) in enumerate(zip(self._steps, caches, strict=True)):
            self._blocks[i], self._keys[i], self._values[i], held[i] = (
                step.address,
                keys.data_ptr(),
                values.data_ptr(),
                count,
            )
            _, strides[4 * i], strides[4 * i + 1], _ = keys.stride()
            _, strides[4 * i + 2], strides[4 * i + 3], _ = values.stride()
        out = hidden.clone()
        native.loaded().llmquant_blocks_step(
            native.instruction_number(), self._blocks, len(self._steps), out.data_ptr(),
            cos.data_ptr(), sin.data_ptr(), TYPES[hidden.dtype], self._keys, self._values,
            strides, held, torch.get_num_threads(),
        )  # fmt: skip
        return out
