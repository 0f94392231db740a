"""What goes into a block of a walk, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from torch import Tensor

from llmquant.models.block_inputs import BlockInput
from llmquant.quantization.blocks.calls import Calls
from llmquant.quantization.blocks.hidden_states import StateStore

STREAM = "hidden"
"""Name of the quantized model's states in a store."""


class Inputs(Sequence[BlockInput]):
    """Every batch's way into ``block``, put together when it is asked for: a GPU holds one batch of
    states, and where it can the next, not all."""

    def __init__(self, store: StateStore, calls: Calls, block: int) -> None:
        self.store, self.calls, self.block = store, calls, block

    def __len__(self) -> int:
        return len(self.store.streams[STREAM])

    @overload
    def __getitem__(self, index: int) -> BlockInput: ...
    @overload
    def __getitem__(self, index: slice) -> list[BlockInput]: ...
    def __getitem__(self, index: int | slice) -> BlockInput | list[BlockInput]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._input(index, self.store.streams[STREAM][index])

    def __iter__(self) -> Iterator[BlockInput]:
        for index, hidden in enumerate(self.store.streams[STREAM]):
            yield self._input(index, hidden)

    def _input(self, index: int, hidden: Tensor) -> BlockInput:
        return BlockInput(hidden, self.calls.of(index, self.block, self.store.device))
