"""Reference: the original model's hidden states, carried through the blocks beside the quantized model's.

Asymmetric calibration and tune both aim at what the *original* model computes. Before a block's linears are quantized, its
output on the original stream is taken with its original weights; afterwards that becomes the next block's. Costs one more set of
hidden states (two while a block is worked on), one copy of the block's linears, and one more pass through each block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from llmquant.capture import BlockInput, observe_pairs, run_block, run_with
from llmquant.stats import PairStats


class Reference:
    """The second stream.

    Attributes:
        hidden: the original model's states in front of the current block, ``[batch, positions, hidden]`` per batch.
        outputs: behind it; filled by :meth:`enter`.
    """

    def __init__(self, inputs: Sequence[BlockInput]) -> None:
        self.hidden = [batch.hidden for batch in inputs]
        self.outputs: list[Tensor] = []
        self._originals: dict[str, Tensor] = {}

    def enter(self, block: nn.Module, linears: Mapping[str, nn.Linear], inputs: Sequence[BlockInput]) -> None:
        """Note the block's outputs and its linears' weights; nothing in it may have been quantized yet."""
        self._originals = {f"{name}.weight": linear.weight.detach().clone() for name, linear in linears.items()}
        self.outputs = [
            run_block(block, BlockInput(hidden, batch.calls)) for hidden, batch in zip(self.hidden, inputs, strict=True)
        ]

    def block_outputs(self, block: nn.Module, inputs: Sequence[BlockInput]) -> list[Tensor]:
        """What the original block makes of the *quantized* model's states."""
        return [run_with(block, self._originals, batch).detach() for batch in inputs]

    def observe(
        self, block: nn.Module, wanted: Mapping[str, nn.Linear], inputs: Sequence[BlockInput], all_experts: bool = False
    ) -> dict[str, PairStats]:
        """See :func:`llmquant.capture.observe_pairs`."""
        return observe_pairs(block, wanted, inputs, self._originals, self.hidden, all_experts)

    def leave(self) -> None:
        """Step to the next block."""
        self.hidden, self.outputs, self._originals = self.outputs, [], {}
