"""The walk: block by block through a model of which only the current block exists in memory.

The model is built on the meta device. Each decoder block is filled from the checkpoint, its linears
are quantized in execution order, the block is run once more *with* its quantized weights to make
the next block's inputs (so later layers compensate for earlier errors), and it is emptied again.
What leaves is a stream of :class:`BlockResult`; the walk knows no file layout and writes nothing.

With ``true_sequential`` the inputs of each set of linears are observed after the sets before it
were quantized; without it all inputs of a block are observed in one pass with its original weights.
A data-free recipe never runs the model.

Asymmetric calibration and tuning aim at what the original model computes: then its hidden states
walk along beside the quantized model's (:mod:`llmquant.quantization.blocks.original`), and a tuned
block's linears are moved once more, together, before it is left.

Where the embeddings are packed they come first, and a calibrated walk begins with what they
dequantize to. A walk that is continued at block 0 rounds them once more, which gives the same.

Hidden states live in a :class:`llmquant.quantization.blocks.hidden_states.StateStore`. A store that
comes with saved states continues the walk that saved them: nothing before is computed again but
masks and position embeddings, and those must come out as they did then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from llmquant.errors import QuantizationError
from llmquant.models.architectures import blocks_of
from llmquant.quantization.blocks.hidden_states import StateStore
from llmquant.quantization.calibrated import Calibrated
from llmquant.quantization.plan import BlockResult, Progress, WalkPlan
from llmquant.quantization.steps.rounding import Rounding


class Walker(Protocol):
    """Quantizes block after block, each called once and in order, and the head at the end."""

    def block(self, index: int, block: nn.Module, prefix: str, names: Sequence[str]) -> BlockResult:
        """Quantize the linears ``names`` of a block, whose path is ``prefix``."""
        ...

    def head(self, name: str) -> BlockResult:
        """Quantize the head, a linear called ``name``."""
        ...


class DataFree:
    """Reads one weight at a time; the model is never run."""

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding

    def block(self, index: int, block: nn.Module, prefix: str, names: Sequence[str]) -> BlockResult:
        return BlockResult(index, self._rounding.nearest(index, names))

    def head(self, name: str) -> BlockResult:
        return BlockResult(None, self._rounding.nearest(self._rounding.plan.blocks, [name]))


def walk(
    plan: WalkPlan,
    windows: Sequence[Tensor],
    on_progress: Callable[[Progress], None],
    store: StateStore | None = None,
    start: int = 0,
) -> Iterator[BlockResult]:
    """Quantize block after block.

    When a result is handed out, the store's named streams are the inputs of the next block.

    Args:
        plan: see :class:`WalkPlan`.
        windows: calibration token ids, each ``[positions]``; empty for a data-free method.
        on_progress: called before each module.
        store: where hidden states live; default: in memory.
        start: the first step to take: embeddings, where they are packed, then blocks. If a block
            of a calibrated walk was taken before, the store must hold what an earlier walk left.

    Raises:
        QuantizationError: NaN or Inf where there must be none; names the module.
        CheckpointError: a tensor of the model is missing from the checkpoint; saved states are
            damaged or do not fit.
    """
    if plan.recipe.needs_text and not windows:
        raise QuantizationError(
            f"method {plan.recipe.steps} needs calibration windows and got none"
        )
    rounding, given, first = Rounding(plan, on_progress), None, 0
    if plan.embedding is not None:
        first = 1
        if start == 0 or (start == 1 and windows):
            rounded = rounding.embedding(plan.embedding)
            given = rounded[plan.embedding][0] if windows else None
            if start == 0:
                yield BlockResult(None, rounded)
            del rounded
    start = max(start - first, 0)
    walker: Walker = (
        Calibrated(rounding, windows, store, start, given) if windows else DataFree(rounding)
    )
    del given
    blocks = blocks_of(plan.model, plan.architecture)
    for index in range(start, len(blocks)):
        prefix = f"{plan.architecture.blocks}.{index}"
        names = [n for n in plan.specs if n.startswith(f"{prefix}.")]
        yield walker.block(index, blocks[index], prefix, names)
    if plan.head is not None:
        yield walker.head(plan.head)
