"""Reference: the original model's hidden states, carried through the blocks beside the quantized model's.

Asymmetric calibration and tune both aim at what the *original* model computes. Before a block's linears are quantized, its
output on the original stream is taken with its original weights; afterwards that becomes the next block's. Costs one more set of
hidden states (two while a block is worked on), one copy of the block's linears, and one more pass through each block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from llmquant.capture import BlockInput, observe_pairs, run_block, run_with
from llmquant.states import Room, Stream
from llmquant.stats import PairStats

STREAM = "reference"


class Reference:
    """The second stream.

    Attributes:
        hidden: the original model's states in front of the current block, ``[batch, positions, hidden]`` per batch.
        outputs: behind it; filled by :meth:`enter`.

    Both lie where the ``room`` keeps streams; a room that already has the reference continues an earlier walk.
    """

    def __init__(self, room: Room, inputs: Sequence[BlockInput]) -> None:
        self._room = room
        if STREAM not in room.streams:
            room.name(STREAM, room.scratch(batch.hidden for batch in inputs))
        self.outputs: Stream | None = None
        self._originals: dict[str, Tensor] = {}

    @property
    def hidden(self) -> Stream:
        return self._room.streams[STREAM]

    def enter(self, block: nn.Module, linears: Mapping[str, nn.Linear], inputs: Sequence[BlockInput]) -> None:
        """Note the block's outputs and its linears' weights; nothing in it may have been quantized yet."""
        self._originals = {f"{name}.weight": linear.weight.detach().clone() for name, linear in linears.items()}
        self.outputs = self._room.scratch(
            run_block(block, BlockInput(hidden, batch.calls)) for hidden, batch in zip(self.hidden, inputs, strict=True)
        )

    @contextmanager
    def block_outputs(self, block: nn.Module, inputs: Sequence[BlockInput]) -> Iterator[Stream]:
        """What the original block makes of the *quantized* model's states."""
        outputs = self._room.scratch(run_with(block, self._originals, batch).detach() for batch in inputs)
        try:
            yield outputs
        finally:
            self._room.drop(outputs)

    def observe(
        self, block: nn.Module, wanted: Mapping[str, nn.Linear], inputs: Sequence[BlockInput], all_experts: bool = False
    ) -> dict[str, PairStats]:
        """See :func:`llmquant.capture.observe_pairs`."""
        return observe_pairs(block, wanted, inputs, self._originals, self.hidden, all_experts)

    def leave(self) -> None:
        """Step to the next block."""
        assert self.outputs is not None
        self._room.name(STREAM, self.outputs)
        self.outputs, self._originals = None, {}
