"""Reference: the original model's hidden states, carried through the blocks beside the quantized
model's.

Asymmetric calibration and tune both aim at what the *original* model computes. Before a block's
linears are quantized, its output on the original stream is taken with its original weights;
afterwards that becomes the next block's. Costs one more set of hidden states (two while a block is
worked on), one copy of the block's linears, and one more pass through each block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from llmquant.models.block_inputs import BlockInput, run_block, run_with
from llmquant.quantization.blocks.capture import BatchContext, no_context, observe_pairs
from llmquant.quantization.blocks.hidden_states import StateStore, Stream
from llmquant.quantization.blocks.replay import Replay, Tail
from llmquant.stats import PairStats

STREAM = "reference"


class Reference:
    """The second stream.

    Attributes:
        hidden: the original model's states in front of the current block, ``[batch, positions,
            hidden]`` per batch.
        outputs: behind it; filled by :meth:`enter`.

    Both lie where the ``store`` keeps streams; a store that already has the reference continues an
    earlier walk.
    """

    def __init__(self, store: StateStore, inputs: Sequence[BlockInput]) -> None:
        self._store = store
        if STREAM not in store.streams:
            store.name(STREAM, store.scratch(batch.hidden for batch in inputs))
        self.outputs: Stream | None = None
        self._originals: dict[str, Tensor] = {}
        self._replay: Replay | None = None
        self._entered = ExitStack()

    @property
    def hidden(self) -> Stream:
        return self._store.streams[STREAM]

    def enter(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        inputs: Sequence[BlockInput],
        tails: Sequence[Tail] = (),
    ) -> None:
        """Note the block's outputs and its linears' weights; nothing in it may have been quantized
        yet.

        With ``tails``, what they read is kept for :meth:`observe`.
        """
        self._originals = {
            f"{name}.weight": linear.weight.detach().clone() for name, linear in linears.items()
        }
        self._replay = (
            self._entered.enter_context(
                Replay(block, tails, linears, original=True, transfers=self._store.transfers)
            )
            if tails
            else None
        )
        self.outputs = self._store.scratch(self._outputs(block, inputs))

    def _outputs(self, block: nn.Module, inputs: Sequence[BlockInput]) -> Iterator[Tensor]:
        context = self._context
        for number, (hidden, batch) in enumerate(zip(self.hidden, inputs, strict=True)):
            with context(number):
                yield run_block(block, BlockInput(hidden, batch.calls))

    @contextmanager
    def block_outputs(self, block: nn.Module, inputs: Sequence[BlockInput]) -> Iterator[Stream]:
        """What the original block makes of the *quantized* model's states."""
        outputs = self._store.scratch(
            run_with(block, self._originals, batch).detach() for batch in inputs
        )
        try:
            yield outputs
        finally:
            self._store.drop(outputs)

    def observe(
        self,
        block: nn.Module,
        wanted: Mapping[str, nn.Linear],
        inputs: Sequence[BlockInput],
        all_experts: bool = False,
        context: BatchContext = no_context,
        first_token_share: float = 0.0,
    ) -> dict[str, PairStats]:
        """See :func:`llmquant.quantization.blocks.capture.observe_pairs`."""
        return observe_pairs(
            block, wanted, inputs, self._originals, self.hidden, all_experts, context, self._context,
            first_token_share,
        )  # fmt: skip

    @property
    def _context(self) -> BatchContext:
        return no_context if self._replay is None else self._replay.batch

    def settle(self, names: Collection[str]) -> None:
        """These linears need not be observed again."""
        if self._replay is not None:
            self._replay.settle(names)

    def forget(self) -> None:
        """Let go of what was kept for :meth:`observe`."""
        self._replay = None
        self._entered.close()

    def leave(self) -> None:
        """Step to the next block."""
        assert self.outputs is not None
        self.forget()
        self._store.name(STREAM, self.outputs)
        self.outputs, self._originals = None, {}
